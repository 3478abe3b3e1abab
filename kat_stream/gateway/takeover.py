"""Sessions move: a gateway that is asked for a session it does not know rebuilds it from `turns` and goes on with it.

Owns the claim, by which a session changes hands, the end, and the way from records back to a session. Invariants: of
what a session's gateways write that counts which carries the newest claim before it on the log, and no turn behind an
end, so that every reader and every gateway agrees, whatever a gateway that was stopped or cut off writes afterwards; a
session is rebuilt from exactly the turns that count, and one that has ended stays so as long as its key can be read.
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

from kat_stream.errors import DeadlineExceeded, LogError, RequestRefused, TurnError
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

CLAIM, END = "takeover", "end"
"""`side` of a claim, and of what says that a session has ended (topics.turn:MARKS)."""
END_S = 5.0
"""To say so: its worker waits for it, and a peer that asks for the session, no longer than RELEASE_S for all."""
STAND_BACK_S = 4.0
"""For a session that was claimed to be here, before it is left to a peer that asks for it and waits RELEASE_S."""
READ_S = 30.0
"""To read what a session said from the log."""
AT_ONCE = 4
"""Sessions that are read at the same time; others wait for these."""
_POLL_S = 0.1
_toolcalls = msgspec.json.Decoder(tuple[ToolCall, ...])


@dataclass(slots=True)
class Lineage:
    """What counts of a session, as it comes in the order of the log."""

    session_id: str
    claim: str = ""
    ended: bool = False
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
            if turn.side == END:
                self.ended = True
            elif not self.ended:
                self.turns.append(turn)
        self._seen.add(turn.turn_id)


@dataclass(slots=True, eq=False)
class _Move:
    """A session on its way here."""

    disturbed: bool = False
    """Another gateway asked for it since, or may have: it is not ours."""
    claimed: bool = False
    """Our claim is on the log, or on its way there."""


class Takeover:
    """Opens sessions that can move, takes over those that other gateways opened, and ends them."""

    def __init__(self, log: Log, sessions: Sessions, calls: CallService, mint: Mint, peers: Peers) -> None:
        self._log, self._sessions, self._calls, self._mint, self._peers = log, sessions, calls, mint, peers
        self._taking: dict[str, tuple[_Move, asyncio.Task[Session]]] = {}
        self._readers = asyncio.Semaphore(AT_ONCE)

    async def open(self, about: SessionRequest) -> Session:
        """A new session whose key any gateway of the run can read. RequestRefused, LogError."""
        session_id = secrets.token_hex(12)
        ends = await self._log.end_offsets("turns")
        start = ends[partition_of(_mark(CLAIM, about, session_id), len(ends))]
        session = self._sessions.make(session_id, self._mint.key(Ticket(session_id, about, start)), about)
        self._sessions.enter(session)
        return session

    async def end(self, session: Session) -> None:
        """Say on the log that the session has ended, for whoever reads it back.

        Where the log is away that is only logged: the turns, which the worker waits for, are on it.
        """
        mark = _mark(END, session.about, session.session_id, session.claim)
        try:
            await record(self._log, mark, END_S)
        except LogError as error:
            log.warning("that session %s has ended is not on the log: %s", session.session_id, error)

    def knows(self, session_id: str, key: str) -> bool:
        """Whether the run made this key for this session."""
        ticket = self._mint.ticket(key)
        return ticket is not None and ticket.session_id == session_id

    async def admit(self, session_id: str, key: str) -> Session | None:
        """The session behind a key that this gateway does not know yet, closed if it has ended; None: no such key.

        RequestRefused: there are too many, or another gateway takes it. LogError, DeadlineExceeded: try again.
        """
        ticket = self._mint.ticket(key)
        if ticket is None or ticket.session_id != session_id:
            return None
        if session_id not in self._taking:
            move = _Move()
            task = asyncio.create_task(self._take(ticket, key, move))
            self._taking[session_id] = move, task
            task.add_done_callback(lambda _: self._taking.pop(session_id, None))
        # One client that gives up does not end it for the others.
        return await asyncio.shield(self._taking[session_id][1])

    async def stand_back(self, session_id: str) -> None:
        """Another gateway is about to claim this session: what was begun here ends, or is done, before it does."""
        if session_id in self._taking:
            move, task = self._taking[session_id]
            if move.claimed:
                await asyncio.wait({task}, timeout=STAND_BACK_S)
            move.disturbed = True

    def forget(self) -> None:
        """This process stood still, so that any session may have moved: what is asked for is read from the log."""
        for move, _ in self._taking.values():
            move.disturbed = True
        for session in self._sessions.open_ones():
            self._sessions.drop(session)
            self._calls.give_up(session)
            LET_GO.labels("stalled").inc()

    async def close(self) -> None:
        """Give up what is being taken over."""
        tasks = {task for _, task in self._taking.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)

    async def _take(self, ticket: Ticket, key: str, move: _Move) -> Session:
        began = time.monotonic()
        # What would fail behind the claim would fail, and write one, at each request.
        self._sessions.check_room()
        place = await self._place(ticket)
        await self._peers.release(ticket.session_id)
        claim = await self._claim(ticket, move)
        session = self._sessions.make(ticket.session_id, key, ticket.about)
        async with self._readers:
            lineage = await self._read(ticket, place, claim)
        self._check(move)
        if lineage.claim != claim.turn_id:
            raise _moved()
        session.claim = claim.turn_id
        if lineage.ended:
            session.turns = lineage.turns
            self._sessions.retire(session)
            return session
        Rebuilt(session, self._calls).replay(lineage.turns)
        self._sessions.enter(session)
        TAKEN_OVER.inc()
        TAKEOVER_SECONDS.observe(time.monotonic() - began)
        log.info("took over session %s with %d turns", session.session_id, len(session.turns))
        return session

    async def _place(self, ticket: Ticket) -> TopicPartition:
        """Where the session's turns are; LogError if the first of them may be there no more."""
        begins = await self._log.beginning_offsets("turns")
        partition = partition_of(_mark(CLAIM, ticket.about, ticket.session_id), len(begins))
        if ticket.start < begins[partition]:
            raise LogError(f"session {ticket.session_id}: turns[{partition}] is not kept from {ticket.start} on")
        return TopicPartition("turns", partition)

    async def _claim(self, ticket: Ticket, move: _Move) -> Turn:
        self._check(move)
        claim, move.claimed = _mark(CLAIM, ticket.about, ticket.session_id), True
        await record(self._log, claim, self._calls.limits.publish_s)
        return claim

    def _check(self, move: _Move) -> None:
        if move.disturbed or self._calls.pulse.stalled():
            raise _moved()

    async def _read(self, ticket: Ticket, place: TopicPartition, claim: Turn) -> Lineage:
        """What the session said from its beginning up to our claim, which is on the log."""
        lineage, key = Lineage(ticket.session_id), key_of(claim)
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


def _mark(side: str, about: SessionRequest, session_id: str, claim: str = "") -> Turn:
    """What says on the log that a session changed hands, or has ended."""
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
        side=side,
        claim=claim,
    )
