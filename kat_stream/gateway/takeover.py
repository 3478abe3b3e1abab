"""Sessions move: a gateway that is asked for a session it does not know rebuilds it from `turns` and goes on with it.

Owns the claim, by which a session changes hands, and the way from records back to a session. Invariants: of a session's
turns those count that carry the newest claim before them on the log, so that every reader and every gateway agrees,
whatever a gateway that was stopped or cut off writes afterwards; a session is rebuilt from exactly those that count.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from kat_stream.errors import DeadlineExceeded, RequestRefused, TurnError
from kat_stream.gateway.calls import Call, CallService
from kat_stream.gateway.ids import unpack
from kat_stream.gateway.messages import ModelCall, Reply, ToolCall
from kat_stream.gateway.metrics import LET_GO, TAKEN_OVER, TAKEOVER_SECONDS
from kat_stream.gateway.paths import WIDTH, Node
from kat_stream.gateway.peers import Peers
from kat_stream.gateway.prompts import Prompt
from kat_stream.gateway.recording import record
from kat_stream.gateway.render import Said
from kat_stream.gateway.sessions import Session, SessionRequest, Sessions
from kat_stream.gateway.text import Text
from kat_stream.gateway.tickets import Mint, Ticket
from kat_stream.log.base import Log, TopicPartition
from topics.catalogue import key_of, partition_of
from topics.turn import Turn

log = logging.getLogger(__name__)

CLAIM = "takeover"
"""`side` of a claim."""
READ_S = 30.0
"""To read what a session said from the log."""
AT_ONCE = 4
"""Sessions that are read at the same time; others wait for these."""
_POLL_S = 0.1
_toolcalls = msgspec.json.Decoder(tuple[ToolCall, ...])


@dataclass(slots=True)
class Lineage:
    """Which turns of a session count, as they come in the order of the log."""

    session_id: str
    claim: str = ""
    turns: list[Turn] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def holds(self, turn: Turn) -> bool:
        """Whether the log was read up to this record; another gateway's claim may come right behind it."""
        return turn.turn_id in self._seen

    def add(self, turn: Turn) -> None:
        """The next record of the session's partition, whatever session it is of; one that came twice counts once."""
        if turn.session_id != self.session_id or turn.turn_id in self._seen:
            return
        if turn.side == CLAIM:
            self.claim = turn.turn_id
        elif turn.claim == self.claim:
            self.turns.append(turn)
        self._seen.add(turn.turn_id)


class Takeover:
    """Opens sessions that can move, and takes over those that other gateways opened."""

    def __init__(self, log: Log, sessions: Sessions, calls: CallService, mint: Mint, peers: Peers) -> None:
        self._log, self._sessions, self._calls, self._mint, self._peers = log, sessions, calls, mint, peers
        self._taking: dict[str, asyncio.Task[Session]] = {}
        self._asking: set[str] = set()
        """Of these, those that are not claimed yet."""
        self._readers = asyncio.Semaphore(AT_ONCE)

    async def open(self, about: SessionRequest) -> Session:
        """A new session whose key any gateway of the run can read. RequestRefused, LogError."""
        session_id = secrets.token_hex(12)
        ends = await self._log.end_offsets("turns")
        start = ends[partition_of(_claim(about, session_id), len(ends))]
        session = self._sessions.make(session_id, self._mint.key(Ticket(session_id, about, start)), about)
        self._sessions.enter(session)
        return session

    def knows(self, session_id: str, key: str) -> bool:
        """Whether the run made this key for this session."""
        ticket = self._mint.ticket(key)
        return ticket is not None and ticket.session_id == session_id

    async def admit(self, session_id: str, key: str) -> Session | None:
        """The session behind a key that this gateway does not know yet; None if the run made no such key.

        RequestRefused: it has ended elsewhere, or there are too many. LogError, DeadlineExceeded: try again.
        """
        ticket = self._mint.ticket(key)
        if ticket is None or ticket.session_id != session_id:
            return None
        task = self._taking.get(session_id)
        if task is None:
            task = self._taking[session_id] = asyncio.create_task(self._take(ticket, key))
            task.add_done_callback(lambda _: self._taking.pop(session_id, None))
        # One client that gives up does not end it for the others.
        return await asyncio.shield(task)

    async def stand_back(self, session_id: str) -> None:
        """Another gateway is about to claim this session: what was begun here ends, or is done, before it does."""
        task = self._taking.get(session_id)
        if session_id in self._asking:
            self._asking.discard(session_id)
        elif task is not None:
            await asyncio.wait({task})

    def forget(self) -> None:
        """This process stood still, so that any session may have moved: what is asked for is read from the log."""
        for session in self._sessions.open_ones():
            self._sessions.drop(session)
            self._calls.give_up(session)
            LET_GO.labels("stalled").inc()

    async def close(self) -> None:
        """Give up what is being taken over."""
        tasks = set(self._taking.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)

    async def _take(self, ticket: Ticket, key: str) -> Session:
        began = time.monotonic()
        await self._ask_for(ticket.session_id)
        claim = _claim(ticket.about, ticket.session_id)
        await record(self._log, claim, self._calls.limits.publish_s)
        session = self._sessions.make(ticket.session_id, key, ticket.about)
        async with self._readers:
            lineage = await self._read(ticket, claim)
        if lineage.claim != claim.turn_id:
            raise _moved()
        session.claim = claim.turn_id
        Rebuilt(session, self._calls).replay(lineage.turns)
        self._sessions.enter(session)
        TAKEN_OVER.inc()
        TAKEOVER_SECONDS.observe(time.monotonic() - began)
        log.info("took over session %s with %d turns", session.session_id, len(session.turns))
        return session

    async def _ask_for(self, session_id: str) -> None:
        self._asking.add(session_id)
        try:
            await self._peers.release(session_id)
        finally:
            undisturbed = session_id in self._asking
            self._asking.discard(session_id)
        if not undisturbed:
            raise _moved()

    async def _read(self, ticket: Ticket, claim: Turn) -> Lineage:
        """What the session said from its beginning up to our claim, which is on the log."""
        lineage, key = Lineage(ticket.session_id), key_of(claim)
        partitions = len(await self._log.end_offsets("turns"))
        place = TopicPartition("turns", partition_of(claim, partitions))
        try:
            async with (
                asyncio.timeout(READ_S),
                self._log.follow(
                    ("turns",), start={place: ticket.start}, partitions=(place.partition,), poll_s=_POLL_S
                ) as follower,
            ):
                while not lineage.holds(claim):
                    for delivered in await follower.poll(_POLL_S):
                        if delivered.key == key and isinstance(turn := delivered.record(), Turn):
                            lineage.add(turn)
        except TimeoutError as error:
            raise DeadlineExceeded(f"reading session {ticket.session_id} from the log", READ_S) from error
        return lineage


