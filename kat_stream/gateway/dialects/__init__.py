"""Wire formats that agents speak, one a file, behind one protocol."""

from kat_stream.gateway.dialects.base import Dialect, ReplyStream
from kat_stream.gateway.dialects.chat import ChatCompletions

__all__ = ["ChatCompletions", "Dialect", "ReplyStream"]
