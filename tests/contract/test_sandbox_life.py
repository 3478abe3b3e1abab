"""The contract of every sandbox back end: how it is reached, how it ends, what it refuses, how it is found."""

from __future__ import annotations

import asyncio
import socket
import time

import anyio
import pytest

from kat_stream.env.sandboxes import Mount, Sandbox, SandboxBackend, SandboxSpec, available, get_sandbox
from kat_stream.errors import ConfigError, SandboxDied, SandboxError
from tests.contract.sandbox_kit import backend, kind, own, play
from tests.waiting import until

__all__ = ["kind"]


def test_a_listener_is_reached_from_inside(kind: str) -> None:
    fetch = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode())"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nfrom the gateway")
        await writer.drain()
        writer.close()

    async def scenario(sandbox: Sandbox) -> None:
        listener = await sandbox.listen(8123)
        assert isinstance(listener, socket.socket)
        async with await asyncio.start_server(answer, sock=listener):
            words = ["/usr/bin/python3", "-c", fetch, sandbox.base_url(8123)]
            assert (await sandbox.exec(words, timeout_s=20)).stdout == b"from the gateway\n"
        with pytest.raises(SandboxError, match="cannot listen"):
            await sandbox.listen(8200)
            await sandbox.listen(8200)

    play(kind, scenario, SandboxSpec(network="gateway"))


def test_without_a_network_there_is_no_listener(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        with pytest.raises(SandboxError, match="network"):
            await sandbox.listen()

    play(kind, scenario)


def test_destroy_ends_everything_and_may_be_repeated(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        running = asyncio.ensure_future(sandbox.exec("sleep 984", timeout_s=60))
        daemon = asyncio.ensure_future(sandbox.exec("sleep 984", timeout_s=60))
        await asyncio.sleep(0)
        began = time.monotonic()
        await asyncio.gather(sandbox.destroy(), sandbox.destroy())
        await sandbox.destroy()
        assert time.monotonic() - began < 5
        for task in (running, daemon):
            with pytest.raises(SandboxDied):
                await task
        with pytest.raises(SandboxDied):
            await sandbox.exec("true", timeout_s=10)
        with pytest.raises(SandboxDied):
            await sandbox.put({"x": (b"", 0o644)}, "/work")

    play(kind, scenario, SandboxSpec(network="gateway"))


def test_a_destruction_whose_caller_is_cancelled_goes_on(kind: str) -> None:
    long = own("sleep 983")

    async def main() -> None:
        async with backend(kind) as made:
            sandbox = await made.create(SandboxSpec())
            running = asyncio.ensure_future(sandbox.exec(f"trap '' TERM; {long}; {long}", timeout_s=60))
            await asyncio.sleep(0)
            with anyio.CancelScope() as scope:
                scope.cancel()
                await sandbox.destroy()
            with pytest.raises(SandboxDied):
                await running

            async def directory_gone() -> bool:
                return not sandbox.root or not await anyio.Path(sandbox.root).exists()

            await until(directory_gone, "the end of its directory", 10.0)
            async with await made.create(SandboxSpec()) as other:
                listing = await other.exec("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '", timeout_s=10)
            assert long.encode() not in listing.stdout

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_sandbox_that_never_ends_is_ended(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        began = time.monotonic()
        with pytest.raises(SandboxDied, match="wall time"):
            await sandbox.exec("sleep 983", timeout_s=60)
        assert time.monotonic() - began < 10
        with pytest.raises(SandboxDied, match="wall time"):
            await sandbox.exec("true", timeout_s=60)

    play(kind, scenario, SandboxSpec(wall_s=0.5))


def test_many_at_once(kind: str) -> None:
    async def one(made: SandboxBackend, n: int) -> bytes:
        async with await made.create(SandboxSpec(), owner=f"test-{n}") as sandbox:
            await sandbox.put({"n": (str(n).encode(), 0o644)}, "/work")
            return (await sandbox.exec("ls | wc -l; cat n", timeout_s=30)).stdout

    async def main() -> None:
        async with backend(kind) as made:
            results = await asyncio.gather(*(one(made, n) for n in range(12)))
            assert results == [f"1\n{n}".encode() for n in range(12)]

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_mb": 0}, "memory_mb"),
        ({"wall_s": -1.0}, "wall_s"),
        ({"network": "internet"}, "network"),
        ({"workdir": "work"}, "absolute"),
        ({"writable": ("/a/../../b",)}, "absolute"),
        ({"env": {"A-B": "x"}}, "A-B"),
        ({"mounts": (Mount("relative", "/x"),)}, "relative"),
    ],
)
def test_a_wrong_spec_names_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SandboxSpec(**change)  # type: ignore[arg-type]


def test_wrong_commands_are_refused(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        for wrong in ("echo \0", [], ["echo", "\0"]):
            with pytest.raises(ConfigError):
                await sandbox.exec(wrong, timeout_s=10)
        with pytest.raises(ConfigError, match="1A"):
            await sandbox.exec("true", timeout_s=10, env={"1A": ""})
        assert (await sandbox.exec("echo on", timeout_s=10)).stdout == b"on\n"

    play(kind, scenario)


def test_every_limit_is_described(kind: str) -> None:
    async def main() -> None:
        async with backend(kind) as made:
            assert {"memory_mb", "pids", "cpus", "disk_mb", "wall_s", "network"} <= set(made.describe())

    asyncio.run(main())


def test_back_ends_are_found_by_name() -> None:
    assert {"bwrap", "local"} <= set(available())
    with pytest.raises(ConfigError, match="allow_unsafe"):
        get_sandbox("local")
    assert get_sandbox("local", allow_unsafe=True).name == "local"
    with pytest.raises(ConfigError, match=r"bwrap.*local"):
        get_sandbox("no-such")
