"""The other gateways of the run, and this one's own pulse: how a session is let go before another gateway claims it.

Invariant: nobody claims a session that a living gateway serves: a peer either let it go, or refuses connections (it is
dead), or was silent for RELEASE_S. A gateway that was stopped for more than STALL_S, which is shorter, must hold itself
for replaced: it answers nothing of what it had before it has forgotten all of it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from kat_stream.errors import GatewayError

log = logging.getLogger(__name__)

STALL_S = 10.0
"""A gateway whose event loop stood still for so long may have been replaced."""
RELEASE_S = 12.0
"""For a peer to let a session go."""
_BEAT_S = 0.5


class Peer(Protocol):
    """Another gateway's control side (kat_stream.gateway.GatewayControl)."""

    async def release(self, session_id: str, *, deadline_s: float) -> None:
        """It does not serve this session any more, if it ever did; GatewayError if it does not answer."""


class Peers:
    """The other gateways of the run."""

    def __init__(self, peers: Sequence[Peer] = (), release_s: float = RELEASE_S) -> None:
        self._peers, self._release_s = peers, release_s

    def __bool__(self) -> bool:
        return bool(self._peers)

    async def release(self, session_id: str) -> None:
        """Every peer that lives has let the session go; one that saw its end has said so on the log."""
        await asyncio.gather(*(self._release(peer, session_id) for peer in self._peers))

    async def _release(self, peer: Peer, session_id: str) -> None:
        try:
            await peer.release(session_id, deadline_s=self._release_s)
        except GatewayError as error:
            log.warning("session %s is taken over without its last gateway: %s", session_id, error)


class Pulse:
    """Whether this process ran all the time; matters only where somebody may replace it, and watches it then."""

    def __init__(self, stall_s: float = STALL_S) -> None:
        self._stall_s = stall_s
        self._beaten = math.inf

    def stalled(self) -> bool:
        """Whether it stood still just now, and what it knows is not forgotten yet."""
        return time.monotonic() - self._beaten > self._stall_s

    async def watch(self, forget: Callable[[], None]) -> None:
        """Beat, for ever; `forget` is called before the first beat after a stall."""
        while True:
            self.wake(forget)
            self._beaten = time.monotonic()
            await asyncio.sleep(min(_BEAT_S, self._stall_s / 4))

    def wake(self, forget: Callable[[], None]) -> None:
        """Forget, if it stood still just now."""
        if self.stalled():
            log.warning("stood still for more than %g s: sessions are read from the log again", self._stall_s)
            forget()
            self._beaten = time.monotonic()
