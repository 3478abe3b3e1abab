"""One rollout: a sandbox, a session, an agent, a patch, and a Trajectory whatever happens.

Owns the order of those steps and the verdict on how the rollout ended. Invariant: `run` never raises (but for its own
cancellation); what our side did wrong is `infra_error`, what the agent did is its own outcome, and every sandbox and
every session that was opened is closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from kat_stream.env.datasets import Files, files_of
from kat_stream.env.grading import Grader, grading_s
from kat_stream.env.sandboxes.base import Sandbox, SandboxBackend
from kat_stream.env.scaffolds import Limits, Scaffold, ScaffoldResult, SessionEndpoint, get_scaffold
from kat_stream.env.trajectories import lay_out, sandbox_spec, take_patch
from kat_stream.errors import ConfigError, DataError, DeadlineExceeded, KatError, SandboxDied, SandboxError
from kat_stream.whole import whole
from topics import Reward, RolloutRequest, Sampling, Trajectory, Turn
from topics.trajectory import Outcome

_log = logging.getLogger(__name__)

# Beside the agent's time, and in place the tests': create, lay out, take the patch, close. Then the sandbox ends.
_OVERHEAD_S = 120.0
_CREATE_TIMEOUT_S = 60.0
# Longer than a gateway that died takes to be back, and to read a session from the log.
_SESSION_TIMEOUT_S = 100.0
_RELEASE_TIMEOUT_S = 110.0
# A worker that stops, or lost the partition, has no use for the turns: no gateway that is gone is waited for.
_CUT_OFF_S = 5.0
# What an agent or its sandbox says of itself is theirs, and so is its length; a record has room for so much of it.
_DETAIL_CHARS = 2000
# A rollout that could not even start its agent is no rollout.
_LEAST_AGENT_S = 0.5
_NO_SESSION = SessionEndpoint("", "")


class OpenedSession(Protocol):
    """What the gateway hands out; `path` is `/s/SESSION`."""

    @property
    def session_id(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def path(self) -> str: ...


class Sessions(Protocol):
    """The gateway's control side, as a rollout uses it (kat_stream.gateway.GatewayControl)."""

    async def open(
        self, *, run: str, group_id: str, rollout_id: str, sampling: Sampling, purpose: str
    ) -> OpenedSession: ...
    async def close(self, session_id: str) -> list[Turn]: ...


def _new_life() -> str:
    return uuid.uuid4().hex[:12]


@dataclass
class _State:
    """What a rollout holds while it goes on, and what it has found out."""

    request: RolloutRequest
    scaffold: Scaffold
    agent_s: float
    cut_short: bool
    """The request's deadline, not the task's own limit, ends the agent's time."""
    sandbox: Sandbox | None = None
    created: float = 0.0
    session: OpenedSession | None = None
    turns: tuple[Turn, ...] = ()
    patch: bytes = b""
    log: str = ""
    reward: Reward | None = None
    life: str = field(default_factory=_new_life)


@dataclass(frozen=True)
class _End:
    outcome: Outcome
    detail: str = ""
    error_class: str = ""


