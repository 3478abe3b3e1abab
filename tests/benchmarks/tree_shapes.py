"""Turns of a given shape for the tree benchmark: synthetic stars of a given POR, and recorded sessions.

    python -m tests.benchmarks.tree_shapes --archive RUN/archive [--agents claude-code codex --calls 12 --rollouts 3]

writes tests/benchmarks/sessions.json again: of each group the turns as [parent, prefix, new prompt ids, sampled ids],
the parent being the turn before it (of any rollout of the group) with the longest common prefix. Lengths only, no text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import numpy as np

from kat_stream.trees import TurnTokens, turns_of

if TYPE_CHECKING:
    from kat_stream.env.scaffolds.description import Step

SESSIONS = Path(__file__).with_name("sessions.json")
VOCABULARY = 2048
Shape = list[list[int]]
"""[parent turn or -1, tokens shared with it, new prompt tokens, sampled tokens] of each turn."""


def star(por: float, node: int, sampled: int = 64) -> Shape:
    """Siblings under one prompt with this share of tokens saved; prompt and branches of at least `node` tokens."""
    ratio = 1 / (1 - por)
    paths = 2 * ceil(ratio)
    prompt = node * paths * (ratio - 1) / (paths - ratio)
    scale = max(1.0, node / prompt)
    branch, prompt = round(node * scale), round(prompt * scale)
    first = [-1, 0, prompt + branch - sampled, sampled]
    return [first, *([0, prompt, branch - sampled, sampled] for _ in range(paths - 1))]


def grown(shape: Shape, rng: np.random.Generator, shrink: float = 1.0, number: int = 0) -> list[TurnTokens]:
    """Turns of this shape with random ids that merge exactly where the shape says; lengths divided by `shrink`.

    Shapes of another `number` share no first token with this one.
    """
    first, after = number * len(shape), (number + 1) * len(shape)
    paths: list[np.ndarray[Any, Any]] = []
    turns = []
    for turn, (parent, prefix, new, sampled) in enumerate(shape):
        shared = paths[parent][: round(prefix / shrink)] if parent >= 0 else np.empty(0, np.int32)
        count = max(round(sampled / shrink), 1)
        size = max(round((prefix + new) / shrink) - len(shared), 0 if len(shared) else 1) + count
        fresh = rng.integers(after, VOCABULARY, size)
        fresh[0] = first + turn
        path = np.concatenate([shared, fresh]).astype(np.int32)
        paths.append(path)
        logprobs = np.full(count, -7.6, np.float32)
        turns.append(TurnTokens(str(turn), path[:-count], path[-count:], logprobs))
    return turns


def shape_of(turns: Sequence[TurnTokens]) -> Shape:
    paths: list[np.ndarray[Any, Any]] = []
    shape: Shape = []
    for turn in turns:
        path = np.concatenate([turn.prompt_ids, turn.sampled_ids])
        common = [_common(path, other) for other in paths]
        parent = int(np.argmax(common)) if common and max(common) else -1
        prefix = min(common[parent], len(turn.prompt_ids)) if parent >= 0 else 0
        shape.append([parent, prefix, len(turn.prompt_ids) - prefix, len(turn.sampled_ids)])
        paths.append(path)
    return shape


def _common(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> int:
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    return int(differ.argmax()) if differ.any() else size


def longest(shape: Shape) -> int:
    """Tokens on the longest path."""
    return max(prefix + new + sampled for _, prefix, new, sampled in shape)


def of_archive(directory: Path, groups: int) -> list[dict[str, Any]]:
    """The first groups with at least eight turns."""
    from kat_stream.archive.reader import read_archive
    from topics import Turn, decode

    found: dict[str, list[Turn]] = {}
    for delivered in read_archive(directory, ["turns"]):
        record = decode(Turn, delivered.value)
        found.setdefault(record.group_id, []).append(record)
    chosen = [turns for turns in found.values() if len(turns) >= 8][:groups]
    return [_session("shell", [t for t in turns_of(turns) if t.trainable], 1) for turns in chosen]


async def of_agent(name: str, rollouts: int, calls: int) -> dict[str, Any]:
    """Rollouts of a real agent in a sandbox; its scripted policy thinks aloud and reads, at random lengths."""
    from kat_stream.env.rollout import RolloutRunner
    from kat_stream.env.sandboxes.bwrap import BwrapBackend
    from kat_stream.env.scaffolds.check import checkable
    from kat_stream.env.scaffolds.rehearsal import playing, stage, task_in
    from topics import RolloutRequest, Sampling

    steps = checkable(name).description.check.steps
    turns: list[TurnTokens] = []
    for sample in range(rollouts):
        with tempfile.TemporaryDirectory() as directory:
            async with stage(playing(_script(steps, calls, sample))) as world:
                runner = RolloutRunner(BwrapBackend(), world.control, world.data_url)
                trajectory = await runner.run(
                    RolloutRequest(
                        run="shapes", group_id="shapes-t0", rollout_id=f"shapes-t0-{sample}", sample=sample,
                        group_size=rollouts, task=task_in(Path(directory), name, 400.0),
                        sampling=Sampling(max_turns=calls + 4, max_new_tokens=2048, max_context=400_000),
                        deadline_unix_s=time.time() + 500,
                    )
                )  # fmt: skip
                await runner.close()
        print(f"{name} {sample}: {trajectory.outcome}, {len(trajectory.turns)} turns", flush=True)
        turns += [turn for turn in turns_of(trajectory.turns) if turn.trainable]
    return _session(name, turns, 4)


def _script(steps: Sequence[Step], calls: int, seed: int) -> list[Step]:
    """The agent's own script, its first call made often, with texts of 40 to 800 and outputs of 50 to 4000 letters."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(calls - len(steps) + 1):
        say = " ".join(str(n) for n in rng.integers(10, 1000, rng.integers(10, 200)))
        read = f"seq {rng.integers(100, 999)} | head -c 40; seq 1 {rng.integers(10, 900)}; "
        arguments = {k: read + v if k in ("command", "cmd") else v for k, v in steps[0].arguments.items()}
        made.append(msgspec.structs.replace(steps[0], say=say, arguments=arguments))
    return [*made, *steps[1:]]


def _session(agent: str, turns: Sequence[TurnTokens], characters: int) -> dict[str, Any]:
    """`ids_a_token`: the rehearsal's tokenizer has about one id a character, a real one about a quarter of that."""
    return {"agent": agent, "ids_a_token": characters, "turns": shape_of(turns)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, action="append", default=[])
    parser.add_argument("--groups", type=int, default=2, help="of each archive")
    parser.add_argument("--agents", nargs="*", default=[])
    parser.add_argument("--rollouts", type=int, default=3)
    parser.add_argument("--calls", type=int, default=12)
    parser.add_argument("--out", type=Path, default=SESSIONS)
    args = parser.parse_args()
    sessions = [session for directory in args.archive for session in of_archive(directory, args.groups)]
    sessions += [anyio.run(of_agent, name, args.rollouts, args.calls) for name in args.agents]
    lines = ",\n".join(json.dumps(session, separators=(",", ":")) for session in sessions)
    args.out.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
