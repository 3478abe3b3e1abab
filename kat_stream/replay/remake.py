"""A recorded step made again: its batch to the bit, the learner as it stood before it, and the step itself.

Invariant: with the recorded settings and as many threads, loss and weights are equal to the recorded ones to the bit;
every step on the way to the one that is asked for is checked against the digest of its batch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import torch

from kat_stream.config import Config
from kat_stream.errors import CheckpointError, DataError
from kat_stream.observe.sources import Source
from kat_stream.policy import model_dir
from kat_stream.replay.groups import groups_of
from kat_stream.replay.history import History
from kat_stream.rl.staleness import Forks
from kat_stream.rl.step import Step, assemble, batch_digest
from kat_stream.training.checkpoint import Checkpoint, checkpoints, load_checkpoint
from kat_stream.training.learner import TorchLearner
from kat_stream.training.settings import learner_config
from topics import PackedBatch, TrainStep, format_version

WINDOW = 16
"""Steps whose groups are in memory at once."""
Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Given:
    """A recorded step and its batch, equal to the bit to what the trainer had."""

    recorded: TrainStep
    step: Step
    groups: Sequence[PackedBatch]
    forks: Forks


@dataclass(frozen=True, slots=True)
class Remade:
    """One step, recorded and made again."""

    given: Given
    base: str
    """What the learner's state was made from: a checkpoint's version, or empty for the model as it ships."""
    made_again: int
    """Steps between the base and this one that were made again on the way."""
    metrics: Metrics
    learner: TorchLearner
    """After the step."""


def rebuild(recorded: TrainStep, groups: Sequence[PackedBatch], forks: Forks, bound: int) -> Step:
    """The batch of a step from its groups. `DataError` if it is not the recorded one."""
    step = assemble(groups, recorded.version, forks, bound)
    digest = batch_digest(step.batch)
    if digest != recorded.batch_sha256:
        raise DataError(
            f"step {recorded.step}: the batch has sha256 {digest[:16]}, recorded is {recorded.batch_sha256[:16]}: "
            "the groups or sampler.staleness are not those of the step"
        )
    return step


async def steps_of(
    source: Source, history: History, steps: Sequence[TrainStep], config: Config
) -> AsyncIterator[Given]:
    """Each recorded step with its batch, in order; some at a time are in memory."""
    forks = history.forks
    for first in range(0, len(steps), WINDOW):
        window = steps[first : first + WINDOW]
        for recorded, groups in zip(window, await groups_of(source, window), strict=True):
            yield Given(recorded, rebuild(recorded, groups, forks, config.sampler.staleness), groups, forks)


def make(learner: TorchLearner, step: Step) -> Metrics:
    """The step as the trainer makes it."""
    if not step.teaches:
        learner.skip_step()
        return {"applied": 0.0}
    return learner.step(step.batch).as_dict()


def base_of(directory: Path, branch: Iterable[TrainStep], before: int) -> Checkpoint | None:
    """The newest checkpoint on the branch with fewer steps than `before`; None means the model as it ships."""
    there = {(step.lineage, step.step) for step in branch if step.step < before}
    found: Checkpoint | None = None
    for path in checkpoints(directory):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError:  # an older one, or none, does as well: more steps are made again
            continue
        if (checkpoint.lineage, checkpoint.step) in there and (found is None or checkpoint.step > found.step):
            found = checkpoint
    return found


def new_learner(config: Config, seed: int, base: Checkpoint | None) -> TorchLearner:
    """A learner at a checkpoint, or with the model as it ships."""
    torch.set_num_threads(config.trainer.threads)
    torch.manual_seed(seed)
    learner = TorchLearner(model_dir(config.policy.model), learner_config(config))
    if base is not None:
        learner.load(base.state)
    return learner


@dataclass(frozen=True, slots=True)
class Configs:
    """The run's own settings, for the steps on the way, and those for the step that is asked for."""

    recorded: Config
    asked: Config

    def changed(self, learner: TorchLearner, seed: int) -> TorchLearner:
        """The learner with the settings that are asked for: the same one if they are the recorded ones."""
        if learner_config(self.asked) == learner.config and self.asked.trainer.threads == self.recorded.trainer.threads:
            return learner
        other = new_learner(self.asked, seed, None)
        other.load(learner.state_dict())
        return other


async def remake(source: Source, history: History, wanted: TrainStep, run_dir: Path, configs: Configs) -> Remade:
    """Step `wanted` made again from the newest checkpoint before it. `DataError` says what is gone."""
    branch = history.branch(wanted)
    base = await anyio.to_thread.run_sync(base_of, run_dir / "checkpoints", branch, wanted.step)
    first = base.step + 1 if base else 1
    learner = await anyio.to_thread.run_sync(new_learner, configs.recorded, wanted.seed, base)
    on_the_way = branch[first - 1 : -1]
    async for given in steps_of(source, history, on_the_way, configs.recorded):
        await anyio.to_thread.run_sync(make, learner, given.step)
    (given,) = [given async for given in steps_of(source, history, [wanted], configs.recorded)]
    learner = await anyio.to_thread.run_sync(configs.changed, learner, wanted.seed)
    metrics = await anyio.to_thread.run_sync(make, learner, given.step)
    return Remade(
        given=given,
        base=format_version(base.lineage, base.step) if base else "",
        made_again=len(on_the_way),
        metrics=metrics,
        learner=learner,
    )
