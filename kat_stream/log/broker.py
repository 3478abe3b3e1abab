"""A real Apache Kafka on this machine without Docker, of one node or several: `kat-stream broker up | down | status`.

Owns a state directory: cluster.json (who belongs to it, and where) and a folder for each node. Invariant: `up` returns
when every node answers and sees the others, and leaves nothing running that it started when it fails; the data survive
`down` and kill -9. A cluster keeps its size and its nodes' identities.
"""

from __future__ import annotations

import json
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kat_stream.errors import ConfigError, DeadlineExceeded
from kat_stream.locks import try_lock
from kat_stream.log.broker_node import POLL_S, READY_S, STOP_S, Node, answers
from kat_stream.ports import choose_port, try_port
from kat_stream.ranges import LAST_PORT

__all__ = ["Cluster", "Node", "Status", "answers", "cluster_of", "down", "status", "up"]

PORT_S = 5.0
MAX_REPLICAS = 3
TOGETHER_S = 6.0
"""How long nodes may take that stop together: the last ones wait in vain for a majority to agree to their leaving."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes of a state directory; each can be started, stopped, killed and paused on its own."""

    name: str
    """Kafka's cluster id."""
    nodes: tuple[Node, ...]

    @property
    def bootstrap(self) -> str:
        """`host:port[,host:port]` of all nodes."""
        return ",".join(node.address for node in self.nodes)

    def node(self, number: int) -> Node:
        """From 1."""
        return self.nodes[number - 1]


@dataclass(frozen=True, slots=True)
class Status:
    """`bootstrap` is where it listens or listened last; empty if it never ran here."""

    running: bool
    """Whether any node runs."""
    bootstrap: str = ""
    pid: int = 0
    """The first running node's."""
    nodes: tuple[tuple[int, str, int], ...] = ()
    """Number, address and pid of each node; pid 0: it is down."""


def up(
    state_dir: Path,
    port: int = 0,
    nodes: int = 0,
    *,
    settings: Mapping[str, str] | None = None,
    format_options: Sequence[str] = (),
) -> str:
    """Start a cluster, or what is missing of it; returns `host:port[,host:port]`.

    `port`: of the first node, the others follow it; 0: the ports of last time, or free ones. `nodes`: 0: as many as
    last time, or one. `settings`: further lines of server.properties, in which @NODE@, @PORT@ and @CONTROLLER_PORT@ are
    filled in. `format_options`: further arguments of Kafka's StorageTool, used when the data directories are made.
    ConfigError: Java or Maven is missing, a port is taken, or the directory holds a cluster of another size.
    DeadlineExceeded: not ready in time; see broker.log.
    """
    state_dir = state_dir.resolve()
    state_dir.mkdir(parents=True, exist_ok=True)
    with _locked(state_dir):
        cluster = _placed(state_dir, port, nodes)
        down_before = [node for node in cluster.nodes if not node.pid]
        for node in down_before:
            node.configure({**_sized(cluster), **(settings or {})})
        _save(state_dir, cluster)
        _format(cluster, down_before, format_options)
        try:
            for node in down_before:
                node.launch()
            for node in cluster.nodes:
                node.wait_ready(frozenset(other.number for other in cluster.nodes))
        except BaseException:  # also when cancelled: nothing stays behind, and it is raised again
            for node in down_before:
                node.kill()
            raise
        return cluster.bootstrap


def down(state_dir: Path) -> bool:
    """Stop every node of this directory (SIGTERM, after a while SIGKILL); False if none was running."""
    cluster = cluster_of(state_dir)
    running = [node for node in cluster.nodes if node.pid] if cluster else []
    for node in running:
        node.terminate()
    patience_s = STOP_S if len(running) == 1 else TOGETHER_S
    give_up = time.monotonic() + patience_s
    for node in running:
        node.stop(give_up - time.monotonic())
    return bool(running)


def status(state_dir: Path) -> Status:
    """What runs from this directory. A pid that now belongs to another process does not count."""
    cluster = cluster_of(state_dir)
    if cluster is None:
        return Status(running=False)
    nodes = tuple((node.number, node.address, node.pid) for node in cluster.nodes)
    pids = [pid for _, _, pid in nodes if pid]
    return Status(bool(pids), cluster.bootstrap, pids[0] if pids else 0, nodes)


def cluster_of(state_dir: Path) -> Cluster | None:
    """The cluster that was made in this directory; None if there never was one."""
    try:
        record = json.loads((state_dir / "cluster.json").read_text())
    except FileNotFoundError:
        return None
    return Cluster(record["name"], tuple(_node(state_dir, **node) for node in record["nodes"]))


def _node(state_dir: Path, number: int, port: int, controller_port: int, directory_id: str) -> Node:
    return Node(number, state_dir.resolve() / f"node-{number}", port, controller_port, directory_id)


def _save(state_dir: Path, cluster: Cluster) -> None:
    nodes = [{key: value for key, value in asdict(node).items() if key != "folder"} for node in cluster.nodes]
    temporary = state_dir / ".cluster.json"
    temporary.write_text(json.dumps({"name": cluster.name, "nodes": nodes}, indent=1))
    temporary.replace(state_dir / "cluster.json")


