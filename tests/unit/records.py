"""Small records for tests, made by hand; a field that matters to a test is given by name."""

from __future__ import annotations

from collections.abc import Sequence

from topics import Environment, Reward, RolloutRequest, Sampling, Task, Trajectory, Turn, VerifierSpec, VersionSpan
from topics.record import pack_floats, pack_ints

RUN = "r"
TASK = Task(
    run=RUN,
    task_id="task",
    dataset="d",
    environment=Environment(files="d#task"),
    instruction="mend",
    verifier=VerifierSpec(name="harbor"),
)


def request(group: str = "r-t000000", sample: int = 0, size: int = 2, purpose: str = "train") -> RolloutRequest:
    return RolloutRequest(
        run=RUN,
        group_id=group,
        rollout_id=f"{group}-{sample}",
        sample=sample,
        group_size=size,
        purpose="eval" if purpose == "eval" else "train",
        task=TASK,
        sampling=Sampling(),
        deadline_unix_s=2e9,
    )


def turn(
    asked: RolloutRequest,
    prompt: Sequence[int],
    sampled: Sequence[int],
    *,
    version: str = "a.0",
    name: str = "",
    **fields: object,
) -> Turn:
    made: dict[str, object] = {
        "session_id": "s",
        "index": 0,
        "logprobs": pack_floats([-0.5] * len(sampled)),
        "spans": (VersionSpan(version, 0, len(sampled)),),
        "finish_reason": "stop",
        **fields,
    }
    return Turn(
        run=asked.run,
        group_id=asked.group_id,
        rollout_id=asked.rollout_id,
        turn_id=name or f"{asked.rollout_id}x",
        prompt_ids=pack_ints(prompt),
        sampled_ids=pack_ints(sampled),
        **made,  # type: ignore[arg-type]
    )


def trajectory(
    asked: RolloutRequest, *turns: Turn, outcome: str = "submitted", attempt: int = 1, **fields: object
) -> Trajectory:
    return Trajectory(
        run=asked.run,
        group_id=asked.group_id,
        rollout_id=asked.rollout_id,
        attempt=attempt,
        request=asked,
        turns=turns,
        outcome=outcome,  # type: ignore[arg-type]
        **fields,  # type: ignore[arg-type]
    )


def reward(asked: RolloutRequest, score: float, **fields: object) -> Reward:
    return Reward(
        run=asked.run,
        group_id=asked.group_id,
        rollout_id=asked.rollout_id,
        task_id=asked.task.task_id,
        verifier="harbor",
        score=score,
        purpose=asked.purpose,
        **fields,  # type: ignore[arg-type]
    )
