"""The text of a reply while it grows: what of it may be shown already.

Invariant: all deltas together are a beginning of the final content. So text is held back while it could still turn out
to be something else: half a character, the start of a tool call or of a stop string, the token that ends the reply.
"""

from __future__ import annotations

from collections.abc import Sequence

from kat_stream.gateway.render import Renderer

_BROKEN = "\ufffd"


class StreamText:
    """Feed it all ids so far; it gives what is new and certain. `markers`: texts that end what may be shown."""

    def __init__(self, renderer: Renderer, opening: str, stops: Sequence[str]) -> None:
        self._renderer, self._opening = renderer, opening
        self._markers = tuple(marker for marker in (opening, *stops) if marker)
        self._text = ""
        self._context = self._read = 0
        self.shown = 0

    def feed(self, ids: Sequence[int]) -> str:
        """The next delta, perhaps empty."""
        if ids and ids[-1] in self._renderer.stop_ids:
            ids = ids[:-1]
        self._decode(ids)
        upto = self._certain()
        delta = self._text[self.shown : upto]
        self.shown = max(self.shown, upto)
        return delta

    def _decode(self, ids: Sequence[int]) -> None:
        """Decode the new ids behind a few known ones: some tokenizers' text of an id depends on its neighbours."""
        before = self._renderer.decode(ids[self._context : self._read])
        now = self._renderer.decode(ids[self._context :])
        if len(now) > len(before) and not now.endswith(_BROKEN):
            self._text += now[len(before) :]
            self._context, self._read = self._read, len(ids)

    def _certain(self) -> int:
        text = self._text
        ends = [at for marker in self._markers if (at := text.find(marker)) >= 0]
        end = min(ends, default=len(text) - self._beginning())
        # Before a tool call white space is dropped, so it is only certain when something follows it.
        return len(text[:end].rstrip()) if self._opening else end

    def _beginning(self) -> int:
        """Length of the longest end of the text that begins a marker."""
        longest = 0
        for marker in self._markers:
            for size in range(min(len(marker) - 1, len(self._text)), longest, -1):
                if self._text.endswith(marker[:size]):
                    longest = size
                    break
        return longest
