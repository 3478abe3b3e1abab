"""Routing replay: the engine's experts reach the learner token by token, and its router still learns (I4)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace as changed
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from kat_stream.config import load
from kat_stream.engines.client import EngineClient, Generation, SamplingParams, Span
from kat_stream.engines.embedded import start_engine
from kat_stream.errors import BatchError, ConfigError, EngineUnavailable, TurnError
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.sampling import Sampler
from kat_stream.rl.settings import RatioConfig
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.metrics import Tally
from kat_stream.trees import TrainBatch, from_arrays, make_batch, merge, to_arrays, turns_of
from kat_stream.trees.layout import MISSING
from kat_stream.trees.wire import arrays_of
from tests.unit.records import request, turn
from topics import PackedRow, Turn, decode, encode
from topics.record import pack_floats

Build = Callable[..., Any]
LAYERS, TOP_K, EXPERTS, VOCABULARY = 3, 2, 8, 64
WIDTH = LAYERS * TOP_K
REPLAY = LearnerConfig(ratio=RatioConfig(mask="none"), micro_batch_tokens=4096, routing_replay=True)
Routes = NDArray[np.uint16]


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.3, eos_token_id=None,
        num_experts=EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=16, decoder_sparse_step=1,
        norm_topk_prob=True,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("moe")
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    return directory


async def sample(moe_dir: Path) -> list[Turn]:
    """Two rollouts of three turns, sampled in bfloat16: the second turn goes on from the first, the third forks it."""
    server = await start_engine(
        moe_dir, model_name="m", max_total_tokens=2048, max_running=8, dtype="bfloat16", record_routing=True
    )
    chance = np.random.default_rng(5)
    opening = chance.integers(0, VOCABULARY, 20).tolist()
    turns: list[Turn] = []
    try:
        async with aiohttp.ClientSession() as session:
            engine = EngineClient(server.url, session, record_routing=True)
            for number in range(2):
                first: list[int] = []
                for index, (kept, parent) in enumerate(((0, ""), (None, "0"), (27, "0"))):
                    path = first[:kept] if index else []
                    ids = path + (chance.integers(0, VOCABULARY, 6).tolist() if index else opening)
                    params = SamplingParams(max_new_tokens=20, temperature=1.0, sampling_seed=7 * number + index)
                    begin = max(len(path) - 1, 0)
                    made = await engine.generate(ids, params, rid=f"{number}{index}", routed_from=begin, deadline_s=120)
                    assert len(made.routed_experts) == 2 * WIDTH * (len(ids) + 20 - 1 - begin)
                    first = first or ids + made.output_ids
                    record = turn(request(sample=number), ids[len(path) :], made.output_ids, name=f"{number}-{index}")
                    turns.append(
                        changed(
                            record,
                            parent=f"{number}-{parent}" if parent else "",
                            prefix_len=len(path),
                            logprobs=pack_floats(made.logprobs),
                            routed_experts=made.routed_experts,
                        )
                    )
    finally:
        await server.close()
    return [decode(Turn, encode(record)) for record in turns]


@pytest.fixture(scope="module")
def recorded(moe_dir: Path) -> list[Turn]:
    return asyncio.run(sample(moe_dir))


def batch_of_turns(records: list[Turn]) -> TrainBatch:
    """As it comes over the wire."""
    turns = turns_of(records)
    owner = [int(made.turn_id.partition("-")[0] or 0) for made in turns]
    ones = np.ones(len(turns))
    made = make_batch(
        turns, rollout=owner, advantage=ones - 2.0 * np.array(owner), weight=ones, rollout_ids=["a", "b"],
        budget_tokens=4096,
    )  # fmt: skip
    rows = [PackedRow(**{name: array.tobytes() for name, array in row.items()}) for row in to_arrays(made)]
    return from_arrays([arrays_of(row) for row in rows], ["a", "b"])


def used(learner: TorchLearner, batch: TrainBatch) -> tuple[Routes, NDArray[np.float64]]:
    """uint16[N, W] experts that the learner's layers ran, sorted within a layer, and log-probs of sampled tokens."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        for layer in learner.model.model.layers
    ]
    logprobs = learner.logprobs(batch)
    for hook in hooks:
        hook.remove()
    return in_order(torch.stack(seen, 1).numpy().astype(np.uint16)), logprobs


def in_order(routes: Routes) -> Routes:
    return np.sort(routes.reshape(len(routes), LAYERS, TOP_K), axis=2).reshape(len(routes), WIDTH)


