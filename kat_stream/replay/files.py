"""A remade step as files, for a notebook or a debugger.

DIR/step.json      the record of the step, and the metrics of the step made again
DIR/batch.npz      the batch: arrays `row0.ids`, `row0.pos`, ... as in topics/batch.py, weights of stale turns 0
DIR/groups/N.msgpack   each `PackedBatch`, in the order in which they were merged
DIR/weights/       a Hugging Face directory: the policy after the step
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import numpy as np

from kat_stream.replay.remake import Remade
from kat_stream.training.learner import TorchLearner
from kat_stream.training.publication import weights_checksum
from kat_stream.trees.wire import to_arrays
from topics import encode


def write(remade: Remade, directory: Path) -> None:
    """Everything above. OSError if the directory cannot be written."""
    (directory / "groups").mkdir(parents=True)
    told = {"recorded": remade.given.recorded, "replayed": remade.metrics, "base": remade.base}
    (directory / "step.json").write_bytes(msgspec.json.format(msgspec.json.encode(told)))
    rows = enumerate(to_arrays(remade.given.step.batch))
    arrays = {f"row{number}.{name}": array for number, row in rows for name, array in row.items()}
    np.savez_compressed(directory / "batch.npz", allow_pickle=False, **arrays)
    for number, group in enumerate(remade.given.groups):
        (directory / "groups" / f"{number}.msgpack").write_bytes(encode(group))
    remade.learner.publish(directory / "weights")


def weights_sha256(learner: TorchLearner) -> str:
    """`weights_checksum` of the present weights, as `publish` would write them."""
    with tempfile.TemporaryDirectory() as work:
        learner.write_weights(Path(work))
        return weights_checksum(Path(work))
