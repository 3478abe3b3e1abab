"""The contract of every sandbox back end (kat_stream/env/sandboxes/base.py): what becomes of a command."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable

import anyio
import pytest

from kat_stream.env.sandboxes import Sandbox, SandboxSpec
from kat_stream.errors import DeadlineExceeded
from tests.contract.sandbox_kit import kind, own, play
from tests.waiting import until

__all__ = ["kind"]


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

        await until(beats, "a beat", 10.0)

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
        await until(lambda: running(3), "all three", 10.0)
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


def test_who_takes_over_after_another_finds_nothing_of_it(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        for _ in range(3):
            await sandbox.hand_over(["/mine"])
            await sandbox.put({"secret": (b"42", 0o644)}, "/mine")
            await sandbox.exec(f"{own('sleep 987')} >/dev/null 2>&1 & echo kept >>kept", timeout_s=10)
            await sandbox.kill_leftovers()
            assert (await sandbox.exec(f"ls {sandbox.root}/mine", timeout_s=10)).stdout == b"secret\n"
        assert await sandbox.read_file("kept", 100) == b"kept\n" * 3

    play(kind, scenario, SandboxSpec(writable=("/mine",)))


def test_commands_wait_for_each_other_with_a_deadline(kind: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        first = asyncio.ensure_future(sandbox.exec("sleep 0.5; echo 1", timeout_s=10))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded, match="busy"):
            await sandbox.exec("echo 2", timeout_s=0.1)
        assert (await sandbox.exec("echo 3", timeout_s=10)).stdout == b"3\n"
        assert (await first).stdout == b"1\n"

    play(kind, scenario)