def test_every_recorded_token_goes_where_the_engine_sent_it_and_only_with_replay(
    moe_dir: Path, recorded: list[Turn]
) -> None:
    batch = batch_of_turns(recorded)
    (row,) = batch.rows
    assert row.routes is not None
    known = row.routes[:, 0] != MISSING
    assert known.sum() == len(row) - 4  # the last token of the turns that none went on from never ran in the engine
    wanted = in_order(row.routes)[known]
    plain = replace(REPLAY, routing_replay=False)
    (replayed, with_replay), (own, without) = (used(TorchLearner(moe_dir, c), batch) for c in (REPLAY, plain))
    assert (replayed[known] == wanted).all()
    gap = [float(np.abs(values - batch.logprobs).mean()) for values in (with_replay, without)]
    assert gap[0] <= gap[1]
    print(f"same experts without replay: {(own[known] == wanted).all(1).mean():.3f}; |gap| with, without: {gap}")
    torch.manual_seed(0)
    moved = [TorchLearner(moe_dir, config) for config in (REPLAY, plain)]
    for parameters in zip(*(learner.model.parameters() for learner in moved), strict=True):
        noise = 0.1 * torch.randn_like(parameters[0])
        for parameter in parameters:
            parameter.data += noise
    assert (used(moved[0], batch)[0][known] == wanted).all()
    assert (used(moved[1], batch)[0][known] == wanted).mean() < 1
    metrics = moved[0].step(batch).as_dict()
    assert metrics["routing_replayed"] == pytest.approx(known.mean())
    assert 0 < metrics["routing_agreement"] < 1
    assert "routing_agreement" not in moved[1].step(batch).as_dict()


@pytest.mark.parametrize("budget", [4096, 24])
def test_the_routers_gradient_is_that_of_its_own_gates(
    moe_dir: Path, recorded: list[Turn], float64_norms: Build, budget: int
) -> None:
    """Against finite differences in float64; in one part, and in parts with gateways."""
    batch = batch_of_turns(recorded[:3])
    learner = TorchLearner(moe_dir, replace(REPLAY, loss="sft", dtype="float64", micro_batch_tokens=budget))
    float64_norms(learner.model)
    (share,) = learner._shares(batch)
    learner._gradients(share, Tally(), lambda: False)
    rng = np.random.default_rng(1)
    for layer in learner.model.model.layers:
        weight = layer.mlp.gate.weight
        flat, found = weight.data.view(-1), weight.grad.view(-1)
        assert found.abs().max() > 1e-4
        at = int(found.abs().argmax()) if rng.random() < 0.5 else int(rng.integers(len(flat)))
        values = []
        for step in (1e-6, -1e-6):
            kept = flat[at].clone()
            flat[at] += step
            values.append(-float(learner.logprobs(batch).mean()))
            flat[at] = kept
        assert float(found[at]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-9)


def routed(record: Turn, rows: int, first: int) -> Turn:
    """Row i of the record holds first + i in every column."""
    data = np.repeat(np.arange(first, first + rows, dtype="<u2")[:, None], 2, axis=1)
    return changed(record, routed_experts=data.tobytes())


def test_a_shared_token_takes_the_routing_of_the_turn_that_sampled_it() -> None:
    """b was prefilled with what a sampled; c is of another session: it sampled first what a was prefilled with."""
    a = routed(turn(request(), [1, 2, 3, 4], [5, 6], name="a"), 5, 100)
    b = changed(turn(request(), [7], [8], name="b"), parent="a", prefix_len=6)
    b = routed(b, 2, 200)
    side = changed(turn(request(), [9], [9], name="s"), parent="b", prefix_len=8, trainable=False)
    d = routed(changed(turn(request(), [3], [2], name="d"), parent="s", prefix_len=10), 2, 400)
    c = routed(turn(request(sample=1), [1, 2], [3, 4], name="c"), 3, 300)
    made = make_batch(
        turns_of([a, b, side, d, c]), rollout=[0] * 5, advantage=np.ones(5), weight=np.ones(5), rollout_ids=["r"],
        budget_tokens=99,
    )  # fmt: skip
    (row,) = made.rows
    assert row.routes is not None
    experts = {tuple(path): int(route) for path, route in zip(paths(row), row.routes[:, 0], strict=True)}
    full = [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 3, 2]
    found = [experts[tuple(full[: n + 1])] for n in range(len(full))]
    # 1, 2: prefilled by a and c, of which c, a prefix of a, comes first in the row; 3: sampled by c; 4: its last.
    assert found[:2] == [300, 301]
    assert found[2:8] == [302, 103, 104, 200, 201, int(MISSING)]
    # The side call recorded nothing: what it ran is not known, but for its last token, which the next call ran.
    assert found[8:] == [int(MISSING), 400, 401, int(MISSING)]
    joined = merge([made, replace(made, rows=tuple(replace(r, routes=None) for r in made.rows))])
    assert [r.routes is None for r in joined.rows] == [False, True]


def paths(row: Any) -> list[list[int]]:
    found: list[list[int]] = []
    for token, parent in zip(row.ids.tolist(), row.parent.tolist(), strict=True):
        found.append([*(found[parent] if parent >= 0 else []), token])
    return found


