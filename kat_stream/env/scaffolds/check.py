"""Whether a black-box agent works: one rollout in a sandbox without a network, against a scripted policy.

Owns the verdict. Invariant: what is proved is what the agent did through the real gateway: the file is right, the
prompt ids in the records are those the engine saw, the sampled ids are those the policy gave, and each sampled token
is trained exactly once or belongs to a side request or an aborted call. Where the agent writes a log of its own, that
has the same texts and calls.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kat_stream.engines.scripted import ScriptedPolicy
from kat_stream.env.grading import Grader
from kat_stream.env.rollout import RolloutRunner
from kat_stream.env.sandboxes.base import Sandbox, SandboxBackend, SandboxSpec
from kat_stream.env.scaffolds.blackbox import BlackBox
from kat_stream.env.scaffolds.own_log import differences
from kat_stream.env.scaffolds.registry import get_scaffold
from kat_stream.env.scaffolds.rehearsal import Front, Stage, playing, stage, task_in
from kat_stream.errors import ConfigError, DataError, SandboxError
from topics import RolloutRequest, Sampling, Trajectory, Turn

if TYPE_CHECKING:
    from kat_stream.trees import TurnTokens

AGENT_S = 240.0
_MARGIN_S = 120.0
_LOG_S, _LOG_BYTES = 30.0, 1 << 24
_SAMPLING = Sampling(max_turns=12, max_new_tokens=2048, max_context=400_000)
_PACKED_TOKENS = 1 << 20


@dataclass(frozen=True)
class Checked:
    """What one rollout showed; empty `wrong` means that the agent works. Tokens are sampled ones."""

    name: str
    version: str
    trajectory: Trajectory
    memory_bytes: int
    score: float
    wrong: tuple[str, ...]
    forks: Counter[str] = field(default_factory=Counter)
    sampled: int = 0
    trainable: int = 0


class _Watching:
    """A back end that remembers its sandboxes, to ask them for their memory when they are gone."""

    def __init__(self, inner: SandboxBackend, own_log: str) -> None:
        self.inner, self.name, self.isolated = inner, inner.name, inner.isolated
        self.made: list[_Watched] = []
        self._own_log = own_log

    async def create(self, spec: SandboxSpec, *, owner: str = "") -> Sandbox:
        self.made.append(_Watched(await self.inner.create(spec, owner=owner), self._own_log))
        return cast(Sandbox, self.made[-1])

    @property
    def memory_bytes(self) -> int:
        """The most that a sandbox held."""
        return max((getattr(made.inner, "peak_memory_bytes", 0) for made in self.made), default=0)


class _Watched:
    """A sandbox whose agent's own log is read before it goes."""

    def __init__(self, inner: Sandbox, own_log: str) -> None:
        self.inner, self.log = inner, b""
        self._own_log = own_log

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.destroy()

    async def destroy(self) -> None:
        if self._own_log and not self.log:
            directory, _, pattern = self._own_log.rpartition("/")
            find = ["find", directory, "-name", pattern, "-exec", "cat", "{}", ";", "-exec", "printf", r"\0", ";"]
            with contextlib.suppress(SandboxError):
                self.log = (await self.inner.exec(find, timeout_s=_LOG_S, output_limit=_LOG_BYTES)).stdout
        await self.inner.destroy()


async def check(
    name: str,
    sandboxes: SandboxBackend,
    *,
    front: Front | None = None,
    sampling: Sampling = _SAMPLING,
    seconds: float = AGENT_S,
    endless: bool = False,
) -> Checked:
    """Let the agent do the rehearsal's task. ConfigError as `checkable` says.

    `front` stands before the gateway and may do harm; with `endless` the policy calls its first tool for ever.
    """
    description = checkable(name).description
    policy = playing(description.check.steps[: 1 if endless else None])
    watching: Any = _Watching(sandboxes, description.check.own_log)
    with tempfile.TemporaryDirectory(prefix="kat-check-") as directory:
        async with stage(policy, front) as world:
            trajectory = await _roll(name, world, watching, Path(directory), sampling, seconds)
            reward = await Grader(sandboxes).grade(trajectory) if trajectory.gradable else None
    score = reward.score if reward is not None else 0.0
    own: list[str] = []
    # An agent that met a failure may log what it then took back.
    if description.check.own_log and watching.made and front is None and not endless:
        own = differences(watching.made[0].log, trajectory.turns)
    return Checked(
        name=description.name,
        version=description.version,
        trajectory=trajectory,
        memory_bytes=watching.memory_bytes,
        score=score,
        wrong=(*_ending(trajectory, score), *wrong_records(trajectory.turns, world, policy), *own),
        forks=Counter(turn.fork for turn in trajectory.turns if turn.fork),
        sampled=sum(map(_sampled, trajectory.turns)),
        trainable=sum(_sampled(turn) for turn in trajectory.turns if turn.trainable),
    )


