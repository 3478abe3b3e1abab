"""One Kafka process on this machine: its folder, its settings, its life. `broker.py` makes clusters of them.

Owns node-N/: data, server.properties, broker.log, pid.json. Invariant: at most one process on a data directory; it is
recorded the moment it exists, and a pid that the kernel gave to somebody else since is never signalled.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kat_stream.errors import ConfigError, DeadlineExceeded
from kat_stream.log.jars import classpath, java, ops_kafka

READY_S = 90.0
STOP_S = 20.0
POLL_S = 0.05
JVM = ("-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")


@dataclass(frozen=True, slots=True)
class Node:
    """One node, broker and controller in one process, at 127.0.0.1:port."""

    number: int
    """From 1; Kafka's node.id."""
    folder: Path
    port: int
    controller_port: int
    directory_id: str
    """Kafka's name of the data directory, which makes it a voter of the quorum."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its process; 0 if it does not run."""
        try:
            record = json.loads((self.folder / "pid.json").read_text())
            pid, started = int(record["pid"]), record["started"]
        except (FileNotFoundError, ValueError, TypeError, KeyError):  # none, or none that `launch` wrote whole
            return 0
        return pid if alive(pid) and _start_time(pid) == started else 0

    def configure(self, settings: Mapping[str, str]) -> None:
        """Write server.properties: the template, then what `settings` adds; @NAMES@ of both are filled in."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = (ops_kafka() / "server.properties").read_text()
        text += "".join(f"{key}={value}\n" for key, value in settings.items())
        own = {"NODE": self.number, "PORT": self.port, "CONTROLLER_PORT": self.controller_port}
        for name, value in {**own, "DATA": self.folder / "data"}.items():
            text = text.replace(f"@{name}@", str(value))
        _write_private(self.folder / "server.properties", text)
        shutil.copy(ops_kafka() / "log4j2.properties", self.folder / "log4j2.properties")

    def format(self, cluster: str, voters: str, options: Sequence[str]) -> None:
        """Give the data directory its place in the cluster, once. ConfigError says why it could not."""
        if (self.folder / "data" / "meta.properties").exists():
            return
        arguments = ["format", "-t", cluster, "-c", str(self.folder / "server.properties")]
        arguments += ["--initial-controllers", voters, *options]
        command = [java(), *JVM, "-cp", classpath(), "kafka.tools.StorageTool", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=READY_S)
        if done.returncode != 0:
            raise ConfigError(f"broker: {self.folder} could not be formatted:\n{(done.stdout + done.stderr)[-2000:]}")

    def launch(self) -> None:
        """Start the process detached: it outlives this one and does not get its Ctrl-C. Does nothing if it runs.

        Recorded at once: two on one data directory destroy it, so not even a kill -9 of this process may leave one
        that nobody knows. ConfigError if it cannot be recorded: then it does not run.
        """
        if self.pid:
            return
        logging = f"-Dlog4j2.configurationFile={self.folder / 'log4j2.properties'}"
        command = [java(), *JVM, logging, "-cp", classpath(), "kafka.Kafka", str(self.folder / "server.properties")]
        with (self.folder / "broker.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._record(process.pid)
        except BaseException:  # a Ctrl-C, too: nobody would know of it
            process.kill()
            process.wait()
            raise

    def _record(self, pid: int) -> None:
        """Whole or not at all."""
        new = self.folder / ".pid.json"
        try:
            new.write_text(json.dumps({"pid": pid, "started": _start_time(pid)}))
            new.replace(self.folder / "pid.json")
        except OSError as error:
            raise ConfigError(f"broker: {self.folder / 'pid.json'} cannot be written ({error.strerror})") from error

    def wait_ready(self, others: frozenset[int] = frozenset()) -> None:
        """Until it lists itself, and `others`, as alive. ConfigError: it ended. DeadlineExceeded."""
        give_up = time.monotonic() + READY_S
        while not listed(self.port) >= {self.number, *others}:
            if not self.pid:
                tail = (self.folder / "broker.log").read_text(errors="replace")[-2000:]
                raise ConfigError(f"broker: Kafka has ended; the end of {self.folder / 'broker.log'}:\n{tail}")
            if time.monotonic() > give_up:
                raise DeadlineExceeded(f"Kafka at {self.address} ({self.folder / 'broker.log'})", READY_S)
            time.sleep(POLL_S)

    def start(self) -> None:
        """Launch and wait until it takes part. ConfigError, DeadlineExceeded."""
        self.launch()
        self.wait_ready()

    def terminate(self) -> None:
        """Ask it to stop, also when it is paused; returns at once."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def stop(self, within_s: float = STOP_S) -> None:
        """Stop in good order: leadership moves first. After `within_s` it is killed."""
        self.terminate()
        if not self._gone_within(within_s):
            self.kill()

    def kill(self) -> None:
        """kill -9; returns when the process is gone."""
        self._signal(signal.SIGKILL)
        if not self._gone_within(STOP_S):
            raise DeadlineExceeded(f"Kafka in {self.folder} to die", STOP_S)

    def pause(self) -> None:
        """Stop the world of this node (SIGSTOP): its connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        pid = self.pid
        if pid:
            os.kill(pid, number)

    def _gone_within(self, seconds: float) -> bool:
        give_up = time.monotonic() + seconds
        while self.pid:
            if time.monotonic() > give_up:
                return False
            time.sleep(POLL_S)
        return True


def answers(port: int) -> bool:
    """Whether a broker at this port answers a Metadata request; an open port comes earlier."""
    return bool(listed(port))


def listed(port: int) -> frozenset[int]:
    """Numbers of the nodes that the broker at this port calls alive; none if it does not answer."""
    header = struct.pack(">hhih", 3, 1, 1, 3) + b"kat"
    request = header + struct.pack(">i", 0)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.settimeout(2)
            connection.sendall(struct.pack(">i", len(request)) + request)
            return _nodes_in(_read_exactly(connection, struct.unpack(">i", _read_exactly(connection, 4))[0]))
    except (OSError, struct.error):  # struct: whatever else listens there speaks another protocol
        return frozenset()


def _nodes_in(reply: bytes) -> frozenset[int]:
    """Metadata v1: correlation, then brokers as node id, host, port, rack."""
    _, count = struct.unpack_from(">ii", reply)
    at, numbers = 8, set()
    for _ in range(count):
        number, host = struct.unpack_from(">ih", reply, at)
        at += 6 + host + 4
        (rack,) = struct.unpack_from(">h", reply, at)
        at += 2 + max(rack, 0)
        numbers.add(number)
    return frozenset(numbers)


def _read_exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionResetError("the broker closed the connection")
        data += more
    return data


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie child of ours is reaped and counts as gone."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != pid
    except ChildProcessError:
        return _start_time(pid) != ""


def _start_time(pid: int) -> str:
    """The kernel's start time of a process, which tells it from a later one with the same pid; empty if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _write_private(path: Path, text: str) -> None:
    """Readable by its owner only: a secured listener's settings hold passwords."""
    path.touch(mode=0o600)
    path.write_text(text)
