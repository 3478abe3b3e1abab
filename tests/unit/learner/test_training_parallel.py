"""Two ranks make the step that one makes: same weights, same metrics, nothing half done when a step is stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig

import kat_stream.training.ranks as ranks_module
from kat_stream.errors import OffPolicyError, ServiceDied, StepCancelled
from kat_stream.rl.settings import RatioConfig
from kat_stream.training.dealing import deal
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.parallel import ParallelLearner, open_learner
from kat_stream.training.ranks import Ranks, commands
from kat_stream.trees import TrainBatch

Build = Callable[..., Any]
CONFIG = LearnerConfig(
    ratio=RatioConfig(level="sequence", mask="none"), learning_rate=1e-3, warmup_steps=1, weight_decay=0.5,
    dtype="float64",
)  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with a routing bias that no gradient reaches: weight decay must leave it alone."""
    torch.manual_seed(0)
    config = Ernie4_5_MoeConfig(
        vocab_size=7, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, moe_num_experts=4, moe_k=2, moe_intermediate_size=8, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("e_score_correction_bias"):
                parameter.fill_(0.1)
    directory = tmp_path_factory.mktemp("ernie")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def ranks(model_dir: Path) -> Iterator[ParallelLearner]:
    learner = open_learner(model_dir, CONFIG, ranks=2, threads=1, step_s=120.0)
    assert isinstance(learner, ParallelLearner)
    yield learner
    learner.close()


def steps(grow: Build, batch_of: Build) -> list[TrainBatch]:
    rng = np.random.default_rng(11)
    return [batch_of(grow(rng, count), rng) for count in (40, 1, 25)]


def difference(one: TorchLearner, other: TorchLearner) -> float:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_two_ranks_are_one(ranks: ParallelLearner, model_dir: Path, grow: Build, batch_of: Build) -> None:
    """The second step has one turn: one rank has nothing to run and takes part all the same."""
    alone = TorchLearner(model_dir, CONFIG)
    start = alone.state_dict()
    ranks.load(start)
    for batch in steps(grow, batch_of):
        mine, theirs = alone.step(batch).as_dict(), ranks.step(batch).as_dict()
        for name in mine.keys() - {"seconds", "tokens_per_second", "peak_tokens"}:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-6, abs=1e-9), name
    assert difference(alone, ranks) < 1e-6
    assert difference(TorchLearner(model_dir, CONFIG), ranks) > 1e-4


def test_a_step_that_is_stopped_changes_no_rank(
    ranks: ParallelLearner, model_dir: Path, grow: Build, batch_of: Build
) -> None:
    batch = steps(grow, batch_of)[0]
    alone = TorchLearner(model_dir, CONFIG)
    ranks.load(alone.state_dict())
    with pytest.raises(StepCancelled, match="nothing was changed"):
        ranks.step(batch, lambda: True)
    ranks.skip_step()
    alone.skip_step()
    alone.step(batch)
    ranks.step(batch)
    assert difference(alone, ranks) < 1e-6 and ranks.step_count == alone.step_count == 2


@given(st.lists(st.floats(0.1, 50.0), max_size=30), st.integers(1, 6))
def test_what_is_dealt_is_contiguous_and_no_rank_has_much_more_than_its_share(costs: list[float], count: int) -> None:
    dealt = deal(costs, count)
    assert len(dealt) == len(costs) and (np.diff(dealt) >= 0).all()
    assert dealt.max(initial=0) < count
    loads = [sum(cost for cost, rank in zip(costs, dealt, strict=True) if rank == r) for r in range(count)]
    assert max(loads) <= sum(costs) / count + max(costs, default=0.0) + 1e-6


def test_a_rank_that_is_gone_ends_the_step(ranks: ParallelLearner, grow: Build, batch_of: Build) -> None:
    """Last in this file: the learner cannot go on after it."""
    ranks.others.children[0].kill()
    ranks.others.children[0].join(30)
    with pytest.raises(ServiceDied, match="a rank of the learner is gone"):
        ranks.step(steps(grow, batch_of)[0])
    assert torch.distributed.is_initialized()


def stand_still(pipe: Connection, rank: int, ranks: int, rendezvous: Path, wait_s: float) -> None:
    """A rank that is stopped before it gets here."""


def test_a_rank_that_stands_still_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than its pipe holds: `tell` finds no room, however long it tries."""
    monkeypatch.setattr(ranks_module, "JOIN_S", 0.5)
    others = Ranks(stand_still, 2, threads=1, step_s=0.5)
    (child,) = others.children
    os.kill(child.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ServiceDied, match=r"took nothing for 0\.5 s"):
            others.tell("step", np.zeros(10_000_000, np.int8))
    finally:
        child.kill()
        child.join()


def refuse(pipe: Connection, rank: int, ranks: int, rendezvous: Path, wait_s: float) -> None:
    """A rank whose trees are of another policy."""
    for _ in commands(pipe):
        raise OffPolicyError("a log-ratio is 2 nats")


@pytest.mark.parametrize("noticed_as", [RuntimeError("Connection closed by peer"), ServiceDied("a rank is gone")])
def test_why_a_rank_could_not_go_on_is_what_its_caller_is_told(noticed_as: Exception) -> None:
    others = Ranks(refuse, 2, threads=1, step_s=120.0)
    others.tell("step")
    others.children[0].join(120)
    with pytest.raises(OffPolicyError, match="2 nats"), others.together():
        raise noticed_as
