"""A session's key as a ticket: what any gateway of the run needs to know of a session that it has never seen.

Invariant: only who has the run's secret can make a key, and a key opens the one session that it names. What a key says
is no secret (its agent may read it); the secret stands in a file that only the run's owner can read.
"""

from __future__ import annotations

import hmac
import os
import secrets
import uuid
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as NotBase64
from pathlib import Path

import msgspec

from kat_stream.errors import ConfigError
from kat_stream.gateway.sessions import SessionRequest

SECRET_FILE = "gateway.secret"
_SECRET_BYTES = 32
_LONGEST = 4096
"""Characters of a key that are looked at."""


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """How a session was opened; `start` is where its group's partition of `turns` ended then."""

    session_id: str
    about: SessionRequest
    start: int


_ticket = msgspec.msgpack.Decoder(Ticket)


class Mint:
    """Makes keys of tickets and reads them."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def key(self, ticket: Ticket) -> str:
        said = urlsafe_b64encode(msgspec.msgpack.encode(ticket)).decode()
        return f"{said}.{self._mark(said)}"

    def ticket(self, key: str) -> Ticket | None:
        """What a key says; None if this run made no such key."""
        said, _, mark = key.partition(".")
        if len(key) > _LONGEST or not key.isascii() or not hmac.compare_digest(mark, self._mark(said)):
            return None
        try:
            return _ticket.decode(urlsafe_b64decode(said))
        except (NotBase64, msgspec.DecodeError):  # a key of another version of this program
            return None

    def _mark(self, said: str) -> str:
        return hmac.new(self._secret, said.encode(), "sha256").hexdigest()


def run_secret(run_dir: Path) -> bytes:
    """The secret of a run's gateways: made by the first that asks. ConfigError if the folder cannot hold it.

    Who can guess a secret can make keys: a file that a power failure cut is refused, too.
    """
    path = run_dir / SECRET_FILE
    try:
        secret = path.read_bytes() if path.exists() else _make(path)
    except OSError as error:
        raise ConfigError(f"{path}: the gateways' secret cannot be kept there ({error.strerror})") from error
    if len(secret) != _SECRET_BYTES:
        raise ConfigError(f"{path}: {len(secret)} bytes are no secret of {_SECRET_BYTES}; remove it and start again")
    return secret


def _make(path: Path) -> bytes:
    """Whole or not at all, and the first of several that make one at the same moment wins."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # in containers every service has the same pid
    temporary.touch(0o600)
    temporary.write_bytes(secrets.token_bytes(_SECRET_BYTES))
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return path.read_bytes()
