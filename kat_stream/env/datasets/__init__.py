"""Datasets of KwaiEnv: where tasks come from, one file a format behind one protocol.

Owns the way from a spec (`mend:train?count=3000&seed=0`) or a Task record to the dataset that can read its files.
Invariant: a Task record alone is enough; any process that can see the same data resolves its references.
"""

from kat_stream.env.datasets.base import Dataset, Files, Spec
from kat_stream.env.datasets.opening import GROUP, dataset_of, files_of, open_dataset

__all__ = ["GROUP", "Dataset", "Files", "Spec", "dataset_of", "files_of", "open_dataset"]
