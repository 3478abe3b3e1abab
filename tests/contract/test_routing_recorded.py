"""Routed experts from the engine through the gateway and its records to the learner, with calls that broke off."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
import anyio
import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from kat_stream.config import GatewaySection
from kat_stream.engines.embedded import start_engine
from kat_stream.gateway.app import GatewayControl, start_gateway
from kat_stream.log.memory import MemoryLog
from kat_stream.policy import load_tokenizer
from kat_stream.routing import Router
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.trees import make_batch, turns_of
from kat_stream.trees.layout import MISSING
from tests.waiting import until
from topics import Sampling, Turn, topic_named

pytestmark = pytest.mark.anyio


def save_model(directory: Path, vocabulary: int) -> Path:
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.2, eos_token_id=None,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    return directory


async def test_every_token_of_a_session_has_the_experts_that_ran_it(tmp_path: Path) -> None:
    """In float32 with one set of weights the learner would choose the same experts, so each row can be checked."""
    tokenizer = load_tokenizer("demo")
    model = save_model(tmp_path / "moe", len(tokenizer))
    engine = await start_engine(model, model_name="policy", max_total_tokens=8192, max_running=8, record_routing=True)
    log = MemoryLog()
    await log.start()
    await log.apply_topics([topic_named("turns")])
    collected: list[Turn] = []
    try:
        async with Router([engine.url], record_routing=True) as router, aiohttp.ClientSession() as http:
            server = await start_gateway(
                tokenizer=tokenizer, log=log, router=router, config=GatewaySection(), model_name="policy"
            )
            control = GatewayControl(server.control_url, http)
            client = router.list()[0].engine
            replies: list[str] = []

            async def agent(number: int) -> None:
                sampling = Sampling(max_new_tokens=32, max_context=400)
                handle = await control.open(run="r", group_id="g", rollout_id=f"s{number}", sampling=sampling)
                messages = [{"role": "system", "content": "Mend the repository."}, {"role": "user", "content": "Look."}]
                url, headers = server.data_url + handle.path, {"Authorization": f"Bearer {handle.key}"}
                for _ in range(3):
                    body = {"messages": messages, "stream": bool(number)}
                    async with http.post(url + "/v1/chat/completions", json=body, headers=headers) as answer:
                        assert answer.status == 200, await answer.text()
                        said = await answer.text()
                    replies.append(said)
                    if not number:  # the other agent forgets what was said, and so forks its session each time
                        messages = [*messages, json.loads(said)["choices"][0]["message"]]
                    messages = [*messages, {"role": "user", "content": f"[exit {number}]"}]
                collected.extend(await control.close(handle.session_id))

            async with anyio.create_task_group() as group:
                for number in range(2):
                    group.start_soon(agent, number)
                for done in (1, 3):
                    await until(lambda n=done: len(replies) >= n, deadline_s=120.0)
                    for mode in ("abort", "retract"):
                        await client.pause(mode)  # type: ignore[arg-type]
                        await client.resume()
            await server.close()
    finally:
        await engine.close()
        await log.close()
    assert len(collected) == 6 and all(turn.routed_experts for turn in collected)
    assert [turn.fork for turn in collected if turn.rollout_id == "s0"] == ["", "", ""]
    turns = turns_of(collected)
    ones = np.ones(len(turns))
    owner = [int(turn.rollout_id == "s1") for turn in collected]
    batch = make_batch(
        turns, rollout=owner, advantage=ones, weight=ones, rollout_ids=["a", "b"], budget_tokens=4096
    )  # fmt: skip
    (row,) = batch.rows
    assert row.routes is not None
    leaves = row.end == np.arange(1, len(row) + 1)
    assert ((row.routes[:, 0] == MISSING) <= leaves).all(), "only the end of a path has not run"
    metrics = TorchLearner(model, LearnerConfig(routing_replay=True)).step(batch).as_dict()
    assert metrics["routing_agreement"] == 1
    assert metrics["routing_replayed"] == pytest.approx((row.routes[:, 0] != MISSING).mean())
    assert metrics["log_ratio_abs"] < 1e-4
