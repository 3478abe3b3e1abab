"""The system that is struck: `kat-stream run` on a real Kafka, small enough for two shared cores.

Owns its private world: network and mounts of its own (so that a cut, a full disk or a port meets nobody else's), a
small disk for the broker, one for the run, the broker and the run's process. Invariant: everything that it started ends
with `close`, and its mounts and its network end with the last process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from kat_stream.errors import ServiceDied
from kat_stream.log import broker
from kat_stream.supervisor import PROCESSES
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
BROKER_MB, RUN_MB = 1536, 512
LOCAL_PREF, CUT_PREF = 1000, 10
"""Routing rules: the kernel's own local table moves behind ours, so that a cut can come before it."""
START_S, STOP_S = 300.0, 30.0
SETTINGS = {
    "run.name": "chaos",
    "run.steps": "1000000",
    "data.train": "mend:train?count=200&seed=0",
    "data.held_out": "mend:held-out?count=2&seed=0",
    "sampler.group_size": "4",
    "sampler.groups_per_step": "2",
    "sampler.staleness": "2",
    "sampler.eval_before": "false",
    "sampler.rollout_timeout_s": "120.0",
    "sampler.max_context": "512",
    "rollout.in_flight": "3",
    "verifier.in_flight": "2",
    "trainer.learning_rate": "1e-5",
    "trainer.checkpoint_every": "2",
    "trainer.step_timeout_s": "180.0",
}
"""A policy that hardly changes and mends two tasks of five: groups differ, nearly every step has something to learn."""


def private_world() -> None:
    """Give this process (and all that it starts) a network and mounts of its own; needs root."""
    os.unshare(os.CLONE_NEWNET | os.CLONE_NEWNS)
    _run("mount", "--make-rprivate", "/")
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "rule", "add", "pref", str(LOCAL_PREF), "lookup", "local")
    _run("ip", "rule", "del", "pref", "0")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


@dataclass(slots=True)
class Disk:
    """A small disk of its own under a directory, which can be filled and freed."""

    directory: Path

    def mount(self, size_mb: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(self.directory))

    def fill(self) -> None:
        """To the last block, beside whoever writes at the same time: the next who writes is refused."""
        with (self.directory / "ballast").open("ab", buffering=0) as ballast:
            for block in (1 << 20, 1 << 12):
                with suppress(OSError):
                    while True:
                        ballast.write(bytes(block))

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.directory)], capture_output=True, timeout=30)

    def free(self) -> None:
        (self.directory / "ballast").unlink(missing_ok=True)


@dataclass(slots=True)
class System:
    """Broker and run under `directory`; `members` are the supervised processes."""

    directory: Path
    brokers: int = 1
    disks: dict[str, Disk] = field(default_factory=dict)
    bootstrap: str = ""
    process: subprocess.Popen[bytes] | None = None

    @property
    def run_dir(self) -> Path:
        return self.directory / "run" / "chaos"

    @property
    def broker_dir(self) -> Path:
        return self.directory / "broker"

    @property
    def url(self) -> str:
        return f"kafka:{self.bootstrap}"

    def start(self) -> None:
        """Returns when every member has registered."""
        self.disks = {name: Disk(self.directory / name) for name in ("broker", "run")}
        self.disks["broker"].mount(BROKER_MB)
        self.disks["run"].mount(RUN_MB)
        self.bootstrap = broker.up(self.broker_dir, nodes=self.brokers)
        settings = {**SETTINGS, "log.url": self.url, "run.directory": str(self.run_dir.parent)}
        command = [sys.executable, "-m", "kat_stream.cli", "run"]
        command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        with (self.directory / "run.out").open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )
        wait_for(lambda: not self.running() or all(map(self.pid, PROCESSES)), "every member", START_S)
        if not self.running():
            raise ServiceDied(f"the run has ended: {self.last_words()}")

    def last_words(self) -> str:
        return " | ".join((self.directory / "run.out").read_text(errors="replace").splitlines()[-8:])

    def pid(self, member: str) -> int:
        """The live process of a member; 0 while it has none."""
        return member_pid(self.run_dir, member)

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def broker_pids(self) -> list[int]:
        """One for each node; 0: it is down."""
        return [pid for _, _, pid in broker.status(self.broker_dir).nodes]

    def mend_broker(self) -> None:
        """What systemd or Kubernetes does for a broker: start it again where it stood."""
        if 0 in self.broker_pids():
            broker.up(self.broker_dir)

    def stop_run(self) -> int:
        """As Ctrl-C does; the exit code."""
        assert self.process is not None
        if self.running():
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait(STOP_S)

    def keep_evidence(self) -> Path:
        """Logs and archive on a disk that stays: the run's own ends with this process."""
        kept = self.directory / "evidence"
        shutil.copytree(self.run_dir, kept, ignore=shutil.ignore_patterns("weights", "checkpoints", "ballast"))
        for path in self.broker_dir.glob("node-*/broker.log"):
            shutil.copy(path, kept / f"{path.parent.name}.log")
        return kept

    def close(self) -> None:
        """The run, what a killed supervisor may have left, then the broker."""
        heal_cuts()
        for disk in self.disks.values():
            disk.free()
        if self.process is not None:
            self.stop_run()
        for member in PROCESSES:
            if pid := self.pid(member):
                os.kill(pid, signal.SIGKILL)
        broker.down(self.broker_dir)
        for disk in self.disks.values():
            disk.unmount()


def member_pid(run_dir: Path, member: str) -> int:
    """The live process of a member of a run; 0 while it has none."""
    try:
        pid = int(json.loads((run_dir / "services" / f"{member}.json").read_text())["pid"])
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pid if member.encode() in arguments else 0


def cut(pid: int, ports: set[int], known: set[int]) -> None:
    """Drop what this process sends to these ports, for every connection that it has now; `known` grows.

    Call it again and again while the cut lasts: a connection that it opens meanwhile is cut too.
    """
    for port in ports:
        for line in _run("ss", "-tnpH", f"dport = :{port}").splitlines():
            words = line.split()
            source = int(words[3].rpartition(":")[2])
            if f"pid={pid}," in line and source not in known:
                known.add(source)
                selector = ("ipproto", "tcp", "sport", str(source), "dport", str(port))
                _run("ip", "rule", "add", "pref", str(CUT_PREF), "blackhole", *selector)


def heal_cuts() -> None:
    while subprocess.run(["ip", "rule", "del", "pref", str(CUT_PREF)], capture_output=True, timeout=30).returncode == 0:
        pass
