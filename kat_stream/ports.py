"""Ports that a process started later is to listen at.

Invariant: the kernel gives a port chosen here to no outgoing connection, so it is still free seconds later, when the
service has loaded its model, and after every restart of it. (What `bind` to port 0 chooses is one of the ports that
outgoing connections get; on a busy machine such a connection may hold it when the service begins to listen.)
"""

from __future__ import annotations

import random
import socket
from collections.abc import Container
from pathlib import Path

_CHOICE = range(20_000, 30_000)
"""Above most well-known services, below Linux' outgoing connections and the ports of Kubernetes' nodes."""
_TRIES = 100
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RANDOM = random.SystemRandom()  # processes that were seeded alike must not choose alike


def try_port(host: str, port: int) -> int:
    """The port that a server would get there now (for port 0 any); OSError if it would get none."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])


def choose_port(host: str = "127.0.0.1", *, but: Container[int] = ()) -> int:
    """A free port that is not one of `but`; OSError if nobody can listen at the host.

    On a machine that leaves all ports to outgoing connections it is one of those.
    """
    low, high = _outgoing()
    choice = [port for port in _CHOICE if not low <= port <= high and port not in but]
    for port in _RANDOM.sample(choice, min(_TRIES, len(choice))):
        try:
            return try_port(host, port)
        except OSError:
            continue
    return try_port(host, 0)


def _outgoing() -> tuple[int, int]:
    """The first and the last port of outgoing connections; where the kernel does not say, those of RFC 6335."""
    try:
        low, high = _OUTGOING.read_text().split()
    except FileNotFoundError:
        return 49_152, 65_535
    return int(low), int(high)