def checkable(name: str) -> BlackBox:
    """An installed black box with a script. ConfigError says what it lacks."""
    scaffold = get_scaffold(name)
    if not isinstance(scaffold, BlackBox):
        raise ConfigError(f"{name} runs in the worker: there is nothing to check")
    if not scaffold.description.check.steps:
        raise ConfigError(f"{name}: its description has no [[check.steps]]")
    scaffold.needs()
    return scaffold


def wrong_records(turns: Sequence[Turn], world: Stage, policy: ScriptedPolicy) -> list[str]:
    """Where records, engine and training disagree."""
    from kat_stream.trees import turns_of

    try:
        whole = {tokens.turn_id: tokens for tokens in turns_of(turns)}
    except DataError as error:
        return [f"the records are no tree: {error}"]
    seen = {body.rid[:-4]: body.input_ids for body in world.engine.requests if body.rid.endswith("n001")}
    wrong = [f"the engine saw call {name} and no record tells of it" for name in seen if name not in whole]
    for name, tokens in whole.items():
        wrong += _wrong_turn(name, tokens, seen.get(name), policy)
    if len(whole) < len(turns):
        wrong.append("a turn was recorded twice")
    trained = _trained(list(whole.values()))
    other = sum(_sampled(turn) for turn in turns if turn.side or turn.finish_reason == "abort")
    if (total := sum(map(_sampled, turns))) != trained + other:
        wrong.append(f"{total} tokens were sampled, {trained} are trained and {other} are side or aborted")
    return wrong


def _wrong_turn(name: str, tokens: TurnTokens, saw: list[int] | None, policy: ScriptedPolicy) -> list[str]:
    prompt, sampled = tokens.prompt_ids.tolist(), tokens.sampled_ids.tolist()
    if saw is None:
        return [f"turn {name} was recorded and no engine saw it"] if sampled else []
    if saw != prompt:
        return [f"turn {name}: the engine saw other prompt ids than the record has"]
    return [] if policy(saw)[: len(sampled)] == sampled else [f"turn {name}: other ids were sampled than recorded"]


def _trained(turns: Sequence[TurnTokens]) -> int:
    """Tokens that a batch of all trainable turns trains."""
    from kat_stream.trees import make_batch

    chosen = [turn for turn in turns if turn.trainable]
    if not chosen:
        return 0
    ones = [1.0] * len(chosen)
    batch = make_batch(
        chosen, rollout=[0] * len(chosen), advantage=ones, weight=ones, rollout_ids=["r"], budget_tokens=_PACKED_TOKENS
    )
    return batch.trained_tokens


async def _roll(
    name: str, world: Stage, sandboxes: SandboxBackend, directory: Path, sampling: Sampling, seconds: float
) -> Trajectory:
    request = RolloutRequest(
        run="check",
        group_id="check-t0",
        rollout_id="check-t0-0",
        sample=0,
        group_size=1,
        task=task_in(directory, name, seconds),
        sampling=sampling,
        deadline_unix_s=time.time() + seconds + _MARGIN_S,
    )
    runner = RolloutRunner(sandboxes, world.control, world.data_url)
    try:
        return await runner.run(request)
    finally:
        await runner.close()


def _ending(trajectory: Trajectory, score: float) -> list[str]:
    wrong = []
    if trajectory.outcome != "submitted":
        detail = " ".join(f"{trajectory.error_class} {trajectory.detail}".split())
        wrong.append(f"{trajectory.outcome}: {detail}")
    if score < 1.0:
        wrong.append("answer.txt is not right")
    if not any(turn.trainable for turn in trajectory.turns):
        wrong.append("no turn can be trained")
    return wrong


def _sampled(turn: Turn) -> int:
    return len(turn.sampled_ids) // 4
