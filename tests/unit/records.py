"""Small records for tests, made by hand."""

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


def turn(asked: RolloutRequest, prompt: list[int], sampled: list[int], *, version: str = "a.0", name: str = "") -> Turn:
    return Turn(
        run=RUN,
        group_id=asked.group_id,
        rollout_id=asked.rollout_id,
        session_id="s",
        turn_id=name or f"{asked.rollout_id}x",
        index=0,
        prompt_ids=pack_ints(prompt),
        sampled_ids=pack_ints(sampled),
        logprobs=pack_floats([-0.5] * len(sampled)),
        spans=(VersionSpan(version, 0, len(sampled)),),
        finish_reason="stop",
    )


def trajectory(asked: RolloutRequest, *turns: Turn, outcome: str = "submitted", **fields: object) -> Trajectory:
    return Trajectory(
        run=RUN,
        group_id=asked.group_id,
        rollout_id=asked.rollout_id,
        attempt=1,
        request=asked,
        turns=turns,
        outcome=outcome,  # type: ignore[arg-type]
        **fields,  # type: ignore[arg-type]
    )


def reward(asked: RolloutRequest, score: float, **fields: object) -> Reward:
    return Reward(
        run=RUN,
        group_id=asked.group_id,
        rollout_id=asked.rollout_id,
        task_id="task",
        verifier="harbor",
        score=score,
        purpose=asked.purpose,
        **fields,  # type: ignore[arg-type]
    )
