"""Long texts are encoded beside the event loop, once, and have the ids that the tokenizer gives."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat_stream.errors import ContextOverflow
from kat_stream.gateway import encoding
from kat_stream.gateway.encoding import HEAD_CHARS, LONG_CHARS, Encoder, NotEncoded
from tests.contract.gateway_kit import tokenizer
from tests.waiting import until
from topics.record import pack_ints

LONG = "so it goes " * LONG_CHARS
WAIT_S = 60.0
ENOUGH = 1 << 20
_PIECES = st.lists(st.sampled_from(["<|endoftext|>", "cat", "ls -l", "é", "x", " ", "ca"]), max_size=200)


class Slow:
    """A tokenizer that encodes when it is let go, and counts how often it did."""

    def __init__(self) -> None:
        self.backend_tokenizer = self
        self.let_go = threading.Event()
        self.asked: list[str] = []

    def get_vocab(self) -> dict[str, int]:
        return {"x": 7}

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> list[Any]:
        assert not add_special_tokens
        self.asked += texts
        assert self.let_go.wait(WAIT_S), "the event loop waits for this very text"
        return [SimpleNamespace(ids=[len(text)]) for text in texts]


class Letters(Slow):
    """Each character is a token."""

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> list[Any]:
        super().encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [SimpleNamespace(ids=[7] * len(text)) for text in texts]


def test_a_long_text_has_the_tokenizers_ids() -> None:
    real, known = Encoder(tokenizer()), Encoder(tokenizer(), aside=True)
    with pytest.raises(NotEncoded) as found:
        known.ids(LONG)
    asyncio.run(known.make_ready(found.value.text, ENOUGH))
    assert known.ids(LONG) == real.ids(LONG)
    assert real.ids("so") == pack_ints(tokenizer()("so", add_special_tokens=False)["input_ids"])


def test_the_loop_goes_on_meanwhile_and_a_groups_prompt_is_encoded_once() -> None:
    slow = Slow()
    encoder = Encoder(slow, aside=True)  # type: ignore[arg-type]

    async def meanwhile() -> None:
        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(encoder.make_ready(LONG, ENOUGH))
            await until(lambda: slow.asked)
            slow.let_go.set()  # only a loop that is free gets here

    asyncio.run(meanwhile())
    assert slow.asked == [LONG]
    assert encoder.ids(LONG) == pack_ints([len(LONG)])


def test_a_text_that_is_given_up_is_finished_before_the_next_begins() -> None:
    slow = Slow()
    encoder = Encoder(slow, aside=True)  # type: ignore[arg-type]

    async def meanwhile() -> None:
        first = asyncio.create_task(encoder.make_ready(LONG, ENOUGH))
        await until(lambda: slow.asked)
        first.cancel()
        second = asyncio.create_task(encoder.make_ready(LONG + "!", ENOUGH))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not first.done() and slow.asked == [LONG]
        slow.let_go.set()
        await second
        assert first.cancelled()

    asyncio.run(meanwhile())


@given(_PIECES, st.integers(1, 150))
def test_only_what_is_too_long_is_refused_and_not_counted_to_its_end(pieces: list[str], limit: int) -> None:
    text = "".join(pieces)
    encoder, tokens = Encoder(tokenizer()), len(Encoder(tokenizer()).ids(text)) // 4
    try:
        asyncio.run(encoder.make_ready(text, limit))
    except ContextOverflow as error:
        assert limit == error.limit <= error.tokens <= tokens


def test_a_text_is_refused_from_its_head_and_encoded_whole_if_that_is_short() -> None:
    slow = Letters()
    slow.let_go.set()
    encoder = Encoder(slow, aside=True)  # type: ignore[arg-type]
    with pytest.raises(ContextOverflow):
        asyncio.run(encoder.make_ready(LONG, 10_000))
    assert slow.asked == [LONG[: 10_000 * HEAD_CHARS + 1], LONG[10_000 * HEAD_CHARS]]
    dense = "<|endoftext|>" * LONG_CHARS
    known = Encoder(tokenizer(), aside=True)
    asyncio.run(known.make_ready(dense, LONG_CHARS + 1))
    assert known.ids(dense) == Encoder(tokenizer()).ids(dense)


def test_a_text_is_not_refused_for_a_long_token_that_its_head_ends_in() -> None:
    """As in a demo whose policy knows an agent's whole prompt by heart."""
    knows = tokenizer()
    knows.add_tokens([LONG])
    encoder = Encoder(knows, aside=True)
    asyncio.run(encoder.make_ready(LONG + "x" * 2 * LONG_CHARS, 3 * LONG_CHARS))
    asyncio.run(encoder.make_ready(LONG + LONG, 100))
    assert len(encoder.ids(LONG + LONG)) == 2 * 4


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MEMORY_BYTES", 20 * LONG_CHARS)
    slow = Slow()
    slow.let_go.set()
    encoder = Encoder(slow)  # type: ignore[arg-type]
    texts = [f"{n}" * LONG_CHARS for n in range(5)]
    for text in (*texts[:2], texts[0], *texts[2:]):
        encoder.ids(text)
    assert slow.asked == texts
    for text in texts:
        encoder.ids(text)
    assert slow.asked == texts
    encoder.ids("x" * 18 * LONG_CHARS)
    slow.asked.clear()
    encoder.ids(texts[4])
    encoder.ids(texts[0])
    assert slow.asked == [texts[0]]
