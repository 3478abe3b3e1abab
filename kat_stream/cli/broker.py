"""`kat-stream broker`: a real Apache Kafka on this machine, one node or several, without Docker."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kat_stream.cli.common import add_command, add_group, port

STATE_DIR = Path(".kat/broker")
MOST_NODES = 9


def register(subparsers: Any) -> None:
    group = add_group(
        subparsers,
        "broker",
        help="a real Apache Kafka on this machine, without Docker",
        description="Starts Kafka from Maven's jars (Java 17 or newer and Maven are needed), for work and tests: one "
        "node, or a cluster that survives the loss of a node. Its data live in the state directory and survive a stop.",
    )
    up_parser = add_command(
        group,
        "up",
        up,
        help="start it, or say where it runs",
        description="Returns when every node answers, and prints the address for --log or log.url. Doing it twice "
        "changes nothing; a node that died is started again. Three nodes keep three copies of every record and go on "
        "when one is lost. A state directory keeps its number of nodes.",
        examples=[
            "broker up",
            "broker up --nodes 3 --state-dir .kat/cluster",
            "broker up --port 9092 --state-dir /var/tmp/kafka",
        ],
    )
    first = "where the first node listens, the others follow it (default: the ports of last time, or free ones)"
    up_parser.add_argument("--port", type=port, default=0, help=first)
    nodes = "how many brokers (default: as many as last time, or one)"
    up_parser.add_argument("--nodes", type=_nodes, default=0, help=nodes)
    down_parser = add_command(
        group, "down", down, help="stop it", description="Stops every node; its data stay.", examples=["broker down"]
    )
    status_parser = add_command(
        group,
        "status",
        status,
        help="whether it runs, and where",
        description="Prints the address of the running broker and a line for each node. The exit code is 1 if a node "
        "is down or there is none.",
        examples=["broker status", "broker status --state-dir .kat/cluster"],
    )
    state_dir = f"its data and settings (default: {STATE_DIR})"
    for parser in (up_parser, down_parser, status_parser):
        parser.add_argument("--state-dir", type=Path, default=STATE_DIR, help=state_dir)


@contextmanager
def running_meanwhile() -> Iterator[str]:
    """This machine's own broker, and its address; stopped afterwards if it was not up before: others may use it."""
    from kat_stream.log import broker

    was_up = broker.status(STATE_DIR).running
    bootstrap = broker.up(STATE_DIR)
    try:
        yield bootstrap
    finally:
        if not was_up:
            broker.down(STATE_DIR)


def up(args: argparse.Namespace) -> int:
    from kat_stream.log import broker

    print(f"kafka:{broker.up(args.state_dir, args.port, args.nodes)}")
    return 0


def down(args: argparse.Namespace) -> int:
    from kat_stream.log import broker

    print("stopped" if broker.down(args.state_dir) else "no broker was running")
    return 0


def status(args: argparse.Namespace) -> int:
    from kat_stream.log import broker

    found = broker.status(args.state_dir)
    if not found.running:
        print(f"no broker runs in {args.state_dir}")
        return 1
    print(f"kafka:{found.bootstrap}")
    for number, address, pid in found.nodes:
        print(f"node {number}: {address}, {f'pid {pid}' if pid else 'down'}")
    return 0 if all(pid for _, _, pid in found.nodes) else 1


def _nodes(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MOST_NODES:
        raise argparse.ArgumentTypeError(f"{number}: between 1 and {MOST_NODES}")
    return number
