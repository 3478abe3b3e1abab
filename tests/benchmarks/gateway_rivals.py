"""Proxies that the gateway is measured against, each a process of its own before the same engine.

Owns their environments (made once, below `--envs`), their start and their end. LiteLLM proxy and SGLang's router pass
chat completions on; neither renders a template, knows a session, records ids or samples them: less work than ours.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import aiohttp
from aiohttp import web

START_S = 240.0
PACKAGES = {"litellm": "litellm[proxy]==1.100.0", "smg": "smg==1.13.0"}
"""smg is the router that was sglang-router."""
_LITELLM = """model_list:
  - model_name: m
    litellm_params: {{model: openai/m, api_base: "{engine}/v1", api_key: none}}
litellm_settings: {{telemetry: false, num_retries: 0}}
"""


@dataclass(frozen=True)
class Proxy:
    """Where agents call; `control_url` only of ours, `pid` 0 if there is nothing between agent and engine."""

    url: str
    pid: int = 0
    control_url: str = ""


@contextmanager
def running(name: str, engine_url: str, envs: Path) -> Iterator[Proxy]:
    """The proxy of that name until the block ends; `direct` is none."""
    if name == "direct":
        yield Proxy(engine_url)
    elif name in ("kat-stream", "bare"):
        with _own_process(_serve if name == "kat-stream" else _pass_on, engine_url) as proxy:
            yield proxy
    else:
        with _theirs(name, engine_url, envs) as proxy:
            yield proxy


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process and its living children have used."""
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(map(cpu_s, _children(pid)))


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def _own_process(serve: Callable[[Connection, str], None], engine_url: str) -> Iterator[Proxy]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, engine_url))
    process.start()
    data_url, control_url = ours.recv()
    try:
        yield Proxy(data_url, process.pid or 0, control_url)
    finally:
        ours.send("end")
        process.join()


def _serve(pipe: Connection, engine_url: str) -> None:
    # Only this process needs them: the others start faster.
    from kat_stream.config import GatewaySection
    from kat_stream.gateway.app import start_gateway
    from kat_stream.log.memory import MemoryLog
    from kat_stream.routing import Router
    from producers.gateway import settle
    from tests.contract.gateway_kit import tokenizer
    from topics import topic_named

    async def serve() -> None:
        log = MemoryLog(retain_bytes=8 << 20)  # what a session costs the gateway, not what the log keeps
        await log.start()
        await log.apply_topics([topic_named("turns")])
        async with Router([engine_url]) as router:
            section = GatewaySection(tools="none")
            server = await start_gateway(
                tokenizer=tokenizer(), log=log, router=router, config=section, model_name="policy"
            )
            settle()
            pipe.send((server.data_url, server.control_url))
            await asyncio.to_thread(pipe.recv)
            await server.close()
        await log.close()

    asyncio.run(serve())


def _pass_on(pipe: Connection, engine_url: str) -> None:
    """Reads each request and sends it on, with the gateway's HTTP library and nothing else."""

    async def serve() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

            async def handle(request: web.BaseRequest) -> web.StreamResponse:
                body = await request.content.read()
                async with http.post(engine_url + request.path, data=body) as answer:
                    return web.Response(body=await answer.read(), content_type=answer.content_type)

            runner = web.ServerRunner(web.Server(handle, access_log=None))
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            pipe.send((f"http://127.0.0.1:{runner.addresses[0][1]}", ""))
            await asyncio.to_thread(pipe.recv)
            await runner.cleanup()

    asyncio.run(serve())


@contextmanager
def _theirs(name: str, engine_url: str, envs: Path) -> Iterator[Proxy]:
    env = _environment(name, envs)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    if name == "litellm":
        config = env / f"{port}.yaml"
        config.write_text(_LITELLM.format(engine=engine_url))
        command = ["litellm", "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    else:
        command = ["smg", "launch", "--host", "127.0.0.1", "--port", str(port), "--worker-urls", engine_url]
        command += ["--log-level", "warn"]
    variables = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PATH": f"{env / 'bin'}:{os.environ['PATH']}"}
    with (env / f"{port}.log").open("wb") as out:
        process = subprocess.Popen(
            [str(env / "bin" / command[0]), *command[1:]], env=variables, stdout=out, stderr=out, start_new_session=True
        )
    try:
        _wait_for(f"{url}/health/liveliness" if name == "litellm" else f"{url}/health", process)
        yield Proxy(url, process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(name: str, envs: Path) -> Path:
    """A virtual environment with the rival in it; made at its first use."""
    env = envs / name
    if not env.exists():
        uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, env], check=True)
        subprocess.run([uv, "pip", "install", "-q", "--python", env / "bin" / "python", PACKAGES[name]], check=True)
    return env


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5.0).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > give_up:
                raise
            time.sleep(0.2)
