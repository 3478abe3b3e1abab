"""Texts to token ids; those of a long text are made beside the event loop.

Owns the tokenizer's encoder in the gateway. Invariant: what `ids` gives is what the tokenizer gives for the text. A new
prompt of 100,000 tokens takes it a tenth of a second, in which no other agent would be served; the encoder lets go of
the interpreter meanwhile. One text is encoded at a time, whoever gives up meanwhile, and none that is seen from its
head to be too long: what one session can make the others wait for is bounded by its context.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

from kat_stream.errors import ContextOverflow
from kat_stream.whole import whole
from topics.record import pack_ints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LONG_CHARS = 8192
"""1.2 to 1.5 ms of a core with the demo's and the tests' tokenizers; the way to a thread takes 0.2."""
KNOWN_CHARS = 1024
"""Texts from here on are remembered: the first prompt of a task is the same for its whole group."""
HEAD_CHARS = 8
"""For each token of the context: a text that is longer than that, and than its longest token, is mostly too long."""
_ID = 4
"""Bytes of an id."""
MEMORY_BYTES = 32 << 20
"""Of texts and their ids."""


class NotEncoded(Exception):
    """A long text has no ids yet: `await encoder.make_ready(error.text)`, then start again."""

    def __init__(self, text: str) -> None:
        super().__init__(f"a text of {len(text)} characters")
        self.text = text


class Encoder:
    """Special tokens are recognised, none is added. `aside`: `ids` refuses long texts that were not made ready."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, aside: bool = False) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._reach = max(map(len, tokenizer.get_vocab()))
        """Characters of the longest token: so far back may a text's end change the tokens before it."""
        self._aside = aside
        self._known: OrderedDict[str, bytes] = OrderedDict()
        """The newest last."""
        self._bytes = 0
        self._one = asyncio.Lock()
        """More threads at once would take the event loop's core."""

    def ids(self, text: str) -> bytes:
        """int32[n]; `NotEncoded` as the class says."""
        if len(text) < KNOWN_CHARS:
            return self._encode(text)
        ids = self._known.get(text)
        if ids is not None:
            self._known.move_to_end(text)
            return ids
        if self._aside and len(text) >= LONG_CHARS:
            raise NotEncoded(text)
        return self._remembered(text, self._encode(text))

    async def make_ready(self, text: str, limit: int) -> None:
        """Afterwards `ids` knows the text for a while. ContextOverflow if its head alone has `limit` tokens."""
        head = text[: HEAD_CHARS * limit + self._reach]
        if len(head) < len(text):
            tokens = len(await self._ready(head)) // _ID - len(await self._ready(head[-self._reach :])) // _ID
            if tokens >= limit:
                raise ContextOverflow(tokens, limit)
        await self._ready(text)

    async def _ready(self, text: str) -> bytes:
        async with self._one:
            ids = self._known.get(text)  # the prompt of a group comes many times at once
            if ids is None:
                ids = self._remembered(text, await whole(asyncio.to_thread(self._encode, text)))
            return ids

    def _remembered(self, text: str, ids: bytes) -> bytes:
        self._known[text] = ids
        self._bytes += len(text) + len(ids)
        while self._bytes > MEMORY_BYTES and len(self._known) > 1:
            old, its = self._known.popitem(last=False)
            self._bytes -= len(old) + len(its)
        return ids

    def _encode(self, text: str) -> bytes:
        # The batch's way is the one that does not keep where in the text each token stands: half the work.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return pack_ints(encoding.ids)
