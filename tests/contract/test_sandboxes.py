"""The contract of every sandbox back end: the same tests over bubblewrap and local.

Owns the promises of kat_stream/env/sandboxes/base.py. bubblewrap is skipped only where it is not installed.
"""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import socket
import subprocess
import tarfile
import threading
import time
from collections import UserDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import anyio
import pytest

from kat_stream.env.sandboxes import Mount, Sandbox, SandboxBackend, SandboxSpec, available, get_sandbox
from kat_stream.env.sandboxes.bwrap import BwrapBackend
from kat_stream.env.sandboxes.local import LocalBackend
from kat_stream.errors import ConfigError, DeadlineExceeded, SandboxDied, SandboxError

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
BACKENDS = [pytest.param("bwrap", marks=needs_bwrap), "local"]
Scenario = Callable[[Sandbox], Awaitable[None]]


@asynccontextmanager
async def backend(name: str) -> AsyncIterator[SandboxBackend]:
    made: SandboxBackend = BwrapBackend() if name == "bwrap" else LocalBackend(allow_unsafe=True)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture(params=BACKENDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def play(kind: str, scenario: Scenario, spec: SandboxSpec | None = None) -> None:
    async def main() -> None:
        async with backend(kind) as made, await made.create(spec or SandboxSpec()) as sandbox:
            await scenario(sandbox)

    asyncio.run(asyncio.wait_for(main(), 60))


async def until(probe: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not await probe():
        assert time.monotonic() < end, "did not come true in time"
        await asyncio.sleep(0.02)


def test_a_command_gives_output_errors_and_exit_code(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        result = await sandbox.exec("echo out; echo err >&2; exit 7", timeout_s=10)
        assert (result.exit_code, result.stdout, result.stderr) == (7, b"out\n", b"err\n")
        assert not result.timed_out and not result.truncated and 0 < result.seconds < 10

    play(kind, scenario)


def test_a_list_is_run_without_a_shell(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        words = ["printf", "%s|", "a b", "$HOME", "'", "", "ä\n"]
        result = await sandbox.exec(words, timeout_s=10)
        assert result.stdout.decode() == "a b|$HOME|'||ä\n|"

    play(kind, scenario)


def test_a_command_starts_in_the_workdir(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        result = await sandbox.exec("pwd; cd /; pwd", timeout_s=10)
        assert result.stdout.decode() == f"{sandbox.root}/srv/code\n/\n"
        assert (await sandbox.exec("pwd", timeout_s=10)).stdout.decode() == f"{sandbox.root}/srv/code\n"

    play(kind, scenario, SandboxSpec(workdir="/srv/code"))


PLACES = ["/usr/src/app", "/usr/src", "/usr/local/app", "/usr/local", "/usr/app/src", "/logs/x", "/home"]


@pytest.mark.parametrize("place", PLACES)
def test_a_workdir_may_be_anywhere_beside_the_system(kind: str, place: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.put({"f": (b"here\n", 0o644)}, place)
        result = await sandbox.exec("cat f && echo > g && python3 -c 'print(1)'", timeout_s=10)
        assert result.stdout == b"here\n1\n"
        if kind == "bwrap":
            assert (await sandbox.exec("touch /usr/x /usr/local/bin/x", timeout_s=10)).exit_code != 0
        await sandbox.put({"f": (b"log\n", 0o644)}, "/logs")
        assert await sandbox.read_file(f"{place}/f", 100) == b"here\n"

    play(kind, scenario, SandboxSpec(workdir=place, writable=("/logs",)))


def test_the_environment_holds_what_was_given_and_nothing_of_ours(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_WORKER", "s3cret")

    async def scenario(sandbox: Sandbox) -> None:
        result = await sandbox.exec('env; echo "$A-$B"', timeout_s=10, env={"B": "it's\nhere"})
        assert b"s3cret" not in result.stdout
        assert result.stdout.endswith(b"of the spec-it's\nhere\n")
        assert (await sandbox.exec("echo $B", timeout_s=10)).stdout == b"\n"

    play(kind, scenario, SandboxSpec(env={"A": "of the spec"}))


@pytest.mark.parametrize("size", [0, 5, 70_000, 3_000_000])
def test_standard_input_is_given_whole_and_ends(kind: str, size: int) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        result = await sandbox.exec("wc -c", timeout_s=10, stdin=b"\0" * size)
        assert int(result.stdout) == size

    play(kind, scenario)


def test_standard_input_that_nobody_reads_is_no_problem(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        assert (await sandbox.exec("true", timeout_s=10, stdin=b"x" * 1_000_000)).exit_code == 0

    play(kind, scenario)


def test_merged_errors_keep_their_order(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        result = await sandbox.exec("echo 1; echo 2 >&2; echo 3", timeout_s=10, merge_stderr=True)
        assert (result.stdout, result.stderr) == (b"1\n2\n3\n", b"")

    play(kind, scenario)


def test_output_is_bytes(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        result = await sandbox.exec(["printf", r"\377\000\n\001"], timeout_s=10)
        assert result.stdout == b"\xff\x00\n\x01"

    play(kind, scenario)


def test_large_output_arrives_whole(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        result = await sandbox.exec("head -c 8000000 /dev/zero", timeout_s=30, output_limit=8_000_000)
        assert (len(result.stdout), result.truncated) == (8_000_000, False)

    play(kind, scenario)


@pytest.mark.parametrize(("count", "limit"), [(3000, 1001), (200, 1000), (3_000_000, 1000), (3_000_000, 2_000_000)])
def test_of_an_output_above_the_limit_both_ends_stay_and_the_command_goes_on(kind: str, count: int, limit: int) -> None:
    whole = subprocess.check_output(["seq", str(count)])

    async def scenario(sandbox: Sandbox) -> None:
        result = await sandbox.exec(f"seq {count}; echo end >&2", timeout_s=30, output_limit=limit)
        assert (result.exit_code, result.stderr) == (0, b"end\n")
        left_out = len(whole) - limit
        assert result.truncated == (left_out > 0)
        if left_out > 0:
            said = b"\n[%d bytes left out]\n" % left_out
            assert result.stdout == whole[: limit // 2] + said + whole[limit // 2 - limit :]

    play(kind, scenario)


def test_endless_output_ends_at_the_timeout(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        result = await sandbox.exec("yes", timeout_s=0.5, output_limit=1000)
        assert (result.timed_out, result.truncated, result.stdout.count(b"y")) == (True, True, 501)
        assert (await sandbox.exec("echo on", timeout_s=10)).stdout == b"on\n"

    play(kind, scenario)


@pytest.mark.parametrize("length", [10_000, 60_000, 200_000, 1_500_000])
def test_a_command_may_be_long(kind: str, length: int) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        script = f"cat > f <<'EOF'\n{'x' * length}\nEOF\nwc -c < f"
        assert int((await sandbox.exec(script, timeout_s=10)).stdout) == length + 1

    play(kind, scenario)


def test_many_arguments(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        words = ["/bin/sh", "-c", "echo $#", "sh", *(["word"] * 20_000)]
        assert (await sandbox.exec(words, timeout_s=10)).stdout == b"20000\n"

    play(kind, scenario)


def test_a_missing_program_and_a_signal_are_exit_codes(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        missing = await sandbox.exec(["no-such-program"], timeout_s=10)
        assert missing.exit_code == 127 and b"not found" in missing.stderr
        assert (await sandbox.exec("kill -9 $$", timeout_s=10)).exit_code == 137

    play(kind, scenario)


def own(command: str) -> str:
    """A sleep of this process: `local` sees all of the machine, also those of this test run by another user."""
    return f"{command}.{os.getpid()}"


def test_a_timeout_kills_the_whole_tree_and_nothing_else(kind: str) -> None:
    kept, ended = own("sleep 987"), own("sleep 986")

    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.exec(f"{kept} >/dev/null 2>&1 &", timeout_s=10)
        began = time.monotonic()
        hang = f"setsid sh -c '{ended} & {ended}' & ({ended} & {ended}) & echo begun; wait"
        result = await sandbox.exec(hang, timeout_s=0.5)
        assert (result.timed_out, result.exit_code, result.stdout) == (True, 124, b"begun\n")
        assert time.monotonic() - began < 5
        listing = "grep -azl . /proc/[0-9]*/cmdline >/dev/null; cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
        alive = (await sandbox.exec(listing, timeout_s=10)).stdout
        assert kept.encode() in alive and ended.encode() not in alive

    play(kind, scenario)


def test_a_daemon_lives_on_and_does_not_disturb_later_output(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        noisy = "sh -c 'n=0; while sleep 0.01; do n=$((n+1)); echo noise; echo $n > beat; done' & echo started"
        began = time.monotonic()
        first = await sandbox.exec(noisy, timeout_s=10)
        assert time.monotonic() - began < 5 and first.stdout.startswith(b"started\n")
        for n in range(20):
            assert (await sandbox.exec(f"echo {n}", timeout_s=10)).stdout == f"{n}\n".encode()

        async def beats() -> bool:
            return int((await sandbox.exec("cat beat || echo 0", timeout_s=10)).stdout or b"0") > 30

        await until(beats)

    play(kind, scenario)


async def cancelled_once(work: Awaitable[object]) -> None:
    async with asyncio.timeout(1.0):
        await work


async def cancelled_again_and_again(work: Awaitable[object]) -> None:
    """A scope of anyio cancels whatever is awaited until it is left, so also what cleans up."""
    with anyio.fail_after(1.0):
        await work


@pytest.mark.parametrize("cancelled", [cancelled_once, cancelled_again_and_again])
def test_a_cancelled_command_is_stopped_and_the_sandbox_usable(
    kind: str, cancelled: Callable[[Awaitable[object]], Awaitable[None]]
) -> None:
    long = own("sleep 985")

    async def scenario(sandbox: Sandbox) -> None:
        with pytest.raises(TimeoutError):
            await cancelled(sandbox.exec(f"touch begun; {long}; touch ended", timeout_s=60))
        result = await sandbox.exec("ls; cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '", timeout_s=10)
        assert result.stdout.startswith(b"begun\n") and long.encode() not in result.stdout

    play(kind, scenario)


def test_what_commands_left_running_is_killed(kind: str) -> None:
    long = own("sleep 986")
    shy = f"trap '' TERM HUP INT; {long}; {long}"

    left = f'nohup sh -c "{shy}" >/dev/null 2>&1 & (setsid sh -c "{shy}" &) ; (({long} &) &)'
    count = f"for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done 2>/dev/null | grep -c '^{long}'"

    async def scenario(sandbox: Sandbox) -> None:
        async def running(number: int) -> bool:
            return int((await sandbox.exec(count, timeout_s=10)).stdout) == number

        await sandbox.exec(left, timeout_s=10)
        await until(lambda: running(3))
        await sandbox.kill_leftovers()
        assert await running(0)
        await sandbox.kill_leftovers()

    play(kind, scenario)


def test_who_takes_over_finds_directories_empty_and_all_else_as_it_was(kind: str) -> None:
    spec = SandboxSpec(env={"HERE": "x"}, writable=("/mine", "/also mine"))
    beat = "until [ -e stop ]; do date +%s%N >beat; done; cat /mine/secret >found; cat found >done"

    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.put({"kept": (b"kept", 0o640)}, "/work")
        mess = (
            f"cd '{sandbox.root}/also mine'; echo x > x; mkdir d; echo y > d/y; chmod 0 d .; cd '{sandbox.root}/work'; "
        )
        await sandbox.exec(f"{mess} ({beat.replace('/mine', f'{sandbox.root}/mine')}) >/dev/null 2>&1 &", timeout_s=10)
        await sandbox.hand_over(["/mine", "/also mine"])
        await sandbox.put({"secret": (b"42", 0o644)}, "/mine")
        assert (await sandbox.exec("cat kept; echo $HERE; pwd", timeout_s=10)).stdout.decode().startswith("keptx\n")
        assert (await sandbox.exec(f"ls -A '{sandbox.root}/also mine'; echo 1 >stop; sleep 9", timeout_s=0.5)).timed_out
        assert await sandbox.read_file("/mine/secret", 10) == b"42"
        await sandbox.exec("until [ -e done ]; do sleep 0.01; done", timeout_s=10)
        assert (await sandbox.exec("cat found", timeout_s=10)).stdout == (b"" if kind == "bwrap" else b"42")

    play(kind, scenario, spec)


def test_commands_wait_for_each_other_with_a_deadline(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        first = asyncio.ensure_future(sandbox.exec("sleep 0.5; echo 1", timeout_s=10))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded, match="busy"):
            await sandbox.exec("echo 2", timeout_s=0.1)
        assert (await sandbox.exec("echo 3", timeout_s=10)).stdout == b"3\n"
        assert (await first).stdout == b"1\n"

    play(kind, scenario)


def test_files_go_in_and_come_out(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        files = {"a.sh": (b"#!/bin/sh\necho ran\n", 0o755), "deep/er/ä b.bin": (bytes(range(256)) * 999, 0o640)}
        await sandbox.put(files, "/work/in")
        result = await sandbox.exec("in/a.sh; stat -c %a in/a.sh in/deep/er/*", timeout_s=10)
        assert result.stdout == b"ran\n755\n640\n"
        assert await sandbox.read_file("/work/in/deep/er/ä b.bin", 1 << 20) == bytes(range(256)) * 999
        with tarfile.open(fileobj=io.BytesIO(await sandbox.get("/work/in", limit_bytes=1 << 20))) as archive:
            assert {m.name for m in archive if m.isfile()} == {"work/in/a.sh", "work/in/deep/er/ä b.bin"}
        relative = await sandbox.get(["in/a.sh"], limit_bytes=1 << 20)
        with tarfile.open(fileobj=io.BytesIO(relative)) as archive:
            assert archive.getnames() == ["work/in/a.sh"]
        await sandbox.put_tar(relative, "/tmp/copy")
        assert await sandbox.read_file("/tmp/copy/work/in/a.sh", 100) == files["a.sh"][0]

    play(kind, scenario)


class Watched(UserDict[str, tuple[bytes, int]]):
    """Files that know which thread walked through them."""

    thread = 0

    def __iter__(self) -> Iterator[str]:
        self.thread = threading.get_ident()
        return super().__iter__()


def test_many_files_do_not_keep_the_event_loop(kind: str) -> None:
    files = Watched({f"{n % 50}/{n}": (b"%d" % n, 0o644) for n in range(5000)})

    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.put(files, "/work")
        assert files.thread not in (0, threading.get_ident())
        assert (await sandbox.exec("find . -type f | wc -l; cat 49/4999", timeout_s=10)).stdout == b"5000\n4999"

    play(kind, scenario)


@pytest.mark.parametrize("name", ["a\\nb", "a\\101", "a\nb", "-C", "caf\udce9", "x y"])
def test_a_name_is_taken_as_it_is(kind: str, name: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.put({name: (b"file", 0o644)}, f"/work/{name}")
        assert await sandbox.read_file(f"/work/{name}/{name}", 100) == b"file"
        with tarfile.open(fileobj=io.BytesIO(await sandbox.get(f"/work/{name}", limit_bytes=1 << 20))) as archive:
            assert archive.getnames() == [f"work/{name}", f"work/{name}/{name}"]

    play(kind, scenario)


def test_a_file_has_a_date_that_archives_can_hold(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.put({"f": (b"", 0o644)}, "/work")
        result = await sandbox.exec("python3 -m zipfile -c f.zip f", timeout_s=20)
        assert result.exit_code == 0, result.stderr

    play(kind, scenario)


def test_files_go_into_the_further_writable_directories(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.put({"test.sh": (b"exit 3", 0o644)}, "/tests")
        assert (await sandbox.exec(f"sh {sandbox.root}/tests/test.sh", timeout_s=10)).exit_code == 3
        await sandbox.exec(f"echo 1 > {sandbox.root}/logs/verifier/reward.txt", timeout_s=10)
        assert await sandbox.read_file("/logs/verifier/reward.txt", 10) == b"1\n"

    play(kind, scenario, SandboxSpec(writable=("/tests", "/logs/verifier")))


def test_wrong_files_are_typed_errors(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        with pytest.raises(FileNotFoundError):
            await sandbox.read_file("/work/none", 10)
        with pytest.raises(FileNotFoundError):
            await sandbox.get(["/work", "/work/none"], limit_bytes=1 << 20)
        with pytest.raises(SandboxError, match="not a regular file"):
            await sandbox.read_file("/work", 10)
        await sandbox.exec("head -c 5000 /dev/zero > big; mkfifo fifo", timeout_s=10)
        with pytest.raises(SandboxError, match="larger"):
            await sandbox.read_file("big", 4999)
        with pytest.raises(SandboxError, match="not a regular file"):
            await sandbox.read_file("fifo", 4999)
        assert len(await sandbox.read_file("big", 5000)) == 5000
        with pytest.raises(SandboxError, match="larger"):
            await sandbox.get("big", limit_bytes=5000)
        with pytest.raises(SandboxError, match="leads out"):
            await sandbox.put({"../x": (b"", 0o644)}, "/work")
        with pytest.raises(SandboxError, match="cannot unpack"):
            await sandbox.put_tar(b"this is no tar archive" * 100, "/work")

    play(kind, scenario)


def test_links_come_out_as_links(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.exec("mkdir r; ln -s /etc/shadow r/soft; echo x > r/one; ln r/one r/two", timeout_s=10)
        with tarfile.open(fileobj=io.BytesIO(await sandbox.get("r", limit_bytes=1 << 20))) as archive:
            members = {m.name: m for m in archive}
        assert members["work/r/soft"].issym() and members["work/r/soft"].linkname == "/etc/shadow"
        assert members["work/r/one"].isreg() and members["work/r/two"].isreg()

    play(kind, scenario)


def test_a_mount_is_shown(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tool = tmp_path_factory.mktemp("tool")
    tool.chmod(0o755)  # its parent stays unreadable for the sandbox's user
    (tool / "bin").mkdir()
    (tool / "bin" / "greet").write_text("#!/bin/sh\necho hello\n")
    (tool / "bin" / "greet").chmod(0o755)

    async def scenario(sandbox: Sandbox) -> None:
        assert (await sandbox.exec(f"{sandbox.root}/opt/tool/bin/greet", timeout_s=10)).stdout == b"hello\n"

    play(kind, scenario, SandboxSpec(mounts=(Mount(str(tool), "/opt/tool"),)))


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

            await until(directory_gone)
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
