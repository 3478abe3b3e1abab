"""The text of a prompt, known by its length and digest. Pure.

Invariant: equal texts have equal digests in every process, however they were put together.
"""

from __future__ import annotations

from hashlib import blake2b


class Text:
    """The text of a prompt, as its length and 16 bytes of digest; more can be put behind it if it was seen here."""

    __slots__ = ("_hash", "chars", "digest")

    def __init__(self, chars: int, digest: bytes, hashed: blake2b | None = None) -> None:
        self.chars, self.digest, self._hash = chars, digest, hashed

    @classmethod
    def of(cls, text: str, cut: int = 0) -> tuple[bytes, Text]:
        """The digest of the first `cut` characters, and the whole: a long text is gone through once."""
        hashed = blake2b(_utf8(text[:cut]), digest_size=16)
        before = hashed.digest()
        hashed.update(_utf8(text[cut:]))
        return before, cls(len(text), hashed.digest(), hashed)

    @property
    def seen(self) -> bool:
        """Whether the text itself was here: of a session that moved only the digest is known."""
        return self._hash is not None

    def with_more(self, text: str) -> Text:
        """The text with this behind it; only if it was seen."""
        assert self._hash is not None
        hashed = self._hash.copy()
        hashed.update(_utf8(text))
        return Text(self.chars + len(text), hashed.digest(), hashed)


def text_digest(text: str) -> bytes:
    """16 bytes that are equal for equal texts, in every process."""
    return blake2b(_utf8(text), digest_size=16).digest()


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
