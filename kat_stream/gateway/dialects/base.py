"""What a dialect is: bytes of a request to the internal form, and the internal form to bytes of an answer. No I/O."""

from __future__ import annotations

from typing import Protocol

from kat_stream.errors import RequestRefused
from kat_stream.gateway.messages import ModelCall, Reply


class ReplyStream(Protocol):
    """One streamed answer, in the order start, text*, end; `failed` instead of what is left."""

    def start(self) -> bytes: ...
    def text(self, delta: str) -> bytes: ...
    def end(self, reply: Reply, shown: int) -> bytes:
        """The rest of the content behind its first `shown` characters, tool calls, finish reason, usage."""

    def failed(self, error: RequestRefused) -> bytes: ...


class Dialect(Protocol):
    name: str

    def read(self, body: bytes) -> ModelCall:
        """RequestRefused naming the field at fault."""

    def reply(self, asked: ModelCall, reply: Reply) -> bytes: ...
    def stream(self, asked: ModelCall, turn_id: str) -> ReplyStream: ...
    def error(self, error: RequestRefused) -> bytes: ...
    def models(self, name: str) -> bytes: ...
