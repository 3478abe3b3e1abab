"""A gateway is killed in the middle of 32 live agents, or stands still for longer than its sessions: their own retries
go on, no turn is lost, none is doubled."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import aiohttp
import anyio
import openai
import pytest

from kat_stream.config import load
from kat_stream.engines.scripted import ScriptedEngine, start_scripted_engine
from kat_stream.env.scaffolds.relay import relay
from kat_stream.gateway.client import GatewayControl
from kat_stream.gateway.sessions import SessionHandle
from kat_stream.runs import create_run, open_run_log
from kat_stream.service import Context
from tests.contract.gateway_kit import by_bytes, paths, tokenizer, user
from tests.story.conftest import end, start
from tests.waiting import until
from topics import CATALOGUE, Sampling, Turn

pytestmark = [pytest.mark.anyio, pytest.mark.kafka, pytest.mark.timeout(400)]
AGENTS, TURNS, STOOD_STILL = 32, 5, 4
READY_S = 150.0


def _policy(prompt: list[int]) -> list[int]:
    """Replies that differ by what was asked."""
    return by_bytes(f"reply {hash(tuple(prompt)) % 10**8:08d}")


@dataclass
class Run:
    """Gateway processes of one run, and what they stand before."""

    folder: Path
    context: Context
    engine: ScriptedEngine
    http: aiohttp.ClientSession
    processes: ExitStack

    def start(self, member: str) -> subprocess.Popen[bytes]:
        log = self.folder / f"{member}.{time.monotonic_ns()}.log"
        process = start("serve", "gateway", "--run", self.folder, "--member", member, out=log)
        self.processes.callback(end, process)
        return process

    async def engine_does(self, what: str) -> None:
        async with self.http.post(f"{self.engine.url}/{what}", json={"mode": "in_place"}) as done:
            assert done.status == 200

    async def ready(self, number: int) -> None:
        control = GatewayControl(self.context.gateway_control_urls[number], self.http)
        await until(control.healthy, f"gateway {number}", READY_S)


@pytest.fixture
def processes() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@asynccontextmanager
async def _run(bootstrap: str, tmp_path: Path, processes: ExitStack, more: int) -> AsyncIterator[Run]:
    tokenizer().save_pretrained(tmp_path / "policy")
    (tmp_path / "policy" / "config.json").write_text('{"model_type": "qwen2"}')
    engine = await start_scripted_engine(_policy, token_s=0.02)
    settings = {
        "run.directory": f"'{tmp_path}'",
        "log.url": f"'kafka:{bootstrap}'",
        "policy.model": f"'{tmp_path / 'policy'}'",
        "engine.urls": f"['{engine.url}']",
        "gateway.tools": "'none'",
        "gateway.more": str([[0, 0]] * more),
    }
    config, folder = create_run(load(None, [f"{key}={value}" for key, value in settings.items()]))
    log = open_run_log(config, folder)
    await log.start()
    try:
        await log.apply_topics(CATALOGUE)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            context = Context(config=config, run=config.run.name, run_dir=folder, log=log, member="test")
            yield Run(folder, context, engine, http, processes)
    finally:
        await log.close()
        await engine.close()


async def _agent(base_url: str, handle: SessionHandle, heard: list[str]) -> None:
    """As an unmodified agent talks: the official client, with the retries that it makes by itself."""
    async with openai.AsyncOpenAI(
        base_url=f"{base_url}{handle.path}/v1", api_key=handle.key, max_retries=4, timeout=120.0
    ) as client:
        messages: list[dict[str, str]] = [user(f"task {handle.session_id}")]
        for number in range(TURNS):
            answer = await client.chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
            said = answer.choices[0].message.content or ""
            heard.append(said)
            messages += [{"role": "assistant", "content": said}, user(f"go on {number}")]


@pytest.mark.parametrize("more", [1, 0], ids=["another gateway takes over", "the same is started again"])
async def test_agents_go_on_when_their_gateway_is_killed(
    kafka_bootstrap: str, tmp_path: Path, processes: ExitStack, more: int
) -> None:
    async with _run(kafka_bootstrap, tmp_path, processes, more) as run:
        victim = run.start("gateway")
        for number in range(1, more + 1):
            run.start(f"gateway-{number + 1}")
        for number in range(more + 1):
            await run.ready(number)
        first, *others = run.context.gateway_control_urls
        control = GatewayControl(first, run.http, others, patience_s=READY_S)
        handles = [await _open(control, run, number) for number in range(AGENTS)]
        heard: list[list[str]] = [[] for _ in handles]
        door = socket.create_server(("127.0.0.1", 0))
        async with (
            relay(door, *run.context.gateway_urls, most=10 * AGENTS, patience_s=READY_S),
            anyio.create_task_group() as agents,
        ):
            for handle, said in zip(handles, heard, strict=True):
                agents.start_soon(_agent, f"http://127.0.0.1:{door.getsockname()[1]}", handle, said)
            await until(lambda: sum(map(len, heard)) >= AGENTS * 2 and run.engine.in_flight > 0, deadline_s=120.0)
            os.killpg(victim.pid, signal.SIGKILL)
            at_kill = [len(said) for said in heard]
            if not more:
                run.start("gateway")
        assert sum(at_kill) < AGENTS * TURNS
        for handle, said in zip(handles, heard, strict=True):
            _check(await control.close(handle.session_id, deadline_s=30.0), said, run.engine)


async def test_what_a_gateway_writes_after_it_stood_still_does_not_count(
    kafka_bootstrap: str, tmp_path: Path, processes: ExitStack
) -> None:
    async with _run(kafka_bootstrap, tmp_path, processes, 1) as run:
        still = run.start("gateway")
        run.start("gateway-2")
        await run.ready(0)
        await run.ready(1)
        first, second = run.context.gateway_control_urls
        control = GatewayControl(first, run.http)
        heard = {await _open(control, run, number): list[str]() for number in range(STOOD_STILL)}
        for handle, said in heard.items():
            said.append(await _go_on(run, 0, handle, said))
        await run.engine_does("pause_generation")
        async with anyio.create_task_group() as late:
            for handle, said in heard.items():
                late.start_soon(_hears_nothing, run, handle, tuple(said))
            await until(lambda: run.engine.in_flight == STOOD_STILL)
            os.killpg(still.pid, signal.SIGSTOP)
            try:
                # The answers to the gateway that stands still wait for it in its sockets.
                await run.engine_does("continue_generation")
                async with anyio.create_task_group() as agents:
                    for handle, said in heard.items():
                        agents.start_soon(_twice, run, 1, handle, said)
            finally:
                os.killpg(still.pid, signal.SIGCONT)
        # It has to take the sessions back like any other gateway, past what it wrote too late.
        async with anyio.create_task_group() as agents:
            for handle, said in heard.items():
                agents.start_soon(_twice, run, 0, handle, said)
        for handle, said in heard.items():
            _check(await control.close(handle.session_id, deadline_s=30.0), said, run.engine, claims=3)


async def test_what_ended_before_a_gateway_was_killed_stays_ended(
    kafka_bootstrap: str, tmp_path: Path, processes: ExitStack
) -> None:
    """Its agent may have been left over and go on; a session that nobody ever called has ended as well."""
    async with _run(kafka_bootstrap, tmp_path, processes, 0) as run:
        victim = run.start("gateway")
        await run.ready(0)
        control = GatewayControl(run.context.gateway_control_urls[0], run.http)
        spoken, silent, alive = [await _open(control, run, number) for number in range(3)]
        said = [await _go_on(run, 0, spoken, [])]
        for handle in (spoken, silent):
            await control.close(handle.session_id)
        os.killpg(victim.pid, signal.SIGKILL)
        run.start("gateway")
        await run.ready(0)
        for handle in (spoken, silent):
            for _ in range(2):
                with pytest.raises(openai.ConflictError, match="has ended"):
                    await _go_on(run, 0, handle, said)
        await _go_on(run, 0, alive, [])
        assert len(run.engine.requests) == 2


async def _go_on(run: Run, gateway: int, handle: SessionHandle, said: Sequence[str]) -> str:
    """The next reply of a conversation, asked of one gateway once."""
    messages: list[dict[str, str]] = [user(f"task {handle.session_id}")]
    for number, text in enumerate(said):
        messages += [{"role": "assistant", "content": text}, user(f"go on {number}")]
    base_url = f"{run.context.gateway_urls[gateway]}{handle.path}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key=handle.key, max_retries=0, timeout=READY_S) as client:
        answer = await client.chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
    return answer.choices[0].message.content or ""


async def _hears_nothing(run: Run, handle: SessionHandle, said: Sequence[str]) -> None:
    """What was asked of the gateway that stood still is told to ask again: it may no longer answer."""
    with pytest.raises(openai.APIStatusError) as refused:
        await _go_on(run, 0, handle, said)
    assert refused.value.status_code == 503


async def _twice(run: Run, gateway: int, handle: SessionHandle, said: list[str]) -> None:
    for _ in range(2):
        said.append(await _go_on(run, gateway, handle, said))


async def _open(control: GatewayControl, run: Run, number: int) -> SessionHandle:
    return await control.open(
        run=run.context.run, group_id=f"g{number // 8}", rollout_id=f"g{number // 8}s{number % 8}", sampling=Sampling()
    )


def _check(turns: list[Turn], heard: list[str], engine: ScriptedEngine, claims: int = 2) -> None:
    """One unbroken line of turns, each as the engine sampled it and as the agent was told, none twice.

    `claims`: gateways that had the session one after another, at most.
    """
    assert [turn.content for turn in turns] == heard and len(heard) == TURNS
    assert [turn.parent for turn in turns] == ["", *(turn.turn_id for turn in turns[:-1])]
    assert {turn.fork for turn in turns} == {""} and len({turn.turn_id for turn in turns}) == TURNS
    assert [turn.index for turn in turns] == list(range(TURNS))
    asked = {tuple(body.input_ids) for body in engine.requests}
    assert all(tuple(prompt) in asked for prompt, _ in paths(turns).values())
    claimed = [turn.claim for turn in turns]
    assert [claim for claim, _ in groupby(claimed)] == list(dict.fromkeys(claimed))
    assert claimed[0] == "" and len(set(claimed)) <= claims
    assert all(turn.trainable for turn in turns)
