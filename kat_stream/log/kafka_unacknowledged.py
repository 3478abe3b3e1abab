"""How long the oldest send has waited for its acknowledgement: the metric `kat_unacknowledged_seconds`.

With too few copies in sync a broker neither takes a send nor refuses it (research/kafka_real.md 5.5): a stage that
waits for it looks like one without work. Invariant: a send counts from its call to its end, however it ends; one that
is tried again counts anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from kat_stream.telemetry import UNACKNOWLEDGED

_BEGUN: dict[object, float] = {}
"""Sends under way and when (monotonic) they began, of all logs of this process."""


@contextmanager
def unacknowledged() -> Iterator[None]:
    """A send is under way."""
    send = object()
    _BEGUN[send] = time.monotonic()
    try:
        yield
    finally:
        del _BEGUN[send]


def oldest_s() -> float:
    """Age of the oldest send that is under way; 0 without any."""
    begun = tuple(_BEGUN.values())  # at once: metrics are read on another thread
    return time.monotonic() - min(begun) if begun else 0.0


UNACKNOWLEDGED.set_function(oldest_s)
