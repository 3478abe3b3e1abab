"""Whether a black-box agent works: one rollout in a sandbox without a network, against a scripted policy.

Owns the verdict. Invariant: what is proved is what the agent did through the real gateway: the file is right, the
prompt ids in the records are those the engine saw, the sampled ids are those the policy gave, and each sampled token
is trained exactly once or belongs to a side request or an aborted call. Where the agent writes a log of its own, that
has the same texts and calls.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kat_stream.engines.scripted import ScriptedPolicy
from kat_stream.env.grading import Grader
from kat_stream.env.rollout import RolloutRunner
from kat_stream.env.sandboxes.base import Sandbox, SandboxBackend
from kat_stream.env.scaffolds.blackbox import BlackBox
from kat_stream.env.scaffolds.own_log import differences
from kat_stream.env.scaffolds.registry import get_scaffold
from kat_stream.env.scaffolds.rehearsal import Front, Stage, playing, request_for, stage, task_in
from kat_stream.env.scaffolds.watching import Watching
from kat_stream.errors import ConfigError, DataError, SandboxError
from topics import Sampling, Trajectory, Turn

if TYPE_CHECKING:
    from kat_stream.trees import TurnTokens

AGENT_S = 240.0
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
    logs: list[bytes] = []

    async def keep_log(sandbox: Sandbox) -> None:
        if description.check.own_log and not logs:  # the agent's sandbox is the first
            logs.append(await _own_log(sandbox, description.check.own_log))

    watching: Any = Watching(sandboxes, keep_log)
    with tempfile.TemporaryDirectory(prefix="kat-check-") as directory:
        async with stage(policy, front) as world:
            trajectory = await _roll(name, world, watching, Path(directory), sampling, seconds)
            reward = await Grader(sandboxes).grade(trajectory) if trajectory.gradable else None
    score = reward.score if reward is not None else 0.0
    own: list[str] = []
    # An agent that met a failure may log what it then took back.
    if logs and front is None and not endless:
        own = differences(logs[0], trajectory.turns, description.check.own_log_query)
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
    request = request_for(task_in(directory, name, seconds), sampling)
    runner = RolloutRunner(sandboxes, world.control, world.data_url)
    try:
        return await runner.run(request)
    finally:
        await runner.close()


async def _own_log(sandbox: Sandbox, where: str) -> bytes:
    """The files as a tar; empty if there are none, or they cannot be had any more."""
    directory, _, pattern = where.rpartition("/")
    find = ["find", directory, "-type", "f", "-name", pattern]
    with contextlib.suppress(SandboxError, FileNotFoundError):
        found = (await sandbox.exec(find, timeout_s=_LOG_S)).stdout.decode().splitlines()
        return await sandbox.get(found, limit_bytes=_LOG_BYTES) if found else b""
    return b""


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
