"""Prompts that are long, or far too long: nobody waits for another session's for long (promise 8)."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import pytest

from kat_stream.gateway.encoding import HEAD_CHARS, LONG_CHARS, Encoder, NotEncoded
from kat_stream.gateway.limits import Limits
from tests.contract.gateway_kit import saying, user, world
from tests.waiting import until
from topics import Sampling

pytestmark = pytest.mark.anyio

CHAT = "v1/chat/completions"


class Gated:
    """The encoder of the gateway under test: it begins a long text, and goes on when it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let_go = threading.Event()
        self.waiting = 0
        self.begun: list[str] = []
        self.longest = 0
        ids, encode = Encoder.ids, Encoder._encode

        def asked(encoder: Encoder, text: str) -> bytes:
            try:
                return ids(encoder, text)
            except NotEncoded:
                self.waiting += 1
                raise

        def encoded(encoder: Encoder, text: str) -> bytes:
            self.longest = max(self.longest, len(text))
            if len(text) >= LONG_CHARS:
                self.begun.append(text)
                assert self.let_go.wait(60.0)
            return encode(encoder, text)

        monkeypatch.setattr(Encoder, "ids", asked)
        monkeypatch.setattr(Encoder, "_encode", encoded)


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Gated:
    return Gated(monkeypatch)


def _long(name: str, chars: int = 10_000) -> dict[str, Any]:
    return {"model": "m", "messages": [user(f"{name} " + "x" * chars)]}


async def test_long_prompts_of_a_session_wait_for_each_other_and_not_others_for_them(gated: Gated) -> None:
    async with world(saying("ls")) as w:
        mine, other = await w.session(), await w.session()
        async with anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(w.post, mine, CHAT, _long(f"mine {number}"))
            await until(lambda: gated.waiting == 6 and len(gated.begun) == 1)
            group.start_soon(w.post, other, CHAT, _long("other"))
            await until(lambda: gated.waiting == 7)
            assert (await w.post(other, CHAT, {"model": "m", "messages": [user("short")]}))[0] == 200
            gated.let_go.set()
        assert ["other" in text for text in gated.begun].index(True) == 1 and len(gated.begun) == 7
        assert len(await w.control.close(mine.session_id)) == 6


@pytest.mark.parametrize("path", [CHAT, "v1/messages/count_tokens"])
async def test_a_prompt_that_is_far_too_long_is_not_encoded_to_its_end(gated: Gated, path: str) -> None:
    async with world(saying("ls")) as w:
        status, body = await w.post(await w.session(Sampling(max_context=1000)), path, _long("mine", 1_000_000))
        if path == CHAT:
            assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        else:
            assert status == 200 and 1000 <= body["input_tokens"] <= 1_000_000
        assert HEAD_CHARS * 1000 <= gated.longest < HEAD_CHARS * 1000 + LONG_CHARS


async def test_a_prompt_that_waits_for_its_ids_takes_room_and_has_a_deadline(gated: Gated) -> None:
    async with world(saying("ls"), limits=Limits(session_body_bytes=15_000, call_s=0.3)) as w:
        mine, other = await w.session(), await w.session()
        answers: list[int] = []

        async def ask() -> None:
            answers.append((await w.post(mine, CHAT, _long("mine")))[0])

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await until(lambda: len(gated.begun) == 1)
            assert (await w.post(mine, CHAT, _long("again")))[0] == 429
            status, body = await w.post(other, CHAT, _long("other"))
            assert status == 503 and "DeadlineExceeded" in body["error"]["message"]
            gated.let_go.set()
        assert answers == [503]
        for name in ("mine", "again"):
            assert (await w.post(mine, CHAT, _long(name)))[0] == 200


async def test_a_call_that_has_begun_leaves_its_room_to_the_next() -> None:
    async with world(saying("ls"), token_s=0.02, limits=Limits(session_body_bytes=15_000)) as w:
        mine = await w.session()
        async with anyio.create_task_group() as group:
            group.start_soon(w.post, mine, CHAT, _long("first"))
            await until(lambda: w.engines[0].in_flight == 1)
            await w.router.list()[0].engine.pause("retract")
            group.start_soon(w.post, mine, CHAT, _long("second"))
            await until(lambda: len(w.engines[0].requests) == 2)
            await w.router.list()[0].engine.resume()
        assert len(await w.control.close(mine.session_id)) == 2
