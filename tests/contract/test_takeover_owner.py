"""A session has one owner: only its key moves it, what an owner before writes does not count, and an end is an end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat_stream.errors import ConfigError
from kat_stream.gateway.app import SessionHandle
from kat_stream.gateway.limits import Limits
from kat_stream.gateway.sessions import SessionRequest
from kat_stream.gateway.takeover import CLAIM, END, READ_S, Lineage
from kat_stream.gateway.tickets import SECRET_FILE, Mint, Ticket, run_secret
from kat_stream.log import Message
from kat_stream.log.message import seal
from tests.contract.gateway_kit import saying, user
from tests.contract.takeover_kit import gateways
from tests.unit import records
from tests.waiting import until
from topics import Turn
from topics.record import decode

pytestmark = pytest.mark.anyio


async def test_what_a_living_gateway_was_doing_is_recorded_as_aborted_before_the_session_moves() -> None:
    async with gateways(saying("x" * 400), token_s=0.01) as them:
        handle = await them.open()
        answers: list[tuple[int, Any]] = []

        async def ask() -> None:
            answers.append(await them.post(0, handle, {"messages": [user("go")]}))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await until(lambda: them.engine.in_flight == 1)
            assert (await them.post(1, handle, {"messages": [user("other")], "max_tokens": 2}))[0] == 200
        assert answers[0][0] == 503 and answers[0][1]["error"]["code"] == "session_moved"
        first, claim, second = await them.turns()
        assert (first.finish_reason, claim.side, second.claim) == ("abort", CLAIM, claim.turn_id)


async def test_a_turn_that_a_replaced_gateway_still_writes_does_not_count() -> None:
    async with gateways(saying("one", "two", "three"), number=3) as them:
        handle = await them.open()
        await them.talk(handle, [0, 1])
        first, *_ = turns = await them.turns()
        late = msgspec.structs.replace(first, turn_id="late", index=1, parent=first.turn_id)
        await them.log.publish(late)
        counted = await them.close_at(2, handle)
        assert [turn.turn_id for turn in counted] == [turns[0].turn_id, turns[2].turn_id]


async def test_a_claim_right_behind_ours_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateways(saying("one", "two")) as them:
        handle = await them.open()
        await them.say(0, handle, [user("go")])
        append = them.log.append

        async def raced(*messages: Message, deadline_s: float = 30.0) -> None:
            """Another gateway's claim comes onto the log before anybody can read ours."""
            claim = decode(Turn, messages[0].value)
            assert claim.side == CLAIM
            monkeypatch.undo()
            other = msgspec.structs.replace(claim, turn_id="other")
            await append(*messages, seal(other), deadline_s=deadline_s)

        monkeypatch.setattr(them.log, "append", raced)
        with anyio.fail_after(READ_S / 3):
            status, body = await them.post(1, handle, {"messages": [user("go")]})
        assert (status, body["error"]["code"]) == (503, "session_moved")
        again = await them.say(1, handle, [user("go")])
        assert again["content"] == "one"  # the retry of the call that was answered


async def test_a_session_that_ended_at_a_living_gateway_has_ended_everywhere() -> None:
    async with gateways(saying("one")) as them:
        handle = await them.open()
        await them.say(0, handle, [user("go")])
        await them.control(0).close(handle.session_id)
        status, body = await them.post(1, handle, {"messages": [user("go")]})
        assert (status, body["error"]["code"]) == (409, "session_ended")
        assert len(them.engine.requests) == 1


async def test_a_session_that_ended_stays_ended_when_later_ones_have_ended() -> None:
    async with gateways(saying("one"), limits=Limits(remembered_sessions=1)) as them:
        ended, later = await them.open(), await them.open("r1g1s1")
        await them.talk(ended, [0])
        control = them.control(0)
        for handle in (ended, later):
            await control.close(handle.session_id)
        for number in range(2):
            assert (await them.post(number, ended, {"messages": [user("again")]}))[0] == 409
        assert await control.sessions() == [] and len(them.engine.requests) == 1


