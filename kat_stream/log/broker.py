"""A real Apache Kafka on this machine without Docker: `kat-stream broker up | down | status`.

Owns a state directory: data, config, broker.log, broker.json (pid and address). Invariant: `up` returns when the broker
answers a Metadata request, and leaves nothing running when it fails; the data survive `down` and kill -9.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kat_stream.errors import ConfigError, DeadlineExceeded
from kat_stream.log.jars import classpath, java, ops_kafka

READY_S = 90.0
STOP_S = 20.0
PORT_S = 5.0
JVM = ("-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")


@dataclass(frozen=True, slots=True)
class Status:
    """`bootstrap` is where it listens or listened last; empty if it never ran here."""

    running: bool
    bootstrap: str = ""
    pid: int = 0


def up(state_dir: Path, port: int = 0) -> str:
    """Start a broker, or find it running; returns `host:port`. Port 0: the port it had before, or a free one.

    ConfigError: Java or Maven is missing, or the port is taken. DeadlineExceeded: not ready in time; see broker.log.
    """
    state_dir = state_dir.resolve()
    state_dir.mkdir(parents=True, exist_ok=True)
    with _locked(state_dir):
        before = status(state_dir)
        if before.running:
            _wait_ready(before, state_dir)
            return before.bootstrap
        port = _choose_port(port, before.bootstrap)
        _write_config(state_dir, port, _free_port())
        _format(state_dir)
        started = _start(state_dir, f"127.0.0.1:{port}")
        try:
            _wait_ready(started, state_dir)
        except BaseException:  # also when cancelled: nothing stays behind, and it is raised again
            os.kill(started.pid, signal.SIGKILL)
            raise
        return started.bootstrap


def down(state_dir: Path) -> bool:
    """Stop the broker of this directory (SIGTERM, after a while SIGKILL); False if none was running."""
    before = status(state_dir)
    if not before.running:
        return False
    os.kill(before.pid, signal.SIGTERM)
    give_up = time.monotonic() + STOP_S
    while _alive(before.pid):
        if time.monotonic() > give_up:
            os.kill(before.pid, signal.SIGKILL)
            give_up += STOP_S
        time.sleep(0.05)
    return True


def status(state_dir: Path) -> Status:
    """What runs from this directory. A pid that now belongs to another process does not count."""
    try:
        record = json.loads((state_dir / "broker.json").read_text())
    except FileNotFoundError:
        return Status(running=False)
    pid = record["pid"]
    running = _alive(pid) and _start_time(pid) == record["started"]
    return Status(running, record["bootstrap"], pid if running else 0)


def answers(port: int) -> bool:
    """Whether a broker at this port answers a Metadata request with itself; an open port comes earlier."""
    header = struct.pack(">hhih", 3, 1, 1, 3) + b"kat"
    request = header + struct.pack(">i", 0)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.settimeout(2)
            connection.sendall(struct.pack(">i", len(request)) + request)
            reply = _read_exactly(connection, struct.unpack(">i", _read_exactly(connection, 4))[0])
    except OSError:
        return False
    correlation, brokers = struct.unpack(">ii", reply[:8])
    return bool(correlation == 1 and brokers > 0)


def _read_exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionResetError("the broker closed the connection")
        data += more
    return data


def _choose_port(port: int, before: str) -> int:
    """A port asked for must be free; otherwise the one of last time if it is, so that clients find the broker again."""
    if port and not _is_free(port):
        raise ConfigError(f"broker: port {port} is in use")
    last = int(before.rpartition(":")[2] or 0)
    return port or (last if last and _becomes_free(last) else _free_port())


def _becomes_free(port: int) -> bool:
    """Whether the port is free soon: a broker that was killed holds it until its last thread has gone."""
    give_up = time.monotonic() + PORT_S
    while not _is_free(port):
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_config(state_dir: Path, port: int, controller_port: int) -> None:
    text = (ops_kafka() / "server.properties").read_text()
    filled = {"PORT": str(port), "CONTROLLER_PORT": str(controller_port), "DATA": str(state_dir / "data")}
    for name, value in filled.items():
        text = text.replace(f"@{name}@", value)
    (state_dir / "server.properties").write_text(text)
    shutil.copy(ops_kafka() / "log4j2.properties", state_dir / "log4j2.properties")


def _format(state_dir: Path) -> None:
    if (state_dir / "data" / "meta.properties").exists():
        return
    cluster = urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
    arguments = ["format", "--standalone", "-t", cluster, "-c", str(state_dir / "server.properties")]
    command = [java(), *JVM, "-cp", classpath(), "kafka.tools.StorageTool", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=READY_S)
    if done.returncode != 0:
        raise ConfigError(f"broker: {state_dir} could not be formatted:\n{(done.stdout + done.stderr)[-2000:]}")


def _start(state_dir: Path, bootstrap: str) -> Status:
    """Detached: it outlives this process and does not get its Ctrl-C. Recorded at once: two on one data directory
    destroy it, so not even a kill -9 of this process may leave one that nobody knows."""
    logging = f"-Dlog4j2.configurationFile={state_dir / 'log4j2.properties'}"
    config = str(state_dir / "server.properties")
    command = [java(), *JVM, logging, "-cp", classpath(), "kafka.Kafka", config]
    with (state_dir / "broker.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    record = {"pid": process.pid, "bootstrap": bootstrap, "started": _start_time(process.pid)}
    (state_dir / "broker.json").write_text(json.dumps(record))
    return Status(True, bootstrap, process.pid)


def _wait_ready(broker: Status, state_dir: Path) -> None:
    give_up = time.monotonic() + READY_S
    while not answers(int(broker.bootstrap.rpartition(":")[2])):
        if not _alive(broker.pid):
            tail = (state_dir / "broker.log").read_text(errors="replace")[-2000:]
            raise ConfigError(f"broker: Kafka has ended; the end of {state_dir / 'broker.log'}:\n{tail}")
        if time.monotonic() > give_up:
            raise DeadlineExceeded(f"Kafka at {broker.bootstrap} ({state_dir / 'broker.log'})", READY_S)
        time.sleep(0.05)


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """One `up` at a time in a directory."""
    give_up = time.monotonic() + READY_S
    with (state_dir / "lock").open("w") as lock:
        while not _try_lock(lock.fileno()):
            if time.monotonic() > give_up:
                raise DeadlineExceeded(f"another `broker up` in {state_dir}", READY_S)
            time.sleep(0.05)
        yield


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _alive(pid: int) -> bool:
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