def _placed(state_dir: Path, port: int, count: int) -> Cluster:
    """The cluster of this directory, or a new one, every node that is down at ports that are free now."""
    known = cluster_of(state_dir)
    if known is None:
        numbers = range(1, (count or 1) + 1)
        known = Cluster(_identity(), tuple(_node(state_dir, number, 0, 0, _identity()) for number in numbers))
    if count and count != len(known.nodes):
        made = f"{state_dir} holds a cluster of {len(known.nodes)} nodes"
        raise ConfigError(f"broker: {made}; for one of {count} take another --state-dir")
    return replace(known, nodes=tuple(_at_free_ports(node, known, port) for node in known.nodes))


def _at_free_ports(node: Node, cluster: Cluster, first_port: int) -> Node:
    """A port asked for must be free; otherwise the one of last time if it is, so that clients find the broker again.

    The controllers of several nodes know each other's ports, so these cannot move.
    """
    asked = first_port + node.number - 1 if first_port else 0
    if node.pid:
        if asked not in (0, node.port):
            raise ConfigError(f"broker: node {node.number} runs at port {node.port}; stop it before it can move")
        return node
    if asked and not 0 < asked <= LAST_PORT:
        raise ConfigError(f"broker: port {asked} of node {node.number} is not between 1 and {LAST_PORT}")
    if asked and not _becomes_free(asked):
        raise ConfigError(f"broker: port {asked} is in use")
    controller = node.controller_port
    if controller and len(cluster.nodes) > 1 and not _becomes_free(controller):
        raise ConfigError(f"broker: port {controller}, where node {node.number} votes, is in use by another process")
    return replace(node, port=asked or _free_port(node.port), controller_port=_free_port(controller))


def _becomes_free(port: int) -> bool:
    """Whether the port is free soon: a broker that was killed holds it until its last thread has gone."""
    give_up = time.monotonic() + PORT_S
    while not _is_free(port):
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)
    return True


def _is_free(port: int) -> bool:
    try:
        try_port("127.0.0.1", port)
    except OSError:
        return False
    return True


def _free_port(before: int) -> int:
    """The port of last time if it is free, otherwise any."""
    return before if before and _becomes_free(before) else choose_port()


def _identity() -> str:
    """A Kafka uuid; one that begins with a dash would look like an option."""
    return urlsafe_b64encode(b"\x01" + uuid.uuid4().bytes[1:]).rstrip(b"=").decode()


def _sized(cluster: Cluster) -> dict[str, str]:
    """Settings that follow from the number of nodes.

    One node must come back fast after kill -9, before which its old session has to run out; several must not call a
    node dead that only was slow on a busy machine (research/kafka_real.md 5.2, 5.7).
    controller.socket.timeout.ms is a node's patience with the controller: where that stood still as another node came
    back, writes that need this one's copy were refused for 30.4 s with the default of 30 s, for 7.2 to 7.7 s with 5 s.
    request.timeout.ms is a coordinator's patience with a node to which it writes the end of a transaction; the frozen
    node of tests/contract/test_kafka_frozen.py showed no benefit (6 cases each, in turns: 9.4 to 16.0 s with 5 s, 9.2
    to 13.7 s with the default of 30 s).
    """
    alone = len(cluster.nodes) == 1
    replicas = min(MAX_REPLICAS, len(cluster.nodes))
    sizes = {"replication.factor": replicas, "min.isr": max(1, replicas - 1), "num.partitions": 1 if alone else 3}
    internal = ("transaction.state.log", "share.coordinator.state.topic")
    return {
        "controller.quorum.bootstrap.servers": ",".join(f"127.0.0.1:{node.controller_port}" for node in cluster.nodes),
        **{f"{topic}.{key}": str(value) for topic in internal for key, value in sizes.items()},
        "offsets.topic.replication.factor": str(replicas),
        "offsets.topic.num.partitions": str(sizes["num.partitions"]),
        "broker.session.timeout.ms": "1000" if alone else "3000",
        "broker.heartbeat.interval.ms": "200" if alone else "500",
        "request.timeout.ms": "5000",
        "controller.socket.timeout.ms": "5000",
    }


def _format(cluster: Cluster, nodes: Sequence[Node], options: Sequence[str]) -> None:
    voters = ",".join(f"{n.number}@127.0.0.1:{n.controller_port}:{n.directory_id}" for n in cluster.nodes)
    with ThreadPoolExecutor(max(1, len(nodes))) as pool:
        list(pool.map(lambda node: node.format(cluster.name, voters, options), nodes))


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """One `up` at a time in a directory."""
    give_up = time.monotonic() + READY_S
    with (state_dir / "lock").open("w") as lock:
        while not try_lock(lock.fileno()):
            if time.monotonic() > give_up:
                raise DeadlineExceeded(f"another `broker up` in {state_dir}", READY_S)
            time.sleep(POLL_S)
        yield
