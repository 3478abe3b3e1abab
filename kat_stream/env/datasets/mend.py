"""The mend family as a dataset, generated in memory.

Owns the Task records of `mend:train?count=3000&seed=0` and `mend:held-out?count=240`. Invariant: a task's files, check
and solution are functions of its reference, so no directory is ever written for a rollout.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal, cast, get_args

from kat_stream.env.datasets.base import Files, Spec, usable
from kat_stream.env.mend import MendTask, generate, repository, write_task
from kat_stream.errors import ConfigError, TaskError
from topics import Environment, Task, VerifierSpec

_Split = Literal["train", "held-out"]
_SPLITS = get_args(_Split)
_ENVIRONMENT_MB = 256
_AGENT_TIMEOUT_S = 60
_VERIFIER_TIMEOUT_S = 30.0
_SCRIPT = 0o755


class MendDataset:
    """`count` tasks of one split, made from `seed`; an agent has `seconds` for each (60)."""

    name = "mend"

    def __init__(self, spec: Spec) -> None:
        spec.check_options(("count", "seed", "seconds"))
        if spec.location not in _SPLITS:
            raise ConfigError(f"dataset {spec.text!r}: split {spec.location!r} is not one of {', '.join(_SPLITS)}")
        self._spec = spec
        self._seconds = float(spec.number("seconds", _AGENT_TIMEOUT_S))
        split = cast(_Split, spec.location)
        made = generate(split, spec.number("count", 240), spec.number("seed", 0))
        self._made = {task.task_id: task for task in made}
        # The eight rollouts of a group and its gradings come together: one repository is made once.
        self._repository = lru_cache(maxsize=64)(lambda task_id: repository(self._made[task_id]))

    def scan(self) -> Iterator[Task | TaskError]:
        return iter(self.tasks())

    def tasks(self, limit: int | None = None) -> list[Task]:
        return usable((self._task(made) for made in self._made.values()), limit)

    def files(self, task: Task) -> Files:
        self._known(task)
        return self._repository(task.task_id)

    def tests(self, task: Task) -> Files:
        return {"check.sh": (self._known(task).check.encode(), _SCRIPT)}

    def solution(self, task: Task) -> Files:
        return {"solve.sh": ("\n".join((*self._known(task).solution, "")).encode(), _SCRIPT)}

    def write(self, directory: Path) -> list[Path]:
        """Write every task as a Harbor task directory below `directory`; returns their paths."""
        paths = {directory / task_id: made for task_id, made in self._made.items()}
        for path, made in paths.items():
            write_task(made, path)
        return list(paths)

    def _known(self, task: Task) -> MendTask:
        try:
            return self._made[task.task_id]
        except KeyError as error:
            raise TaskError(f"{self._spec.text}: no task {task.task_id!r}") from error

    def _task(self, made: MendTask) -> Task:
        reference = self._spec.reference(made.task_id)
        return Task(
            run="",
            task_id=made.task_id,
            dataset=self.name,
            environment=Environment(files=reference, memory_mb=_ENVIRONMENT_MB),
            instruction=made.instruction,
            verifier=VerifierSpec(
                name="command",
                tests=reference,
                timeout_s=_VERIFIER_TIMEOUT_S,
                command='sh "$TESTS/check.sh"',
                options={"require_submit": "1"},
            ),
            solution=reference,
            agent_timeout_s=self._seconds,
            metadata={"template": made.template, "split": made.split},
        )
