"""The trainer service with the Megatron learner: a packed batch in, a step and weights that anybody can load out."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from consumers.trainer import Trainer
from kat_stream.config import load
from kat_stream.log.memory import MemoryLog
from kat_stream.rl.group import GroupRules, pack_group
from kat_stream.rl.step import assemble
from kat_stream.service import Context
from kat_stream.training.learner import TorchLearner
from kat_stream.training.megatron.ranks import MegatronLeader
from kat_stream.training.publication import weights_checksum
from kat_stream.training.settings import learner_config
from tests.unit.records import RUN, request, reward, trajectory, turn
from topics import CATALOGUE, PackedBatch, PolicyVersion, TrainStep

WAIT_S = 500.0
PROMPT, SAMPLED = [1, 2, 3], ([5, 6], [4, 2, 1])


def packed(version: str) -> PackedBatch:
    group = f"{RUN}-t000000"
    pairs = []
    for sample, sampled in enumerate(SAMPLED):
        asked = request(group, sample)
        made = turn(asked, PROMPT, sampled, version=version)
        pairs.append((trajectory(asked, made), reward(asked, float(sample))))
    return pack_group(pairs, version, {}, GroupRules(staleness=2, budget_tokens=256))


@pytest.mark.anyio
@pytest.mark.timeout(600)
async def test_one_step_of_the_service(models: Path, tmp_path: Path) -> None:
    log = MemoryLog()
    await log.apply_topics(CATALOGUE)
    chosen = (
        'trainer.learner="megatron"', f'policy.model="{models / "tied"}"', "run.steps=1",
        "sampler.groups_per_step=1", "trainer.warmup_steps=1", "trainer.checkpoint_every=1",
    )  # fmt: skip
    ctx = Context(load(None, chosen), RUN, tmp_path / "run", log, "trainer")
    service = Trainer()
    versions: list[PolicyVersion] = []
    steps: list[TrainStep] = []
    with anyio.fail_after(WAIT_S):
        async with anyio.create_task_group() as tasks, log.follow(("policy.versions", "train.steps")) as follower:
            tasks.start_soon(service.run, ctx)
            while len(versions) < 2 or not steps:
                for delivered in await follower.poll(1.0):
                    record = delivered.record()
                    if isinstance(record, TrainStep):
                        steps.append(record)
                    elif isinstance(record, PolicyVersion):
                        versions.append(record)
                        if len(versions) == 1:
                            assert isinstance(service.learner, MegatronLeader)
                            await log.publish(packed(record.version))
            step = assemble([packed(versions[0].version)], versions[0].version, {}, 2)
            alive = service.learner.logprobs(step.batch)
            ctx.stopping.set()
    assert len(steps[0].trained) == 2 and steps[0].metrics["applied"] == 1.0
    assert weights_checksum(Path(versions[1].path)) == versions[1].checksum

    before, after = (TorchLearner(Path(version.path), learner_config(ctx.config)) for version in versions)
    assert abs(after.logprobs(step.batch) - alive).max() < 1e-5, "as published, so in the learner"
    assert abs(after.logprobs(step.batch) - before.logprobs(step.batch)).max() > 1e-3
    before.step(step.batch)
    assert abs(after.logprobs(step.batch) - before.logprobs(step.batch)).max() < 1e-4, "the torch learner's step"
