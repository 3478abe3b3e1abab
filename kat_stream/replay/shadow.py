"""A shadow: makes every step of a run, live or archived, with other settings or another seed, in a folder of its own.

    runs/RUN.shadow-NAME/shadow.json   what was asked for; the same command goes on with it
    runs/RUN.shadow-NAME/steps.jsonl   one `TrainStep` a line, with the shadow's own metrics
    runs/RUN.shadow-NAME/checkpoints/

Invariant: the run's topics and files are only read. The steps made are a prefix of the run's surviving branch: when the
run goes back to a checkpoint, the shadow goes back to one of its own at or before that place.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio
import msgspec

from kat_stream.config import Config
from kat_stream.errors import ConfigError, DecodeError
from kat_stream.log import Delivered, Follower
from kat_stream.observe.sources import LogSource, Source, read_records
from kat_stream.replay.history import TOPICS, History
from kat_stream.replay.remake import Given, base_of, make, new_learner, steps_of
from kat_stream.rl.step import Step, assemble
from kat_stream.training.checkpoint import Checkpoint, CheckpointStore
from kat_stream.training.learner import TorchLearner
from topics import TrainStep

POLL_S = 0.2


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """shadow.json."""

    run: str
    name: str
    seed: int
    settings: tuple[str, ...]
    """As on the command line: SECTION.KEY=VALUE."""
    learner_sha256: str


@dataclass(slots=True)
class Shadow:
    """`open` it, then `follow`."""

    directory: Path
    config: Config
    """The run's, with what is to be different."""
    asked: Asked
    told: Callable[[TrainStep], None]
    """Called after each step with the shadow's own record of it."""

    def open(self) -> None:
        """`ConfigError` if the folder is of a shadow with other settings."""
        card = self.directory / "shadow.json"
        if card.is_file():
            before = msgspec.json.decode(card.read_bytes(), type=Asked)
            if before != self.asked:
                raise ConfigError(f"{self.directory} is of a shadow with {before}; choose another --name")
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        card.write_bytes(msgspec.json.encode(self.asked))

    def made(self) -> list[TrainStep]:
        """Every step made so far."""
        file = self.directory / "steps.jsonl"
        lines = file.read_bytes().splitlines() if file.is_file() else []
        return [msgspec.json.decode(line, type=TrainStep) for line in lines]

    async def follow(self, source: Source, stopping: anyio.Event) -> str:
        """Make steps until the run's last one, `stopping`, or until none came for `trainer.step_timeout_s`.

        Says which. `DataError`: a record or a group is gone, or a batch is not the recorded one.
        """
        pupil: _Pupil | None = None
        async for history in _growing(source, self.config, stopping):
            branch = history.ready()
            if pupil is None or not pupil.stands_on(branch):
                pupil = await anyio.to_thread.run_sync(self._placed, branch)
            todo = branch[pupil.learner.step_count :]
            async for given in steps_of(source, history, todo, self.config):
                if stopping.is_set():
                    break
                await anyio.to_thread.run_sync(self._step, pupil, given)
            if pupil.learner.step_count >= self.config.run.steps:
                return "the run's last step is made"
        return "stopped" if stopping.is_set() else "no further step came"

    def _placed(self, branch: Sequence[TrainStep]) -> _Pupil:
        """At the newest checkpoint of ours that lies on the branch; what was made beyond it is forgotten."""
        base = base_of(self.directory / "checkpoints", branch, len(branch) + 1)
        learner = new_learner(self.config, self.asked.seed, base)
        kept = self.made()[: learner.step_count]
        lines = b"".join(msgspec.json.encode(step) + b"\n" for step in kept)
        aside = self.directory / ".steps.jsonl"
        aside.write_bytes(lines)
        aside.replace(self.directory / "steps.jsonl")
        store = CheckpointStore(self.directory / "checkpoints", uuid.uuid4().hex[:6])
        store.open()
        return _Pupil(learner, store, [(step.lineage, step.step) for step in kept])

    def _step(self, pupil: _Pupil, given: Given) -> None:
        metrics = make(pupil.learner, self._ordered(given))
        recorded = given.recorded
        own = msgspec.structs.replace(
            recorded,
            run=self.directory.name,
            metrics=metrics,
            unix_s=time.time(),
            checkpoint="",
            seed=self.asked.seed,
            threads=self.config.trainer.threads,
            learner_sha256=self.asked.learner_sha256,
        )
        with (self.directory / "steps.jsonl").open("ab") as file:
            file.write(msgspec.json.encode(own) + b"\n")
        pupil.made.append((recorded.lineage, recorded.step))
        if recorded.step % self.config.trainer.checkpoint_every == 0 or recorded.step == self.config.run.steps:
            state = Checkpoint(pupil.learner.state_dict(), recorded.lineage, recorded.positions, recorded.trained)
            pupil.store.save(state, keep=self.config.trainer.keep_checkpoints)
        self.told(own)

    def _ordered(self, given: Given) -> Step:
        """With another seed the groups are merged in another order: what differs then is the noise of summation."""
        recorded, groups = given.recorded, list(given.groups)
        if self.asked.seed == recorded.seed:
            return given.step
        random.Random(f"{self.asked.seed}/{recorded.step}").shuffle(groups)
        return assemble(groups, recorded.version, given.forks, self.config.sampler.staleness)


@dataclass(slots=True)
class _Pupil:
    learner: TorchLearner
    store: CheckpointStore
    made: list[tuple[str, int]]
    """(lineage, step) of the run for each step that the learner has made."""

    def stands_on(self, branch: Sequence[TrainStep]) -> bool:
        return self.made == [(step.lineage, step.step) for step in branch[: len(self.made)]]


async def _growing(source: Source, config: Config, stopping: anyio.Event) -> AsyncIterator[History]:
    """What is on record, each time that it grew; an archive is read once."""
    history = History()
    if not isinstance(source, LogSource):
        async for record, _ in read_records(source, TOPICS):
            history.apply(record)
        yield history
        return
    async with source.log.follow(TOPICS, start="earliest") as follower:
        async for delivered in follower.catch_up():
            _take(history, delivered, source.run)
        grown = time.monotonic()
        yield history
        while not stopping.is_set() and time.monotonic() - grown < config.trainer.step_timeout_s:
            if await _more(history, follower, source.run):
                yield history
                grown = time.monotonic()


async def _more(history: History, follower: Follower, run: str) -> bool:
    """Whether anything came."""
    before = len(history.steps) + len(history.versions)
    for delivered in await follower.poll(POLL_S):
        _take(history, delivered, run)
    return len(history.steps) + len(history.versions) > before


def _take(history: History, delivered: Delivered, run: str) -> None:
    with suppress(DecodeError):  # who cannot read a record of the run learns it from `kat-stream dead-letters`
        record = delivered.record()
        if record.run == run:
            history.apply(record)