class RolloutRunner:
    """Runs many rollouts at once in one worker, with one instance of each scaffold.

    `gateway` and `data_url` (http://host:port of the gateway's data listener, as this worker reaches it) may be left
    out where only agents without a model run (oracle, nop).
    """

    def __init__(self, sandboxes: SandboxBackend, gateway: Sessions | None = None, data_url: str = "") -> None:
        self._sandboxes = sandboxes
        self._gateway = gateway
        self._data_url = data_url.rstrip("/")
        self._scaffolds: dict[str, Scaffold] = {}
        self._grader = Grader(sandboxes)

    async def run(
        self, request: RolloutRequest, attempt: int = 1, cancelled: asyncio.Event | None = None
    ) -> Trajectory:
        """The finished rollout; see `run_graded`."""
        trajectory, _ = await self.run_graded(request, attempt, cancelled)
        return trajectory

    async def run_graded(
        self, request: RolloutRequest, attempt: int = 1, cancelled: asyncio.Event | None = None
    ) -> tuple[Trajectory, Reward | None]:
        """The finished rollout, and its Reward if the task is graded in place (it can be graded nowhere else).

        Setting `cancelled` ends the rollout early with the outcome `cancelled`.
        """
        started = time.monotonic()
        try:
            state = self._prepare(request)
        except (ConfigError, DeadlineExceeded) as error:
            return _record(request, attempt, None, _failed(error), started), None
        close_s = _CUT_OFF_S
        try:
            end = await _unless(cancelled, self._guarded(state))
            close_s = _RELEASE_TIMEOUT_S
        finally:
            await whole(self._release(state, close_s))
        return _record(request, attempt, state, end or _End("cancelled"), started), state.reward

    async def close(self) -> None:
        """Release the scaffolds' connections."""
        for scaffold in self._scaffolds.values():
            await scaffold.close()
        self._scaffolds.clear()

    def _prepare(self, request: RolloutRequest) -> _State:
        name = request.task.scaffold
        if name not in self._scaffolds:
            self._scaffolds[name] = get_scaffold(name)
        # The request's deadline is the one moment that two machines must agree on: wall clock.
        left_s = request.deadline_unix_s - time.time()
        if left_s < _LEAST_AGENT_S:
            raise DeadlineExceeded("the rollout was requested too late: start", max(left_s, 0.0))
        own_s = request.task.agent_timeout_s
        return _State(request, self._scaffolds[name], min(own_s, left_s), cut_short=left_s < own_s)

    async def _guarded(self, state: _State) -> _End:
        try:
            return await self._work(state)
        except Exception as error:  # a rollout is a record, whatever breaks
            # A rollout is a record: an error of any kind, also from a plug-in's code, ends this rollout and no other.
            _log.warning("rollout %s: %s: %s", state.request.rollout_id, type(error).__name__, error)
            return _failed(error)

    async def _work(self, state: _State) -> _End:
        task = state.request.task
        files = await files_of(task, "files")
        endpoint = await self._open_session(state)
        state.sandbox = sandbox = await self._create(state)
        await lay_out(sandbox, task, files)
        end = await self._let_work(state, endpoint)
        end = await self._harvest(state, files, end)
        if task.verifier.in_place:
            await self._grade_in_place(state, end)
        await self._close_session(state)
        return _with_turns(end, state.turns, state.request.sampling.max_turns)

    async def _open_session(self, state: _State) -> SessionEndpoint:
        if not state.scaffold.needs().session:
            return _NO_SESSION
        if self._gateway is None:
            raise ConfigError(f"the agent {state.scaffold.name!r} needs a gateway")
        request = state.request
        async with asyncio.timeout(_SESSION_TIMEOUT_S):
            state.session = await self._gateway.open(
                run=request.run,
                group_id=request.group_id,
                rollout_id=request.rollout_id,
                sampling=request.sampling,
                purpose=request.purpose,
            )
        return SessionEndpoint(self._data_url + state.session.path, state.session.key)

    async def _create(self, state: _State) -> Sandbox:
        needs, task = state.scaffold.needs(), state.request.task
        spec = sandbox_spec(
            task,
            wall_s=state.agent_s + (grading_s(task) if task.verifier.in_place else 0.0) + _OVERHEAD_S,
            network="gateway" if needs.network else "none",
            mounts=needs.mounts,
            memory_mb=needs.memory_mb,
            pids=needs.pids,
            disk_mb=needs.disk_mb,
            writable=needs.writable,
        )
        async with asyncio.timeout(_CREATE_TIMEOUT_S):
            sandbox = await self._sandboxes.create(spec, owner=state.request.rollout_id)
        state.created = time.monotonic()
        return sandbox

    async def _let_work(self, state: _State, endpoint: SessionEndpoint) -> _End:
        """The agent's own part: from here on a sandbox that dies is the agent's doing."""
        assert state.sandbox is not None
        sampling = state.request.sampling
        limits = Limits(sampling.max_turns, sampling.max_new_tokens, sampling.max_context, state.agent_s)
        try:
            async with asyncio.timeout(state.agent_s) as clock:
                result = await state.scaffold.run(state.request.task, endpoint, state.sandbox, limits)
        except SandboxDied as error:
            return _End("sandbox_died", str(error))
        except TimeoutError:
            if not clock.expired():
                raise
            result = ScaffoldResult("time_limit", f"not done after {state.agent_s:.1f} s")
        if result.outcome == "time_limit" and state.cut_short:
            raise DeadlineExceeded("the rollout's deadline: the agent's end", state.agent_s)
        state.log = result.log
        return _End(result.outcome, result.detail)

    async def _harvest(self, state: _State, files: Files, end: _End) -> _End:
        """Take the patch; where that fails it is because of what the agent left behind."""
        if end.outcome in ("sandbox_died", "infra_error"):
            return end
        assert state.sandbox is not None
        task = state.request.task
        try:
            if not task.verifier.in_place:
                # What still writes would change the work tree under the patch; in place it may be what was asked for.
                await state.sandbox.kill_leftovers()
            patch = await take_patch(state.sandbox, task, files)
        except SandboxError as error:  # also one in which nothing can be started any more
            return _End("sandbox_died", str(error))
        except DataError as error:
            if not task.verifier.in_place:
                return _End("agent_error", str(error))
            # In place the patch is for people only: a program that was to be built may be larger than any patch.
            return _saying(end, f"no patch: {error}")
        state.patch = patch.content
        return _saying(end, patch.left_out and f"left out of the patch: {patch.left_out}")

    async def _grade_in_place(self, state: _State, end: _End) -> None:
        """Every rollout that can have a Reward has one after this: nobody else can grade it."""
        assert state.sandbox is not None
        graded = _record(state.request, 1, state, end, time.monotonic())
        if graded.gradable:
            state.reward = await self._grader.grade_in_place(graded, state.sandbox)

    async def _close_session(self, state: _State) -> None:
        session, state.session = state.session, None
        if session is not None and self._gateway is not None:
            async with asyncio.timeout(_SESSION_TIMEOUT_S):
                state.turns = tuple(await self._gateway.close(session.session_id))

    async def _release(self, state: _State, close_s: float) -> None:
        """Close what is still open, the session also if the sandbox does not end in time."""
        if state.sandbox is not None:
            await _or_logged(state, state.sandbox.destroy(), _RELEASE_TIMEOUT_S)
        await _or_logged(state, self._close_session(state), close_s)


