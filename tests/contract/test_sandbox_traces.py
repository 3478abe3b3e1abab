"""What sandboxes leave on the host: nothing, whether they are destroyed, cannot start or lose their controller."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from kat_stream.env.sandboxes import SandboxSpec
from kat_stream.env.sandboxes.bwrap import BwrapBackend
from kat_stream.errors import SandboxUnavailable
from tests.contract.sandbox_kit import needs_bwrap
from tests.waiting import wait_for

pytestmark = needs_bwrap
ROOT = Path(__file__).parents[2]
SLEEP = f"sleep 9{os.getpid()}"  # a command line that only this test run has


def traces(mark: str) -> list[str]:
    """Processes, groups and directories that carry the controller's mark."""
    runs = [Path("/run/kat-stream"), Path(f"/tmp/kat-stream-{os.getuid()}")]
    groups = [*Path("/sys/fs/cgroup").glob("*/kat-stream"), Path("/sys/fs/cgroup/kat-stream")]
    places = [place for place in (*runs, *groups) if os.access(place, os.R_OK)]
    found = [str(path) for place in places for path in place.iterdir() if path.name.startswith(mark)]
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return found + [line for line in listing.splitlines() if SLEEP in line and "asyncio" not in line]


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_destroy_leaves_nothing() -> None:
    async def main() -> None:
        backend = BwrapBackend()
        before = descriptors()
        for _ in range(3):
            sandbox = await backend.create(SandboxSpec(network="gateway"))
            await sandbox.listen()
            await sandbox.exec(f"(setsid {SLEEP} &) ; {SLEEP} & echo", timeout_s=10)
            await sandbox.destroy()
        assert traces(f"{os.getpid()}-") == []
        # The stage's namespace stays open for the next sandbox.
        assert descriptors() <= before + 1
        await backend.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_start_that_lacks_descriptors_leaves_nothing() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def start(backend: BwrapBackend, limit: int) -> bool:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            await (await backend.create(SandboxSpec())).destroy()
        except SandboxUnavailable:
            return False
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return True

    async def main() -> None:
        backend = BwrapBackend()
        assert await start(backend, soft)
        before = limit = descriptors()
        while not await start(backend, limit):
            assert (descriptors(), traces(f"{os.getpid()}-")) == (before, [])
            limit += 1
        assert limit > before
        await backend.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def _killed_with_sandboxes(count: int) -> int:
    """The process id of a controller that was killed while it had so many sandboxes, once nothing runs in them."""
    program = (
        "import asyncio\n"
        "from kat_stream.env.sandboxes.bwrap import BwrapBackend\n"
        "from kat_stream.env.sandboxes import SandboxSpec\n"
        "async def main():\n"
        "    backend = BwrapBackend()\n"
        f"    for n in range({count}):\n"
        "        s = await backend.create(SandboxSpec())\n"
        f"        await s.exec('(setsid {SLEEP} >/dev/null 2>&1 &)', timeout_s=10)\n"
        "    print('ready', flush=True)\n"
        f"    await s.exec('{SLEEP}', timeout_s=900)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as controller:
        assert controller.stdout is not None and controller.stdout.readline() == "ready\n"
        assert any("sleep" in trace for trace in traces("none-"))
        controller.send_signal(signal.SIGKILL)
    wait_for(lambda: not any("sleep" in trace for trace in traces("none-")), "the end of what the controller ran", 10)
    return controller.pid


def test_a_killed_controller_takes_everything_with_it() -> None:
    async def sweep() -> int:
        return await BwrapBackend().reap()

    found = []
    for _ in range(5):
        pid = _killed_with_sandboxes(4)
        found.append(asyncio.run(sweep()))
        if found[-1] >= 4:
            break  # else a test beside this one, whose back end looks for orphans as well, was there before
    assert found[-1] >= 4, found
    assert traces(f"{pid}-") == []
