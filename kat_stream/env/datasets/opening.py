"""From a spec or a Task record to an open dataset.

Owns the cache of open datasets of this process, and the thread that reads them. Invariant: one spec is opened once, so
a generated family is generated once however many rollouts ask for its files.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Literal

from kat_stream.env.datasets.base import Dataset, Files, Spec
from kat_stream.env.plugins import load
from kat_stream.errors import TaskError
from topics import Task

GROUP = "kat_stream.datasets"
# One: what a whole group asks for at once is opened and made once, and a slow disk is read in order.
_READER = ThreadPoolExecutor(1, "kat-stream-datasets")


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


async def files_of(task: Task, part: Literal["files", "tests", "solution"]) -> Files:
    """One part of a task's files, read beside the event loop; TaskError, also for a malformed reference."""

    def read() -> Files:
        dataset = dataset_of(task)
        found: Files = getattr(dataset, part)(task)
        return found

    return await asyncio.get_running_loop().run_in_executor(_READER, read)