def test_what_does_not_fit_is_refused(moe_dir: Path, model_dir: Path, recorded: list[Turn]) -> None:
    cut = changed(recorded[0], routed_experts=recorded[0].routed_experts[:-2])
    with pytest.raises(TurnError, match="routed_experts has"):
        turns_of([cut])
    learner = TorchLearner(moe_dir, REPLAY)
    batch = batch_of_turns(recorded)
    (row,) = batch.rows
    assert row.routes is not None
    with pytest.raises(BatchError, match="4 wide, the model's 6"):
        learner.step(replace(batch, rows=(replace(row, routes=row.routes[:, :4]),)))
    with pytest.raises(BatchError, match="an expert that is none of 8"):
        learner.step(replace(batch, rows=(replace(row, routes=row.routes + np.uint16(EXPERTS)),)))
    partly = row.routes.copy()
    partly[0, -TOP_K:] = MISSING
    with pytest.raises(BatchError, match="routed in some layers and not in others"):
        learner.step(replace(batch, rows=(replace(row, routes=partly),)))
    with pytest.raises(BatchError, match="routed_experts has"):
        empty = dict.fromkeys(PackedRow.__struct_fields__, b"")
        arrays_of(PackedRow(**empty | {"ids": b"1234", "routed_experts": b"1"}))
    with pytest.raises(ConfigError, match="no routers"):
        TorchLearner(model_dir, REPLAY)
    with pytest.raises(ConfigError, match="routing_replay needs engine.record_routing"):
        load(None, ["trainer.routing_replay=true"])


def test_routers_that_take_more_than_hidden_states_are_refused(tmp_path: Path) -> None:
    config = MiniMaxM2Config(
        vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    MiniMaxM2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not know how MiniMaxM2TopKRouter weighs"):
        TorchLearner(tmp_path, REPLAY)


def test_without_replay_it_does_not_matter_what_engines_recorded(moe_dir: Path, recorded: list[Turn]) -> None:
    """Groups of two engines of other models in one step, routed in other widths."""
    one = batch_of_turns(recorded)
    rows = tuple(replace(row, routes=row.routes[:, :4]) for row in one.rows if row.routes is not None)
    config = replace(REPLAY, routing_replay=False)
    bare = replace(one, rows=tuple(replace(row, routes=None) for row in one.rows))
    metrics = TorchLearner(moe_dir, config).step(merge([one, replace(one, rows=rows)]))
    assert metrics.loss == TorchLearner(moe_dir, config).step(merge([bare, bare])).loss


class Engine:
    """Routes the token at position p to expert p; breaks off and aborts as told. One row a token, width 1."""

    base_url = "http://engine"

    def __init__(self, *parts: int) -> None:
        self.parts = list(parts)
        """Tokens of each answer; negative: it is aborted after so many; 0: it breaks off."""

    async def generate(self, asked: msgspec.Raw, sampling: SamplingParams, *, routed_from: int, **_: Any) -> Generation:
        ids, count = msgspec.json.decode(asked), self.parts.pop(0)
        if not count:
            raise EngineUnavailable("broken off")
        rows = np.arange(routed_from, len(ids) + abs(count) - 1, dtype="<u2")
        return Generation(
            output_ids=[9] * abs(count), logprobs=[-1.0] * abs(count), finish_reason="stop" if count > 0 else "abort",
            matched=None, cached_tokens=0, prompt_tokens=len(ids), spans=[Span("a.1", 0, abs(count))], seconds=0.0,
            routed_experts=rows.tobytes(),
        )  # fmt: skip


class Fleet:
    def __init__(self, engine: Engine) -> None:
        self.state = SimpleNamespace(engine=engine, url=engine.base_url)

    @asynccontextmanager
    async def lease(self, session: str, tokens: int, *, deadline_s: float) -> AsyncIterator[Any]:
        yield self.state


@pytest.mark.parametrize("parts", [(5,), (-2, 3), (0, -1, 0, -3, 1)])
def test_a_turn_that_several_engines_sampled_has_one_row_a_token(parts: tuple[int, ...]) -> None:
    fleet: Any = Fleet(Engine(*parts))
    sampler = Sampler(
        router=fleet, limits=Limits(), session="s", call_id="c", prompt=b"1,2,3,4", prompt_tokens=4,
        sampling=SamplingParams(), budget=5, stream=False, grown=lambda: None, routed_from=2,
        decode=str,
    )  # fmt: skip
    draft = asyncio.run(sampler.run())
    assert np.frombuffer(draft.routing(4 + 5 - 1 - 2), "<u2").tolist() == [2, 3, 4, 5, 6, 7]
    assert draft.routing(5) == b"", "a row is missing or too many: nothing is recorded"


def test_published_experts_have_the_names_of_the_model_s_own_files(moe_dir: Path, tmp_path: Path) -> None:
    """Engines read each expert apart; transformers 5 holds a layer's experts as one tensor in memory."""
    TorchLearner(moe_dir, LearnerConfig()).publish(tmp_path / "again")
    original, published = (load_file(path / "model.safetensors") for path in (moe_dir, tmp_path / "again"))
    assert sum(".experts." in name for name in original) == LAYERS * EXPERTS * 3
    assert published.keys() == original.keys()
    assert all(torch.equal(published[name], value) for name, value in original.items())
