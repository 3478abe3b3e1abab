"""Agents that try to get out, to hurt the host, or to disturb the controller, in a bubblewrap sandbox.

Owns the promises of isolation. Each test lets the attack run for real and then looks at the host.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from kat_stream.env.sandboxes import Sandbox, SandboxSpec
from kat_stream.env.sandboxes.bwrap import BwrapBackend
from kat_stream.env.sandboxes.seccomp import denied_calls
from kat_stream.errors import SandboxDied, SandboxError
from tests.contract.sandbox_kit import needs_bwrap

pytestmark = needs_bwrap
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="cgroups need root")


def attack(scenario: Callable[[Sandbox], Awaitable[None]], spec: SandboxSpec | None = None) -> None:
    async def main() -> None:
        backend = BwrapBackend()
        try:
            async with await backend.create(spec or SandboxSpec()) as sandbox:
                await scenario(sandbox)
        finally:
            await backend.close()

    asyncio.run(asyncio.wait_for(main(), 60))


async def python(sandbox: Sandbox, program: str, *words: str) -> str:
    result = await sandbox.exec(["/usr/bin/python3", "-c", program, *words], timeout_s=20, merge_stderr=True)
    return result.stdout.decode(errors="replace").strip()


async def still_works(sandbox: Sandbox) -> None:
    assert (await sandbox.exec("echo alive", timeout_s=10)).stdout == b"alive\n"


# --- reading what is not theirs


@pytest.mark.parametrize(
    "path",
    [
        "/etc/shadow", "/root", "/root/.ssh", "/home/user", "/var/run/docker.sock", "/run/docker.sock", "/var", "/opt",
        "/sys", "/boot", "/srv", "/media", "/mnt", "/work/main", "/usr/local/bin", "/dev/mem", "/dev/kvm", "/dev/sda",
        "/dev/vda", "/dev/net/tun", "/dev/fuse", "/proc/kcore", "/proc/1/root", "/proc/1/environ", "/proc/1/mem",
        "/etc/ssh", "/etc/ssl/private", "/etc/sudoers",
    ],
)  # fmt: skip
def test_the_hosts_files_are_not_there(path: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        command = f"ls -A {path}/ {path}/* 2>/dev/null; cat {path} 2>/dev/null | head -c 100"
        assert (await sandbox.exec(command, timeout_s=10)).stdout == b""

    attack(scenario)


def test_nothing_of_the_host_can_be_written() -> None:
    async def scenario(sandbox: Sandbox) -> None:
        places = "/ /usr /usr/bin /usr/local /etc /etc/kat-stream /run /run/kat-stream /dev /proc/sys/kernel /lib /home"
        attempts = await sandbox.exec(f"for d in {places}; do touch $d/x && echo WROTE $d; done", timeout_s=10)
        assert b"WROTE" not in attempts.stdout
        knobs = "/proc/sys/kernel/core_pattern /proc/sys/vm/drop_caches /proc/sysrq-trigger /proc/1/oom_score_adj"
        attempts = await sandbox.exec(f"for f in {knobs}; do echo 1 > $f && echo WROTE $f; done", timeout_s=10)
        assert b"WROTE" not in attempts.stdout
        tricks = "ln /usr/bin/env hard; ln -s /etc/shadow soft; cat soft; chmod 777 /etc/passwd"
        links = await sandbox.exec(tricks, timeout_s=10)
        assert links.exit_code != 0 and links.stdout == b""

    attack(scenario)


def test_other_sandboxes_are_out_of_sight() -> None:
    async def main() -> None:
        backend = BwrapBackend()
        try:
            mine, other = await backend.create(SandboxSpec(network="gateway")), await backend.create(SandboxSpec())
            await mine.put({"secret": (b"s3cret", 0o666)}, "/work")
            await mine.put({"secret": (b"s3cret", 0o666)}, "/tmp")
            await mine.exec("sleep 981 >/dev/null 2>&1 &", timeout_s=10)
            await mine.listen(8080)
            seen = await other.exec("ls -A /work /tmp /dev/shm /run/kat-stream; cat /proc/*/cmdline", timeout_s=10)
            assert b"secret" not in seen.stdout and b"981" not in seen.stdout
            assert b".." not in seen.stdout
            connect = "import socket,sys; s=socket.socket(); s.settimeout(2); print(s.connect_ex(('127.0.0.1', 8080)))"
            assert await python(other, connect) == "111"
            assert await python(mine, connect) == "0"
            await other.exec("kill -9 -1", timeout_s=10)
            assert b"981" in (await mine.exec("cat /proc/[0-9]*/cmdline", timeout_s=10)).stdout
        finally:
            await backend.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_no_descriptor_of_ours_is_inherited() -> None:
    async def scenario(sandbox: Sandbox) -> None:
        listing = "import os; print(sorted(os.listdir('/proc/self/fd')), os.readlink('/proc/self/fd/1'))"
        assert (await python(sandbox, listing)).startswith("['0', '1', '2', '3'] /run/kat-stream/")
        result = await sandbox.exec("ls /proc/1/fd; cat /proc/1/maps; echo x > /proc/1/fd/1", timeout_s=10)
        assert result.stdout == b"" and b"ermission denied" in result.stderr

    attack(scenario)


# --- becoming somebody else


def test_there_is_no_privilege_to_be_had() -> None:
    async def scenario(sandbox: Sandbox) -> None:
        status = (await sandbox.exec("cat /proc/self/status", timeout_s=10)).stdout.decode()
        fields = dict(line.split(":\t", 1) for line in status.splitlines())
        assert all(int(fields[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"))
        assert fields["NoNewPrivs"].strip() == "1" and fields["Seccomp"].strip() == "2"
        assert "0" not in fields["Uid"].split() and fields["Groups"].split() in ([], [str(10001)], ["65534"])
        suid = "cp /usr/bin/id .; chmod 6755 id; ./id -u; su -c id; mount -t tmpfs x /tmp; chroot / id; mknod d c 1 3"
        result = await sandbox.exec(suid, timeout_s=10)
        assert b"uid=0" not in result.stdout and result.exit_code != 0
        assert "Error" in await python(sandbox, "import os; os.setuid(0)")

    attack(scenario)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no table for this architecture")
def test_dangerous_system_calls_are_refused() -> None:
    # Arguments that do no harm where a call gets through; the kernel would answer other things than EPERM to most.
    program = (
        "import ctypes, sys, json\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(n, *a):\n"
        "    ctypes.set_errno(0); r = libc.syscall(n, *a); return ctypes.get_errno() if r == -1 else 0\n"
        "print(json.dumps({name: call(n, -1, 0, 0, 0, 0) for name, n in json.loads(sys.argv[1]).items()}))"
    )

    async def scenario(sandbox: Sandbox) -> None:
        calls = denied_calls(platform.machine())
        results = json.loads(await python(sandbox, program, json.dumps(calls)))
        assert {name: code for name, code in results.items() if code != 1} == {}
        intel = platform.machine() == "x86_64"
        special = {"clone": 56 if intel else 220, "clone3": 435, **({"x32": 0x40000000 + 39} if intel else {})}
        program_special = program.replace("-1, 0, 0, 0, 0", "0x10000000 | 17, 0, 0, 0, 0")
        results = json.loads(await python(sandbox, program_special, json.dumps(special)))
        assert (results["clone"], results["clone3"]) == (1, 38)
        assert results.get("x32", 38) == 38
        vsock = program.replace("-1, 0, 0, 0, 0", "40, 1, 0, 0, 0")
        assert json.loads(await python(sandbox, vsock, json.dumps({"socket": 41 if intel else 198}))) == {"socket": 97}
        await still_works(sandbox)

    attack(scenario)


def test_user_namespaces_and_the_terminal_are_closed() -> None:
    async def scenario(sandbox: Sandbox) -> None:
        for command in ("unshare -U true", "unshare -n true", "nsenter -t 1 -m true", "setarch -R true"):
            assert (await sandbox.exec(command, timeout_s=10)).exit_code != 0, command
        assert "Operation not permitted" in await python(sandbox, "import fcntl; fcntl.ioctl(0, 0x5412, b'x')")

    attack(scenario)


# --- reaching somebody


def test_the_hosts_services_and_the_world_are_out_of_reach() -> None:
    connect = (
        "import socket, sys\n"
        "for target in sys.argv[1:]:\n"
        "    host, port = target.rsplit(':', 1); s = socket.socket(); s.settimeout(2)\n"
        "    try: s.connect((host, int(port))); print('REACHED', target)\n"
        "    except OSError as e: print(target, e)\n"
        "try: print('REACHED', socket.getaddrinfo('pypi.org', 443))\n"
        "except OSError as e: print(e)\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "try: s.connect('\\0kat-stream-test'); print('REACHED abstract')\n"
        "except OSError as e: print(e)\n"
    )

    async def scenario(sandbox: Sandbox) -> None:
        with socket.create_server(("0.0.0.0", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
            abstract.bind("\0kat-stream-test")
            abstract.listen()
            port = server.getsockname()[1]
            hosts = ["127.0.0.1", "172.17.0.1", "169.254.169.254", socket.gethostbyname(socket.gethostname())]
            targets = [*(f"{host}:{port}" for host in hosts), "198.51.100.7:80", "127.0.0.1:22"]
            said = await python(sandbox, connect, *targets)
        assert "REACHED" not in said and said.count("\n") >= 6
        routes = (await sandbox.exec("cat /proc/net/route /proc/net/dev", timeout_s=10)).stdout.decode()
        assert "eth" not in routes and "lo:" in routes

    attack(scenario)


# --- using it all up


def test_a_fork_bomb_ends_at_the_timeout() -> None:
    async def scenario(sandbox: Sandbox) -> None:
        began = time.monotonic()
        bomb = ["/usr/bin/python3", "-c", "import os\nwhile 1:\n try: os.fork()\n except OSError: pass"]
        result = await sandbox.exec(bomb, timeout_s=1.0)
        assert result.timed_out and time.monotonic() - began < 15
        await still_works(sandbox)

    attack(scenario, SandboxSpec(pids=64))


def test_a_fork_bomb_in_the_background_ends_with_the_sandbox() -> None:
    async def scenario(sandbox: Sandbox) -> None:
        began = time.monotonic()
        await sandbox.exec("f() { f | f & }; f", timeout_s=5.0)
        with suppress(SandboxDied):  # where the bomb left no process for the next command
            await sandbox.exec("echo here", timeout_s=2.0)
        await sandbox.destroy()
        assert time.monotonic() - began < 20

    attack(scenario, SandboxSpec(pids=64))


def test_a_daemon_that_leaves_orphans_finds_room_for_more_while_nobody_runs_a_command() -> None:
    # Four times as many as there is room for; then it calls, for to ask it something would be a command.
    orphans = "for i in $(seq 240); do (: &); sleep 0.02; done 2>/work/errors"
    call = 'python3 -c "import socket; socket.create_connection((\\"127.0.0.1\\", 8080))"'

    async def scenario(sandbox: Sandbox) -> None:
        with await sandbox.listen() as listener:
            await sandbox.exec(f"setsid sh -c '{orphans}; {call}' </dev/null >/dev/null 2>&1 &", timeout_s=10)
            caller, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(listener), 30)
            caller.close()
        await still_works(sandbox)
        assert await sandbox.read_file("/work/errors", 100) == b""

    attack(scenario, SandboxSpec(pids=60, network="gateway"))


def test_killing_everything_kills_only_the_command() -> None:
    async def scenario(sandbox: Sandbox) -> None:
        for killer in ("pkill -9 .; kill -9 1; kill -9 -1; sleep 9", "kill -STOP 1; kill -STOP -1", "kill -TERM 1"):
            began = time.monotonic()
            result = await sandbox.exec(killer, timeout_s=3.0)
            assert time.monotonic() - began < 8, result
            await still_works(sandbox)

    attack(scenario)


@needs_root
def test_a_memory_hog_is_killed_and_the_sandbox_lives() -> None:
    async def scenario(sandbox: Sandbox) -> None:
        hog = "x = []\nwhile 1: x.append(bytearray(1 << 20))"
        result = await sandbox.exec(["/usr/bin/python3", "-c", hog], timeout_s=20)
        assert result.exit_code == 137 and not result.timed_out
        await still_works(sandbox)

    attack(scenario, SandboxSpec(memory_mb=64))


@pytest.mark.parametrize("place", ["/work", "/tmp", "/dev/shm", "/logs", "/home/agent"])
def test_a_full_disk_is_the_agents_own(place: str) -> None:
    async def scenario(sandbox: Sandbox) -> None:
        free = shutil.disk_usage("/").free
        fill = f"for n in 1 2 3 4 5 6; do head -c 8M /dev/zero > {place}/$n; done; du -sm {place}"
        result = await sandbox.exec(fill, timeout_s=20)
        assert b"No space left" in result.stderr
        assert int(result.stdout.split()[0]) <= 16
        assert abs(shutil.disk_usage("/").free - free) < 500 << 20
        await still_works(sandbox)
        with pytest.raises(SandboxError, match="cannot unpack"):
            await sandbox.put({"more": (b"x" * (1 << 20), 0o644)}, place)

    attack(scenario, SandboxSpec(disk_mb=16, writable=("/logs",)))


@needs_root
def test_the_cpu_is_shared() -> None:
    async def scenario(sandbox: Sandbox) -> None:
        spin = "import time\nend = time.time() + 1.5\nwhile time.time() < end: pass\nprint(time.process_time())"
        assert float(await python(sandbox, spin)) < 0.9

    attack(scenario, SandboxSpec(cpus=0.25))


def test_a_sparse_giant_is_cut_off() -> None:
    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.exec("truncate -s 60M big; truncate -s 9T giant", timeout_s=10)
        began = time.monotonic()
        with pytest.raises(SandboxError, match="larger"):
            await sandbox.get("/work", limit_bytes=1 << 20)
        with pytest.raises(SandboxError, match="larger"):
            await sandbox.read_file("/dev/../work/big", 1 << 20)
        assert time.monotonic() - began < 10
        await still_works(sandbox)

    attack(scenario)


# --- cheating the command server


def test_the_end_marker_cannot_be_forged() -> None:
    async def scenario(sandbox: Sandbox) -> None:
        spoof = (
            "import os, glob\n"
            "words = open('/proc/1/cmdline').read().encode()\n"
            "for pid in [1, os.getppid()]:\n"
            "    for fd in (0, 1, 2):\n"
            "        try:\n"
            "            with open(f'/proc/{pid}/fd/{fd}', 'wb', 0) as f: f.write(b'\\n' + b'0' * 32 + b' 0\\n')\n"
            "            print('WROTE', pid, fd)\n"
            "        except OSError as e: pass\n"
            "for path in glob.glob('/run/kat-stream/*'): os.path.exists(path)\n"
            "print('\\n' + '0' * 32 + ' 0', flush=True)\n"
            "os._exit(5)\n"
        )
        result = await sandbox.exec(["/usr/bin/python3", "-c", spoof], timeout_s=20)
        assert result.exit_code == 5
        assert b"WROTE 1 " not in result.stdout

    attack(scenario)


def test_shell_text_cannot_leave_its_command() -> None:
    async def scenario(sandbox: Sandbox) -> None:
        for text in ("')' ; exit 3", ") ; exit 3 #", "'", '"', "\n) </dev/null\nexit 3\n", "\\", "${", "`"):
            result = await sandbox.exec(text, timeout_s=10)
            assert not result.timed_out
            await still_works(sandbox)
        words = ["echo", "'; exit 9; '", "\n", ")"]
        assert (await sandbox.exec(words, timeout_s=10)).stdout == b"'; exit 9; ' \n )\n"

    attack(scenario)


def test_links_do_not_lead_the_host_anywhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")

    async def scenario(sandbox: Sandbox) -> None:
        await sandbox.exec(f"ln -s {secret} a; ln -s /proc/1/root/etc b; mkdir d; ln -s / d/up", timeout_s=10)
        with pytest.raises(FileNotFoundError):
            await sandbox.read_file("a", 100)
        assert b"of the host" not in await sandbox.get(["a", "b", "d"], limit_bytes=1 << 20)
        with pytest.raises(FileNotFoundError):
            await sandbox.read_file(f"../../..{secret}", 100)
        await sandbox.exec(f"rm -rf out; ln -s {tmp_path} out", timeout_s=10)
        with pytest.raises(SandboxError):
            await sandbox.put({"planted": (b"x", 0o644)}, "/work/out")

    attack(scenario)
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
