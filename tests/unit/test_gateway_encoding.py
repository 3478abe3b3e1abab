"""Long texts are encoded beside the event loop, once, and have the ids that the tokenizer gives."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from kat_stream.gateway import encoding
from kat_stream.gateway.encoding import LONG_CHARS, Encoder, NotEncoded
from tests.contract.gateway_kit import tokenizer
from topics.record import pack_ints

LONG = "so it goes " * LONG_CHARS
WAIT_S = 60.0


class Slow:
    """A tokenizer that encodes when it is let go, and counts how often it did."""

    def __init__(self) -> None:
        self.backend_tokenizer = self
        self.let_go = threading.Event()
        self.asked: list[str] = []

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> list[Any]:
        assert not add_special_tokens
        self.asked += texts
        assert self.let_go.wait(WAIT_S), "the event loop waits for this very text"
        return [SimpleNamespace(ids=[len(text)]) for text in texts]


def test_a_long_text_has_the_tokenizers_ids() -> None:
    real, known = Encoder(tokenizer()), Encoder(tokenizer(), aside=True)
    with pytest.raises(NotEncoded) as found:
        known.ids(LONG)
    asyncio.run(known.make_ready(found.value.text))
    assert known.ids(LONG) == real.ids(LONG)
    assert real.ids("so") == pack_ints(tokenizer()("so", add_special_tokens=False)["input_ids"])


def test_the_loop_goes_on_meanwhile_and_a_groups_prompt_is_encoded_once() -> None:
    slow = Slow()
    encoder = Encoder(slow, aside=True)  # type: ignore[arg-type]

    async def meanwhile() -> None:
        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(encoder.make_ready(LONG))
            while not slow.asked:
                await asyncio.sleep(0.001)
            slow.let_go.set()  # only a loop that is free gets here

    asyncio.run(meanwhile())
    assert slow.asked == [LONG]
    assert encoder.ids(LONG) == pack_ints([len(LONG)])


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