async def test_only_its_own_key_moves_a_session() -> None:
    async with gateways(saying("one")) as them:
        mine, other = await them.open(), await them.open("r1g1s1")
        about = SessionRequest(run="r1", group_id="g1", rollout_id="r1g1s0")
        strangers = {
            "another session's": other.key,
            "cut": mine.key[:-1],
            "of another run": Mint(b"t" * 32).key(Ticket(mine.session_id, about, 0)),
            "no ticket": "key",
            "odd": "ä.ä",
        }
        for key in strangers.values():
            forged = SessionHandle(session_id=mine.session_id, key=key, path=mine.path)
            assert (await them.post(1, forged, {"messages": [user("go")]}))[0] == 404, key
        assert await them.turns() == []


async def test_two_gateways_that_claim_at_once_leave_one_owner_and_one_line() -> None:
    async with gateways(saying("one", "two", "three", "four"), number=3) as them:
        handle = await them.open()
        messages = await them.talk(handle, [0])
        await them.servers[0].close()
        statuses: list[int] = []

        async def ask(number: int) -> None:
            async def answered() -> int:
                status, _ = await them.post(number, handle, {"messages": messages})
                return 0 if status == 503 else status

            statuses.append(await until(answered, "an owner"))

        async with anyio.create_task_group() as group:
            group.start_soon(ask, 1)
            group.start_soon(ask, 2)
        assert statuses == [200, 200]
        lineage = Lineage(handle.session_id)
        for turn in await them.turns():
            lineage.add(turn)
        counted = [turn for turn in lineage.turns if turn.finish_reason != "abort"]
        # A call that was aborted is in the tree too: the same prompt again shares most with it and hangs below it.
        assert {turn.parent for turn in counted[1:]} <= {turn.turn_id for turn in lineage.turns}
        assert len(await them.close_at(1, handle)) == len(lineage.turns)


def test_the_secret_of_a_run_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    first = run_secret(tmp_path)
    assert run_secret(tmp_path) == first and len(first) == 32
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o077 == 0


def test_gateways_that_begin_at_once_have_one_secret(tmp_path: Path) -> None:
    """In threads of one process, as in containers, the process id tells none from another."""
    with ThreadPoolExecutor(8) as pool:
        for number in range(50):
            (folder := tmp_path / str(number)).mkdir()
            made = list(pool.map(run_secret, [folder] * 8))
            assert len(set(made)) == 1 and [file.name for file in folder.iterdir()] == [SECRET_FILE]


@pytest.mark.parametrize("left", [b"", b"s" * 31])
def test_a_secret_that_was_cut_is_refused(tmp_path: Path, left: bytes) -> None:
    (tmp_path / SECRET_FILE).write_bytes(left)
    with pytest.raises(ConfigError, match=r"gateway\.secret.*remove it"):
        run_secret(tmp_path)


_EVENTS = st.lists(
    st.tuples(st.sampled_from(["turn", "claim", "stale", "again", "other", "end", "stale end"]), st.integers(0, 5)),
    max_size=30,
)


@given(_EVENTS)
def test_every_reader_agrees_which_turns_count(events: list[tuple[str, int]]) -> None:
    """Against the rule as it is said: a turn counts if it carries the newest claim before it, once, and no end that
    counts is before it."""
    written: list[Turn] = []
    claims, expected, ended = [""], [], False
    for number, (kind, which) in enumerate(events):
        name = f"t{number}"
        claim = claims[min(which, len(claims) - 1)] if "stale" in kind else claims[-1]
        session = "other" if kind == "other" else "s"
        side = CLAIM if kind == "claim" else END if "end" in kind else ""
        turn = records.turn(records.request(), [], [], name=name, session_id=session, side=side, claim=claim)
        if kind == "again" and written:
            turn = written[which % len(written)]
        elif kind == "claim":
            claims.append(name)
        elif side == END:
            ended = ended or claim == claims[-1]
        elif kind != "other" and claim == claims[-1] and not ended:
            expected.append(name)
        written.append(turn)
    lineage = Lineage("s")
    for turn in written:
        lineage.add(turn)
    assert [turn.turn_id for turn in lineage.turns] == expected
    assert (lineage.claim, lineage.ended) == (claims[-1], ended)
