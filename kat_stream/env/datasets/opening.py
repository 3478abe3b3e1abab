"""From a spec or a Task record to an open dataset.

Owns the cache of open datasets of this process. Invariant: one spec is opened once, so a generated family is generated
once however many rollouts ask for its files.
"""

from __future__ import annotations

from functools import lru_cache

from kat_stream.env.datasets.base import Dataset, Spec
from kat_stream.env.plugins import load
from kat_stream.errors import TaskError
from topics import Task

GROUP = "kat_stream.datasets"


@lru_cache(maxsize=16)
def open_dataset(spec: str) -> Dataset:
    """The dataset of a spec `scheme:location?option=value`; ConfigError if scheme, location or an option is wrong."""
    parsed = Spec.parse(spec)
    dataset: Dataset = load(GROUP, parsed.scheme)(parsed)
    return dataset


def dataset_of(task: Task) -> Dataset:
    """The dataset that a task's references point into (`spec#task_id`); TaskError if the reference is malformed."""
    # The id may hold a `#` itself.
    spec = task.environment.files.removesuffix(f"#{task.task_id}")
    if spec == task.environment.files:
        raise TaskError(
            f"{task.task_id}: environment.files {task.environment.files!r} is not `dataset-spec#{task.task_id}`"
        )
    return open_dataset(spec)
