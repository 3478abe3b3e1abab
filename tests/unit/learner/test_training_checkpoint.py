"""Checkpoints: resumed to the bit, never half there, never somebody else's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kat_stream.curriculum import Groups
from kat_stream.errors import CheckpointError, FencedError
from kat_stream.telemetry import DAMAGED_CHECKPOINTS
from kat_stream.training.checkpoint import (
    Checkpoint,
    CheckpointStore,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
)
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.publication import atomic_directory
from kat_stream.trees import TrainBatch

Build = Callable[..., Any]
CONFIG = LearnerConfig(learning_rate=1e-3, warmup_steps=3)


@pytest.fixture
def batch(grow: Build, batch_of: Build) -> TrainBatch:
    rng = np.random.default_rng(3)
    made: TrainBatch = batch_of(grow(rng, 16), rng)
    return made


def of(learner: TorchLearner, lineage: str = "a") -> Checkpoint:
    return Checkpoint(
        state=learner.state_dict(),
        lineage=lineage,
        positions={"0": 7, "3": 12},
        manifest=("r1", "r2"),
        groups=Groups(3, (5,)),
    )


def save(directory: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """As a lineage that saves once."""
    store = CheckpointStore(directory, checkpoint.lineage)
    store.open()
    return store.save(checkpoint, keep=keep)


def test_a_resumed_learner_goes_on_to_the_bit(model_dir: Path, batch: TrainBatch, tmp_path: Path) -> None:
    learner = TorchLearner(model_dir, CONFIG)
    learner.step(batch)
    learner.step(batch)
    save(tmp_path, of(learner), keep=2)
    ahead = [learner.step(batch) for _ in range(2)]

    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.lineage) == (2, "a")
    assert checkpoint.positions == {"0": 7, "3": 12}
    assert (checkpoint.manifest, checkpoint.groups) == (("r1", "r2"), Groups(3, (5,)))
    resumed = TorchLearner(model_dir, CONFIG)
    resumed.load(checkpoint.state)
    again = [resumed.step(batch) for _ in range(2)]
    assert [(m.step, m.loss, m.grad_norm, m.learning_rate) for m in again] == [
        (m.step, m.loss, m.grad_norm, m.learning_rate) for m in ahead
    ]
    mine = learner.model.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in resumed.model.state_dict().items())


def test_without_optimizer_state_the_next_step_differs(model_dir: Path, batch: TrainBatch) -> None:
    """The comparison above would notice a checkpoint of weights alone."""
    learner = TorchLearner(model_dir, CONFIG)
    learner.step(batch)
    bare = TorchLearner(model_dir, CONFIG)
    bare.load({**learner.state_dict(), "optimizer": bare.optimizer.state_dict()})
    learner.step(batch)
    bare.step(batch)
    pairs = zip(learner.model.parameters(), bare.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_random_state_is_part_of_it(model_dir: Path, tmp_path: Path) -> None:
    learner = TorchLearner(model_dir, CONFIG)
    torch.manual_seed(5)
    path = save(tmp_path, of(learner), keep=1)
    drawn = torch.rand(3)
    torch.manual_seed(6)
    learner.load(load_checkpoint(path).state)
    assert torch.equal(torch.rand(3), drawn)


def test_only_the_newest_are_kept_by_time_not_by_step(model_dir: Path, tmp_path: Path) -> None:
    learner = TorchLearner(model_dir, CONFIG)
    for step, lineage in ((1, "a"), (9, "a"), (4, "b"), (5, "b")):
        learner.step_count = step
        save(tmp_path, of(learner, lineage), keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000005.b", "step-000004.b", "step-000009.a"]
    assert latest_checkpoint(tmp_path).lineage == "b"  # type: ignore[union-attr]
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_the_newest_is_the_newest_also_after_the_clock_was_set_back(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = TorchLearner(model_dir, CONFIG)
    for step, lineage, clock_s in ((5, "a", 7200), (10, "a", 3600), (12, "b", 60)):
        monkeypatch.setattr("kat_stream.training.checkpoint.time.time_ns", lambda now=clock_s: now * 10**9)
        learner.step_count = step
        save(tmp_path, of(learner, lineage), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000012.b", "step-000010.a"]


def test_what_a_dead_process_left_half_written_is_not_seen_and_is_removed(model_dir: Path, tmp_path: Path) -> None:
    half = tmp_path / ".step-000003.abc"
    half.mkdir(parents=True)
    (half / "state.pt").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    save(tmp_path, of(TorchLearner(model_dir, CONFIG)), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["OWNER", "step-000000.a"]


def test_a_failed_save_leaves_nothing(model_dir: Path, tmp_path: Path) -> None:
    checkpoint = of(TorchLearner(model_dir, CONFIG))
    unwritable = replace(checkpoint, state={**checkpoint.state, "model": lambda: 0})
    with pytest.raises(Exception, match="pickle"):
        save(tmp_path, unwritable, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["OWNER"]


def cut(path: Path) -> None:
    file = path / "state.pt"
    file.write_bytes(file.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(bytes(data))


def rename_format(path: Path) -> None:
    card = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**card, "format": "somebody's checkpoint"}))


def drop_positions(path: Path) -> None:
    card = json.loads((path / "state.json").read_text())
    del card["positions"]
    (path / "state.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "state.pt is not what was written"),
        (flip, "state.pt is not what was written"),
        (rename_format, "not of format 'kat-stream checkpoint 1'"),
        (drop_positions, "missing required field `positions`"),
        (lambda path: (path / "state.json").write_text("{"), "state.json: Input data was truncated"),
        (lambda path: (path / "state.pt").unlink(), "state.pt is missing"),
        (lambda path: (path / "state.json").unlink(), "no checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    model_dir: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    path = save(tmp_path, of(TorchLearner(model_dir, CONFIG)), keep=1)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_the_checkpoint_of_another_model_is_refused(model_dir: Path, llama_dir: Path) -> None:
    learner = TorchLearner(model_dir, CONFIG)
    with pytest.raises(CheckpointError, match="of another model: "):
        learner.load(TorchLearner(llama_dir, CONFIG).state_dict())
    with pytest.raises(CheckpointError, match="float64"):
        learner.load(TorchLearner(model_dir, LearnerConfig(dtype="float64")).state_dict())


def test_a_step_is_saved_once(model_dir: Path, tmp_path: Path) -> None:
    checkpoint = of(TorchLearner(model_dir, CONFIG))
    save(tmp_path, checkpoint, keep=2)
    with pytest.raises(CheckpointError, match="step-000000.a exists"):
        save(tmp_path, checkpoint, keep=2)


def test_a_lineage_that_was_followed_can_neither_save_nor_remove(model_dir: Path, tmp_path: Path) -> None:
    learner = TorchLearner(model_dir, CONFIG)
    zombie, living = CheckpointStore(tmp_path, "a"), CheckpointStore(tmp_path, "b")
    zombie.open()
    zombie.save(of(learner), keep=1)
    living.open()
    learner.step_count = 1
    with pytest.raises(FencedError, match="belongs to lineage b now, this is a"):
        zombie.save(of(learner), keep=1)
    living.save(of(learner, "b"), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001.b", "step-000000.a"]


def test_a_lineage_that_is_followed_while_it_saves_keeps_what_the_next_goes_on_from(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = TorchLearner(model_dir, CONFIG)
    zombie, living = CheckpointStore(tmp_path, "a"), CheckpointStore(tmp_path, "b")
    zombie.open()
    zombie.save(of(learner), keep=1)
    learner.step_count = 1

    @contextmanager
    def followed(target: Path) -> Iterator[Path]:
        with atomic_directory(target) as work:
            yield work
        living.open()

    monkeypatch.setattr("kat_stream.training.checkpoint.atomic_directory", followed)
    with pytest.raises(FencedError, match="belongs to lineage b now, this is a"):
        zombie.save(of(learner), keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001.a", "step-000000.a"]


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(model_dir: Path, tmp_path: Path) -> None:
    learner = TorchLearner(model_dir, CONFIG)
    store = CheckpointStore(tmp_path, "a")
    store.open()
    paths = []
    for step in (1, 2):
        learner.step_count = step
        paths.append(store.save(of(learner), keep=2))
    counted = DAMAGED_CHECKPOINTS._value.get()
    flip(paths[1])
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert DAMAGED_CHECKPOINTS._value.get() == counted + 1
    drop_positions(paths[0])
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        latest_checkpoint(tmp_path)


def test_what_lies_on_an_abandoned_branch_is_not_gone_on_with(model_dir: Path, tmp_path: Path) -> None:
    learner = TorchLearner(model_dir, CONFIG)
    for step, lineage in ((3, "b"), (9, "a")):
        learner.step_count = step
        save(tmp_path, of(learner, lineage), keep=5)
    found = latest_checkpoint(tmp_path, lambda lineage, _step: lineage == "b")
    assert found is not None
    assert (found.lineage, found.step) == ("b", 3)
