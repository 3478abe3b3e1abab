"""What the trainer leaves on disk: the weights that somebody may load, and its last step."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from consumers.trainer import Trainer
from kat_stream.config import load
from kat_stream.log import MemoryLog
from kat_stream.rl.group import GroupRules, pack_group
from kat_stream.service import Context
from kat_stream.training.weights import prune, take_over
from tests.unit.records import RUN, request, reward, trajectory, turn
from tests.waiting import until
from topics import CATALOGUE, PackedBatch, PolicyVersion

pytestmark = pytest.mark.anyio
SETTINGS = ["run.steps=1", "sampler.groups_per_step=1", "trainer.checkpoint_every=5", "trainer.keep_weights=2"]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def group(version: str) -> PackedBatch:
    members = []
    for sample in range(2):
        asked = request(sample=sample)
        said = turn(asked, [1, 2, 3], [4 + sample, 6], version=version)
        members.append((trajectory(asked, said), reward(asked, float(sample))))
    return pack_group(members, version, {}, GroupRules(staleness=9, budget_tokens=256))


def test_the_lives_of_a_trainer_leave_no_more_weights_than_are_kept(tmp_path: Path) -> None:
    """Five lives, each killed while it writes its seventh version."""
    newest = ""
    for life in range(5):
        take_over(tmp_path, newest)
        assert names(tmp_path) == ({newest} if newest else set()), "an engine that starts loads the newest"
        for number in range(life, life + 6):
            newest = f"life{life}.{number}"
            (tmp_path / newest).mkdir()
            prune(tmp_path, f"life{life}", 4)
        (tmp_path / f".life{life}.{life + 6}.x1y2_").mkdir()
    assert names(tmp_path) == {"life4.6", "life4.7", "life4.8", "life4.9", ".life4.10.x1y2_"}


def test_weights_of_an_earlier_life_go_first_whatever_their_numbers(tmp_path: Path) -> None:
    for name in ("a.9", "a.10", "b.2", "b.10"):
        (tmp_path / name).mkdir()
    prune(tmp_path, "b", 3)
    assert names(tmp_path) == {"a.10", "b.2", "b.10"}


def test_what_is_no_version_is_not_removed(tmp_path: Path) -> None:
    for name in ("notes", "a.best", ".nfs0001", "a.1"):
        (tmp_path / name).mkdir()
    take_over(tmp_path, "")
    prune(tmp_path, "a", 1)
    assert names(tmp_path) == {"notes", "a.best", ".nfs0001"}


async def test_the_last_step_is_saved_while_the_run_goes_on_and_earlier_weights_are_gone(tmp_path: Path) -> None:
    """It is evaluated after training, and killed then: 1 is no multiple of `checkpoint_every`."""
    weights, saved = tmp_path / "weights", tmp_path / "checkpoints"
    for name in ("old.3", "old.4", ".old.5.x1y2_"):
        (weights / name).mkdir(parents=True)
    log = MemoryLog()
    await log.apply_topics(CATALOGUE)
    await log.publish(PolicyVersion(run=RUN, model="m", lineage="old", number=4, path="", checksum=""))
    ctx = Context(load(None, [f"run.name={RUN}", *SETTINGS]), RUN, tmp_path, log, "trainer")
    trainer = Trainer()
    first, last = f"{trainer.lineage}.0", f"{trainer.lineage}.1"
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(trainer.run, ctx)
        await until(lambda: trainer.announced_step == 0, "the first version")
        await log.publish(group("old.0"))
        await until((saved / f"step-000001.{trainer.lineage}").is_dir, "the checkpoint of the last step")
        assert not ctx.stopping.is_set()
        assert names(weights) == {first, last}
        ctx.stopping.set()