class Rebuilt:
    """A session on its way back: turns become places to mount at, replies, and answers to retries."""

    def __init__(self, session: Session, calls: CallService) -> None:
        self._session, self._calls = session, calls
        self._nodes: dict[str, Node] = {}
        self._said: dict[str, Said] = {}

    def replay(self, turns: Sequence[Turn]) -> None:
        """All turns of the session, each behind its parent. TurnError if one is missing."""
        answered = [self._mount(turn) for turn in turns]
        session = self._session
        for turn in turns:
            session.acknowledged(turn)
        session.completed = max((turn.index for turn in turns), default=-1) + 1
        limit = self._calls.limits.remembered_calls
        for turn, (prompt, reply) in list(zip(turns, answered, strict=True))[-limit:]:
            if turn.request and turn.finish_reason != "abort":
                session.remember(turn.request, self._answered(turn, prompt, reply), limit)

    def _mount(self, turn: Turn) -> tuple[Prompt, Reply]:
        prompt, reply = self._prompt(turn), _reply(turn)
        sampled, renderer = unpack(turn.sampled_ids), self._calls.renderer
        raw = renderer.visible(sampled, turn.finish_reason)
        node, said = self._session.conversation.add(renderer, prompt, reply, raw, sampled, side=bool(turn.side))
        self._nodes[turn.turn_id] = node
        if said is not None:
            self._said[turn.turn_id] = said
        return prompt, reply

    def _prompt(self, turn: Turn) -> Prompt:
        parent = self._nodes.get(turn.parent)
        if turn.parent and parent is None or turn.after and turn.after not in self._said:
            missing = turn.parent if parent is None else turn.after
            raise TurnError(
                f"session {turn.session_id}: turn {turn.turn_id} goes on from {missing}, which is not there"
            )
        before = parent.path()[: turn.prefix_len * WIDTH] if parent is not None else b""
        ids = before + turn.prompt_ids
        return Prompt(
            ids=ids,
            tokens=len(ids) // WIDTH,
            parent=parent,
            prefix_len=turn.prefix_len,
            fork=turn.fork,
            thread=turn.thread,
            digest=turn.conversation,
            messages=turn.messages,
            tools=turn.tools,
            text=Text(turn.prompt_chars, turn.prompt_hash),
            opened=False,
            said=self._said.get(turn.after),
            appends=turn.parent == turn.after != "",
        )

    def _answered(self, turn: Turn, prompt: Prompt, reply: Reply) -> Call:
        """The call as it was when its turn was acknowledged, for a client that never got its answer."""
        asked = ModelCall(dialect=turn.dialect, messages=())
        call = Call(self._session, asked, prompt, turn.request, turn.side, self._calls)
        call.turn_id = turn.turn_id
        call.result.set_result(reply)
        call.let_go()
        # Who went on from an answer has seen it: the same body again is a call of its own.
        call.delivered = turn.turn_id in self._said and self._said[turn.turn_id].extended
        return call


def _moved() -> RequestRefused:
    return RequestRefused("another gateway takes this session; ask again", status=503, code="session_moved")


def _reply(turn: Turn) -> Reply:
    prompt_tokens = turn.prefix_len + len(turn.prompt_ids) // WIDTH
    return Reply(
        turn_id=turn.turn_id,
        content=turn.content,
        reasoning=turn.reasoning,
        ill_formed=turn.ill_formed,
        tool_calls=_toolcalls.decode(turn.tool_calls) if turn.tool_calls else (),
        finish_reason=turn.finish_reason,
        matched_stop=turn.matched_stop,
        prompt_tokens=prompt_tokens,
        completion_tokens=len(turn.sampled_ids) // WIDTH,
        cached_tokens=turn.cached_tokens,
    )


def _claim(about: SessionRequest, session_id: str) -> Turn:
    """What says on the log that a session changed hands."""
    return Turn(
        run=about.run,
        group_id=about.group_id,
        rollout_id=about.rollout_id,
        session_id=session_id,
        turn_id=uuid.uuid4().hex,
        index=-1,
        prompt_ids=b"",
        sampled_ids=b"",
        logprobs=b"",
        spans=(),
        finish_reason="abort",
        trainable=False,
        dialect="",
        side=CLAIM,
    )
