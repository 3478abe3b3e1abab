"""`broker up` says what is missing or in the way before it starts anything."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kat_stream.errors import ConfigError
from kat_stream.log import broker, broker_node, jars


def made(state: Path, *ports: int) -> None:
    """A directory as `up` leaves it, with nodes that do not run."""
    nodes = [
        {"number": number, "port": port, "controller_port": port, "directory_id": f"AQ{number}"}
        for number, port in enumerate(ports, 1)
    ]
    (state / "cluster.json").write_text(json.dumps({"name": "AQ", "nodes": nodes}))


def test_nothing_runs_in_a_fresh_directory(tmp_path: Path) -> None:
    assert broker.status(tmp_path) == broker.Status(running=False)
    assert broker.down(tmp_path) is False


def test_a_port_in_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "PORT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use"):
            broker.up(tmp_path, port)
        with pytest.raises(ConfigError, match=f"port {port} is in use"):
            broker.up(tmp_path, port - 1, 3)
        assert not broker.answers(port)
    assert broker.status(tmp_path) == broker.Status(running=False)


def test_voters_of_a_cluster_cannot_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "PORT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        made(tmp_path, 1, port, 2)
        with pytest.raises(ConfigError, match=f"port {port}, where node 2 votes, is in use"):
            broker.up(tmp_path)


def test_a_cluster_keeps_its_size(tmp_path: Path) -> None:
    made(tmp_path, 1, 2, 3)
    with pytest.raises(ConfigError, match=r"holds a cluster of 3 nodes; for one of 1 take another --state-dir"):
        broker.up(tmp_path, nodes=1)


def test_a_pid_that_belongs_to_another_process_now_does_not_count(tmp_path: Path) -> None:
    made(tmp_path, 1)
    folder = tmp_path / "node-1"
    folder.mkdir()
    (folder / "pid.json").write_text(json.dumps({"pid": os.getpid(), "started": "0"}))
    nodes = ((1, "127.0.0.1:1", 0),)
    assert broker.status(tmp_path) == broker.Status(running=False, bootstrap="127.0.0.1:1", nodes=nodes)
    assert broker.down(tmp_path) is False


@pytest.mark.parametrize("text", ["", "null", "{}", '{"pid": "x", "started": "0"}', '{"pid": 12'])
def test_a_pid_that_was_not_written_whole_is_none(tmp_path: Path, text: str) -> None:
    made(tmp_path, 1)
    (tmp_path / "node-1").mkdir()
    (tmp_path / "node-1" / "pid.json").write_text(text)
    assert not broker.status(tmp_path).running
    assert broker.down(tmp_path) is False


def test_a_process_that_cannot_be_recorded_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the record of the one before it is whole."""
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexec sleep 60\n")
    java.chmod(0o700)
    monkeypatch.setattr(broker_node, "java", lambda: str(java))
    monkeypatch.setattr(broker_node, "classpath", lambda: "")
    before = json.dumps({"pid": os.getpid(), "started": "0"})
    (tmp_path / "pid.json").write_text(before)
    (tmp_path / ".pid.json").mkdir()
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*args: Any, **how: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **how))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(ConfigError, match="pid.json cannot be written"):
        broker_node.Node(1, tmp_path, 1, 1, "AQ").launch()
    (process,) = started
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "pid.json").read_text() == before


def test_missing_java_and_maven_name_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="openjdk-17-jre-headless"):
        jars.java()
    with pytest.raises(ConfigError, match="apt-get install maven"):
        jars.classpath()


def test_an_old_java_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="is Java 11, Kafka needs 17"):
        jars.java()
