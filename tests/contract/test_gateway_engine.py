"""The gateway in front of the embedded engine with the policy that ships: real sampling, weight updates in mid-turn."""

from __future__ import annotations

import aiohttp
import anyio
import pytest

from kat_stream.config import GatewaySection
from kat_stream.engines.embedded import start_engine
from kat_stream.gateway.app import GatewayControl, start_gateway
from kat_stream.log.memory import MemoryLog
from kat_stream.policy import DEMO, load_tokenizer
from kat_stream.routing import Router
from tests.contract.gateway_kit import paths
from tests.waiting import until
from topics import Sampling, Turn, topic_named
from topics.record import floats

pytestmark = pytest.mark.anyio


async def test_conversations_stay_exact_over_weight_updates() -> None:
    engine = await start_engine(DEMO, model_name="policy", max_total_tokens=8192, max_running=16, threads=1)
    log = MemoryLog()
    await log.start()
    await log.apply_topics([topic_named("turns")])
    try:
        async with Router([engine.url]) as router, aiohttp.ClientSession() as http:
            server = await start_gateway(
                tokenizer=load_tokenizer("demo"), log=log, router=router, config=GatewaySection(), model_name="policy"
            )
            control = GatewayControl(server.control_url, http)
            client = router.list()[0].engine
            collected: list[list[Turn]] = []
            replies: list[str] = []

            async def agent(number: int) -> None:
                sampling = Sampling(max_new_tokens=24, max_context=512)
                handle = await control.open(run="r", group_id="g", rollout_id=f"s{number}", sampling=sampling)
                messages = [{"role": "system", "content": "Mend the repository."}, {"role": "user", "content": "Look."}]
                url, headers = server.data_url + handle.path, {"Authorization": f"Bearer {handle.key}"}
                for _ in range(4):
                    body = {"messages": messages, "stream": False}
                    async with http.post(url + "/v1/chat/completions", json=body, headers=headers) as answer:
                        assert answer.status == 200, await answer.text()
                        said = (await answer.json())["choices"][0]["message"]
                    replies.append(said["content"])
                    messages = [*messages, said, {"role": "user", "content": f"[exit {number}]"}]
                collected.append(await control.close(handle.session_id))

            async with anyio.create_task_group() as group:
                for number in range(8):
                    group.start_soon(agent, number)
                for version in range(1, 4):
                    await until(lambda n=version: len(replies) >= 6 * n, deadline_s=60.0)
                    await client.pause("abort")
                    await client.update_weights(DEMO, f"demo.{version}")
                    await client.resume()
            await server.close()
    finally:
        await engine.close()
        await log.close()
    assert len(collected) == 8
    assert {span.version for turns in collected for turn in turns for span in turn.spans} >= {"default", "demo.3"}
    for turns in collected:
        assert [turn.fork for turn in turns] == ["", "", "", ""]
        assert all(turn.trainable and turn.sampled_ids for turn in turns)
        assert all(max(floats(turn.logprobs)) <= 0 for turn in turns)
        assert len(paths(turns)) == 4
