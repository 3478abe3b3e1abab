"""Sessions: one rollout's right to call the model, and all it has said.

Owns who may call and what was called. Invariants: a session's turns are those that the log acknowledged, in the order
of their completion; nothing is added after it closed. Its key opens it alone, and stands in no record or log line.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import TYPE_CHECKING, Literal

import msgspec

from kat_stream.errors import GatewayError, RequestRefused
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.metrics import SESSIONS
from kat_stream.gateway.prompts import Conversation
from topics.request import Sampling
from topics.turn import Turn

if TYPE_CHECKING:
    from kat_stream.gateway.calls import Call

Purpose = Literal["train", "eval"]


class SessionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /sessions."""

    run: str
    group_id: str
    rollout_id: str
    sampling: Sampling = Sampling()
    purpose: Purpose = "train"

    def __post_init__(self) -> None:
        if self.sampling.max_new_tokens < 1 or self.sampling.max_context < 2:
            raise ValueError("sampling: max_new_tokens must be at least 1, max_context at least 2")


class SessionHandle(msgspec.Struct, frozen=True, kw_only=True):
    """What opens a session: `path` goes behind the data listener's address, `key` is the API key."""

    session_id: str
    key: str
    path: str

    def __repr__(self) -> str:
        # Whatever is printed or logged, the key is not.
        return f"SessionHandle({self.session_id})"


class SessionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One open session, for people: no key."""

    session_id: str
    rollout_id: str
    group_id: str
    turns: int
    in_flight: int
    age_s: float


@dataclass(slots=True, eq=False)
class Session:
    session_id: str
    key: str = field(repr=False)
    about: SessionRequest
    conversation: Conversation = field(default_factory=Conversation)
    turns: list[Turn] = field(default_factory=list)
    """Acknowledged, as they were completed."""
    _answered: Counter[bool] = field(default_factory=Counter)
    running: set[Call] = field(default_factory=set)
    recent: OrderedDict[bytes, list[Call]] = field(default_factory=OrderedDict)
    """Calls by the digest of their body, the newest last."""
    requests: int = 0
    """Being read or answered."""
    body_bytes: int = 0
    """Of those requests whose call has not begun, in memory."""
    encoding: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a long text of the session waits for its ids."""
    allowance: float = 0.0
    """Requests that may come at once, as of `allowed_at`."""
    allowed_at: float = field(default_factory=time.monotonic)
    closed: bool = False
    moved: bool = False
    """Another gateway has it: what this one still does for it is given up, and agents are to ask again."""
    claim: str = ""
    """The takeover under which this gateway has it; empty if it opened the session."""
    completed: int = 0
    """Turns that were given an index."""
    opened: float = field(default_factory=time.monotonic)
    used: float = field(default_factory=time.monotonic)

    def next_index(self) -> int:
        """The place of a completed turn. A turn that the log refuses leaves a gap, never a double."""
        self.completed += 1
        return self.completed - 1

    def acknowledged(self, turn: Turn) -> None:
        """The log has this turn."""
        self.turns.append(turn)
        self._answered[bool(turn.side)] += turn.finish_reason != "abort"

    def answered(self, *, side: bool = False) -> int:
        """Turns of the task's own work, or side requests, that came to an end of their own."""
        return self._answered[side]

    def spend(self, rate: float, burst: int) -> bool:
        """Whether one more request keeps the session within `rate` a second, `burst` at once."""
        now = time.monotonic()
        self.allowance = min(float(burst), self.allowance + (now - self.allowed_at) * rate)
        self.allowed_at = now
        if self.allowance < 1:
            return False
        self.allowance -= 1
        return True

    def remember(self, digest: bytes, call: Call, limit: int) -> None:
        """Keep a call for retries of it."""
        self.recent.setdefault(digest, []).append(call)
        self.recent.move_to_end(digest)
        while len(self.recent) > limit and not any(old in self.running for old in next(iter(self.recent.values()))):
            self.recent.popitem(last=False)

    def status(self) -> SessionStatus:
        return SessionStatus(
            session_id=self.session_id,
            rollout_id=self.about.rollout_id,
            group_id=self.about.group_id,
            turns=len(self.turns),
            in_flight=len(self.running),
            age_s=time.monotonic() - self.opened,
        )