async def _or_logged(state: _State, closing: Awaitable[None], seconds: float) -> None:
    """A failure to close is logged only: the record of the rollout matters more."""
    try:
        async with asyncio.timeout(seconds):
            await closing
    except (TimeoutError, KatError, OSError) as error:
        _log.warning("rollout %s: release: %s: %s", state.request.rollout_id, type(error).__name__, error)


def _failed(error: Exception) -> _End:
    return _End("infra_error", str(error) or type(error).__name__, type(error).__name__)


def _saying(end: _End, more: str) -> _End:
    return replace(end, detail="; ".join(filter(None, (end.detail, more))))


def _with_turns(end: _End, turns: tuple[Turn, ...], max_turns: int) -> _End:
    """A black box that gives up because its last reply was cut or its next call was refused ran out of tokens or turns.

    Whatever it says itself: many have no limit of their own, and the gateway's ends them with an error.
    """
    if end.outcome == "agent_error" and turns and turns[-1].finish_reason == "length":
        return _End("token_limit", end.detail)
    if end.outcome == "agent_error" and sum(not turn.side for turn in turns) >= max_turns:
        return _End("turn_limit", end.detail)
    return end


def _record(request: RolloutRequest, attempt: int, state: _State | None, end: _End, started: float) -> Trajectory:
    now = time.monotonic()
    return Trajectory(
        run=request.run,
        group_id=request.group_id,
        rollout_id=request.rollout_id,
        attempt=attempt,
        request=request,
        turns=state.turns if state else (),
        outcome=end.outcome,
        detail=end.detail[:_DETAIL_CHARS],
        error_class=end.error_class,
        patch=state.patch if state else b"",
        log=state.log if state else "",
        seconds=now - started,
        sandbox_s=now - state.created if state and state.created else 0.0,
        life=state.life if state else _new_life(),
    )


async def _unless[T](cancelled: asyncio.Event | None, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None if the event came first, with `work` cancelled and ended.

    In a task of its own, which is cancelled once: a scope of anyio would cancel its cleaning up, too.
    """
    task = asyncio.ensure_future(work)
    event = asyncio.ensure_future((cancelled or asyncio.Event()).wait())
    try:
        await asyncio.wait({task, event}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        event.cancel()
        await whole(_stopped(task))
    return None if task.cancelled() else task.result()


async def _stopped(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])
