"""Bounds of the gateway: sizes, numbers and waits. Nothing here is a user's option; tests make them small."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Times in seconds."""

    body_bytes: int = 16 * MIB
    session_body_bytes: int = 64 * MIB
    """Of all requests of a session whose calls have not begun."""
    headers_s: float = 10.0
    """For a new connection to send its first request's head."""
    connections: int = 4096
    """At the agents' port; beyond it those that have not shown a session's key yet are closed, the oldest first."""
    session_connections: int = 128
    """Of a session; beyond it the oldest is closed."""
    linger_s: float = 1.0
    """For a client to stop sending after it was refused."""
    requests_per_s: float = 50.0
    """Of a session, in the long run."""
    request_burst: int = 500
    """Of a session, at once."""
    body_s: float = 30.0
    """To send a whole request body."""
    write_s: float = 60.0
    """To take a piece of a stream."""
    stream_tokens: int = 64
    """Between two pieces of a streamed reply. An engine repeats in each all that it sampled: to read one for each token
    costs the square of a reply's length."""
    keepalive_s: float = 1.0
    """Between two signs of life in a silent stream."""
    call_s: float = 600.0
    """For one model call, waits for engines and their pauses included."""
    engine_attempts: int = 4
    """Engines that may break off in one call."""
    publish_s: float = 30.0
    """For the log to acknowledge a turn."""
    abort_s: float = 5.0
    """For an engine to hand over what it has of an aborted call."""
    disconnect_grace_s: float = 2.0
    """How long a call whose client went away waits for the client's retry; agents retry within 0.2 to 2.3 s."""
    calls_per_session: int = 32
    """At once."""
    requests_per_session: int = 64
    """At once; more than calls, as retries join the call they repeat."""
    sessions: int = 4096
    idle_s: float = 3600.0
    """A session without a call for so long was forgotten by its worker."""
    remembered_calls: int = 8
    """Newest calls of a session that a retry can join."""
    remembered_sessions: int = 256
    """Closed sessions whose turns can be asked for again."""
    remembered_ends: int = 100_000
    """Closed sessions of which it is known that they ended; of others the log says so."""
