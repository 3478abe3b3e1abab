"""What the rollout worker uses of a gateway: open a session, close it and have its turns.

Invariant: every call has a deadline, and whatever goes wrong is a GatewayError that says what was asked of whom.
"""

from __future__ import annotations

from typing import Any

import aiohttp
import msgspec

from kat_stream.errors import GatewayError
from kat_stream.gateway.control import CLOSE_S, MSGPACK
from kat_stream.gateway.sessions import SessionHandle, SessionStatus
from topics.request import Sampling
from topics.turn import Turn

CALL_S = 30.0
_turns = msgspec.msgpack.Decoder(list[Turn])


class GatewayControl:
    """The control listener at `control_url`; `session` carries the connections and stays the caller's."""

    def __init__(self, control_url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = control_url.rstrip("/"), session

    async def open(
        self, *, run: str, group_id: str, rollout_id: str, sampling: Sampling, purpose: str = "train"
    ) -> SessionHandle:
        """A new session. Agents reach it at `data_url + handle.path`, with `/v1` behind it for OpenAI's clients."""
        about = {"run": run, "group_id": group_id, "rollout_id": rollout_id, "sampling": sampling, "purpose": purpose}
        raw = await self._call("POST", "/sessions", msgspec.msgpack.encode(about), CALL_S)
        return msgspec.json.decode(raw, type=SessionHandle)

    async def close(self, session_id: str, *, deadline_s: float = CLOSE_S) -> list[Turn]:
        """End a session: calls in flight are aborted, awaited for up to `deadline_s`, and recorded.

        All acknowledged turns in order of completion; closing again gives them again.
        """
        path = f"/sessions/{session_id}/close?deadline_s={deadline_s:g}"
        return _turns.decode(await self._call("POST", path, None, deadline_s + CALL_S))

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

    async def _call(self, method: str, path: str, body: bytes | None, seconds: float) -> bytes:
        headers: dict[str, Any] = {"Content-Type": MSGPACK} if body is not None else {}
        limit = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.request(
                method, self._url + path, data=body, headers=headers, timeout=limit
            ) as answer:
                raw = await answer.read()
        except TimeoutError as error:
            raise GatewayError(f"{method} {self._url}{path}: nothing within {seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise GatewayError(f"{method} {self._url}{path}: {error or type(error).__name__}") from error
        if answer.status >= 300:
            raise GatewayError(f"{method} {self._url}{path}: {answer.status}: {raw[:500].decode(errors='replace')}")
        return raw
