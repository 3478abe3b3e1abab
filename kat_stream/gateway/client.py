"""What the rollout worker uses of a gateway: open a session, close it and have its turns.

Invariant: every call has a deadline, and whatever goes wrong is a GatewayError that says what was asked of whom.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

import aiohttp
import msgspec

from kat_stream.errors import GatewayError
from kat_stream.gateway.control import CLOSE_S, KEY_HEADER, MSGPACK
from kat_stream.gateway.sessions import SessionHandle, SessionStatus
from topics.request import Sampling
from topics.turn import Turn

CALL_S = 30.0
AGAIN_S = 0.2
"""Between two rounds over gateways none of which gives an answer."""
_turns = msgspec.msgpack.Decoder(list[Turn])


class GatewayControl:
    """The control listener at `control_url`; `session` carries the connections and stays the caller's.

    `others` are further gateways of the same run: where one cannot be reached, or can do nothing now (it is full, the
    log is away, a session is just moving), the next is asked, for `patience_s`.
    """

    def __init__(
        self,
        control_url: str,
        session: aiohttp.ClientSession,
        others: Sequence[str] = (),
        patience_s: float = 0.0,
    ) -> None:
        self._urls, self._session = deque(url.rstrip("/") for url in (control_url, *others)), session
        self._patience_s = patience_s
        self._keys: dict[str, str] = {}
        """Of open sessions: a gateway that did not open one asks for its key."""

    async def open(
        self, *, run: str, group_id: str, rollout_id: str, sampling: Sampling, purpose: str = "train"
    ) -> SessionHandle:
        """A new session. Agents reach it at `data_url + handle.path`, with `/v1` behind it for OpenAI's clients."""
        about = {"run": run, "group_id": group_id, "rollout_id": rollout_id, "sampling": sampling, "purpose": purpose}
        raw = await self._call("POST", "/sessions", msgspec.msgpack.encode(about), CALL_S)
        handle = msgspec.json.decode(raw, type=SessionHandle)
        self._keys[handle.session_id] = handle.key
        return handle

    async def close(self, session_id: str, *, deadline_s: float = CLOSE_S) -> list[Turn]:
        """End a session: calls in flight are aborted, awaited for up to `deadline_s`, and recorded.

        All acknowledged turns in order of completion; closing again gives them again.
        """
        path = f"/sessions/{session_id}/close?deadline_s={deadline_s:g}"
        raw = await self._call("POST", path, None, deadline_s + CALL_S, self._keys.get(session_id, ""))
        self._keys.pop(session_id, None)
        return _turns.decode(raw)

    async def release(self, session_id: str, *, deadline_s: float) -> None:
        """For another gateway, which takes the session over: this one serves it no more, and has said so on the log."""
        await self._call("POST", f"/sessions/{session_id}/release", None, deadline_s)

    async def sessions(self) -> list[SessionStatus]:
        """The open sessions."""
        return msgspec.json.decode(await self._call("GET", "/sessions", None, CALL_S), type=list[SessionStatus])

    async def healthy(self) -> bool:
        """Whether the gateway answers; never raises GatewayError."""
        try:
            await self._call("GET", "/health", None, CALL_S)
        except GatewayError:
            return False
        return True

    async def _call(self, method: str, path: str, body: bytes | None, seconds: float, key: str = "") -> bytes:
        """The answer of the first gateway that can give one; `seconds` for each."""
        give_up = time.monotonic() + self._patience_s
        headers = {"Content-Type": MSGPACK} if body is not None else {}
        if key:
            headers[KEY_HEADER] = key
        tried = 0
        while True:
            url, tried = self._urls[0] + path, tried + 1
            try:
                return await self._ask(method, url, body, seconds, headers)
            except (aiohttp.ClientConnectionError, OSError, _NotNow) as error:
                self._urls.rotate(-1)
                if tried >= len(self._urls) and time.monotonic() + AGAIN_S > give_up:
                    raise GatewayError(f"{method} {url}: {error or type(error).__name__}") from error
            if tried % len(self._urls) == 0:
                await asyncio.sleep(AGAIN_S)

    async def _ask(self, method: str, url: str, body: bytes | None, seconds: float, headers: dict[str, str]) -> bytes:
        """One gateway's answer. GatewayError; for another try: _NotNow, aiohttp.ClientConnectionError, OSError."""
        limit = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.request(method, url, data=body, headers=headers, timeout=limit) as answer:
                raw = await answer.read()
        except TimeoutError as error:
            raise GatewayError(f"{method} {url}: nothing within {seconds:g} s") from error
        except (aiohttp.ClientPayloadError, aiohttp.InvalidURL) as error:
            raise GatewayError(f"{method} {url}: {error or type(error).__name__}") from error
        said = f"{answer.status}: {raw[:500].decode(errors='replace')}"
        if answer.status == 503:
            raise _NotNow(said)
        if answer.status >= 300:
            raise GatewayError(f"{method} {url}: {said}")
        return raw


class _NotNow(Exception):
    """What a gateway says that may be able to answer later, or another one now."""