def ended(session: Session) -> RequestRefused:
    """The answer to whoever asks for more of a session that this gateway has no more."""
    if session.moved:
        return RequestRefused("this session has moved; ask again", status=503, code="session_moved")
    return over()


def over() -> RequestRefused:
    """The answer to whoever asks for more of a session that has ended."""
    return RequestRefused("this session has ended", status=409, code="session_ended")


class Sessions:
    """All sessions of a gateway, the closed ones for a while, and for longer that they ended."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: dict[str, Session] = {}
        self._closed: OrderedDict[str, Session] = OrderedDict()
        self._ended: dict[str, None] = {}
        """The newest last."""

    def open(self, about: SessionRequest) -> Session:
        """A new session; RequestRefused (503) when there are too many."""
        session = self.make(secrets.token_hex(12), secrets.token_hex(24), about)
        self.enter(session)
        return session

    def make(self, session_id: str, key: str, about: SessionRequest) -> Session:
        """A session that nobody can call yet."""
        return Session(session_id, key, about, allowance=float(self._limits.request_burst))

    def check_room(self) -> None:
        """RequestRefused (503) when there are too many."""
        if len(self._open) >= self._limits.sessions:
            raise RequestRefused(f"{len(self._open)} sessions are open", status=503, code="too_many_sessions")

    def enter(self, session: Session) -> None:
        """From now on it can be called; RequestRefused (503) when there are too many."""
        self.check_room()
        self._open[session.session_id] = session
        SESSIONS.set(len(self._open))

    def drop(self, session: Session) -> None:
        """Know nothing of it any more."""
        session.closed = session.moved = True
        self._leave(session)

    def admit(self, session_id: str, key: str) -> Session:
        """The session that this key opens. RequestRefused: 404 unknown, 401 wrong key, 409 ended, 503 moved."""
        session = self.get(session_id)
        if session is None:
            raise RequestRefused("there is no such session", status=404, code="session_not_found")
        if not compare_digest(session.key.encode(), key.encode(errors="surrogateescape")):
            raise RequestRefused("Incorrect API key provided.", status=401, code="invalid_api_key")
        if session.closed or self.has_ended(session_id):  # one that is back has come to hand its turns over again
            raise ended(session)
        session.used = time.monotonic()
        return session

    def get(self, session_id: str) -> Session | None:
        """A session, open or closed not long ago."""
        return self._open.get(session_id) or self._closed.get(session_id)

    def has_ended(self, session_id: str) -> bool:
        """Whether a session ended here, also when no more is known of it."""
        return session_id in self._ended

    def find(self, session_id: str) -> Session:
        """As `get`; GatewayError if there is none."""
        session = self.get(session_id)
        if session is None:
            raise GatewayError(f"there is no session {session_id}")
        return session

    def retire(self, session: Session) -> None:
        """The session takes no more calls; its turns can be asked for again for a while."""
        session.closed = True
        self._leave(session)
        if session.moved:
            return
        self._closed[session.session_id] = session
        self._ended[session.session_id] = None
        if len(self._ended) > self._limits.remembered_ends:
            del self._ended[next(iter(self._ended))]
        while len(self._closed) > self._limits.remembered_sessions:
            self._closed.popitem(last=False)

    def _leave(self, session: Session) -> None:
        if self._open.get(session.session_id) is session:  # it may be back already, as another object
            del self._open[session.session_id]
        SESSIONS.set(len(self._open))

    def idle(self) -> list[Session]:
        """Open sessions that nobody has used for too long."""
        now = time.monotonic()
        return [s for s in self._open.values() if not s.running and now - s.used > self._limits.idle_s]

    def open_ones(self) -> list[Session]:
        return list(self._open.values())
