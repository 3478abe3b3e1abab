"""The text of a reply while it grows: what of it may be shown already, as reasoning or as content.

Invariant: all deltas together are a beginning of the final reasoning and of the final content. So text is held back
while it could still turn out to be something else: half a character, the start of a tool call, of a stop string or of
the end of reasoning, white space that the final reply drops, the token that ends the reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kat_stream.gateway.parsers.base import ToolParser
from kat_stream.gateway.parsers.reasoning import CLOSING, OPENING
from kat_stream.gateway.render import Renderer

_BROKEN = "\ufffd"


@dataclass(slots=True)
class Shown:
    """Characters of the final reply that were shown."""

    reasoning: int = 0
    content: int = 0


class StreamText:
    """Feed it all ids so far; it gives what is new and certain. `thinks`, `opened`: as for `read_reply`."""

    def __init__(
        self,
        renderer: Renderer,
        parser: ToolParser,
        stops: Sequence[str],
        *,
        thinks: bool = False,
        opened: bool = False,
    ) -> None:
        self._renderer, self._parser = renderer, parser
        self._stops = tuple(stop for stop in stops if stop)
        self._begin: int | None = 0 if opened and thinks else None
        """Where reasoning begins in the text."""
        self._content: int | None = None if thinks else 0
        """Where content begins; None while it is not known."""
        self._text = ""
        self._context = self._read = 0
        self.shown = Shown()

    def feed(self, ids: Sequence[int]) -> tuple[str, str]:
        """The next deltas of reasoning and of content, perhaps empty."""
        if ids and ids[-1] in self._renderer.stop_ids:
            ids = ids[:-1]
        self._decode(ids)
        end = _upto(self._text, self._stops)
        return self._reasoning(end), self._spoken(end)

    def _decode(self, ids: Sequence[int]) -> None:
        """Decode the new ids behind a few known ones: some tokenizers' text of an id depends on its neighbours."""
        before = self._renderer.decode(ids[self._context : self._read])
        now = self._renderer.decode(ids[self._context :])
        if len(now) > len(before) and not now.endswith(_BROKEN):
            self._text += now[len(before) :]
            self._context, self._read = self._read, len(ids)

    def _reasoning(self, end: int) -> str:
        if self._content is not None:
            return ""
        if self._begin is None:
            stripped = self._text.lstrip()
            if stripped.startswith(OPENING):
                self._begin = len(self._text) - len(stripped) + len(OPENING)
            elif not OPENING.startswith(stripped):
                self._content = 0
        if self._begin is None:
            return ""
        text = self._text[self._begin : end]
        before, closing, _ = text.partition(CLOSING)
        if closing:
            self._content = self._begin + len(before) + len(CLOSING)
        certain = before if closing else text[: _upto(text, (CLOSING,))]
        certain = certain.strip("\n")
        delta = certain[self.shown.reasoning :]
        self.shown.reasoning += len(delta)
        return delta

    def _spoken(self, end: int) -> str:
        if self._content is None:
            return ""
        text = self._text[self._content : end]
        if self._content:  # behind reasoning
            text = text.lstrip("\n")
        certain = self._certain(text)
        delta = certain[self.shown.content :]
        self.shown.content += len(delta)
        return delta

    def _certain(self, text: str) -> str:
        openings = self._parser.openings
        if not openings:
            return text
        if not self._parser.only_at_start:
            # Before a tool call white space is dropped, so it is only certain when something follows it.
            return text[: _upto(text, openings)].rstrip()
        start = text.lstrip()
        held = not start or start.startswith(openings) or any(opening.startswith(start) for opening in openings)
        return "" if held else text


def _upto(text: str, markers: Sequence[str]) -> int:
    """Where the first marker begins, or what may be the beginning of one at the end of the text."""
    ends = [at for marker in markers if (at := text.find(marker)) >= 0]
    return min(ends, default=len(text) - _beginning(text, markers))


def _beginning(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of the text that begins a marker."""
    longest = 0
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:size]):
                longest = size
                break
    return longest
