"""Grades as Harbor and Terminal-Bench 2 do: /tests/test.sh is run, the score is what it wrote to /logs/verifier.

Owns the reading of reward.txt (one number) and reward.json (named numbers). Invariants: no reward file, or one that is
no finite number, is a VerifierError; /tests and /logs are the tests' own (Grader): what an agent left running, for a
task may be about a server that has to run, sees neither. What the tests themselves run of its work is for them to
mistrust. Source: research/benchmarks.md 2.
"""

from __future__ import annotations

import math
import shlex

import msgspec

from kat_stream.env.datasets import Files
from kat_stream.env.sandboxes.base import Sandbox
from kat_stream.env.verifiers.base import Verdict, tail
from kat_stream.errors import VerifierError
from topics import Task

_OUTPUT_LIMIT = 1 << 18
_REWARD_LIMIT = 1 << 16
# Whole paths, for the PATH is the tests'. reward.txt goes first, as in Harbor; the first line says which it was.
_READ = (
    "cd {0}/logs/verifier && for f in reward.txt reward.json; do"
    " test -f $f && echo $f && exec /bin/cat $f; done; exit 1"
)
_RUN = "/bin/mkdir -p {0}/logs/verifier && /bin/chmod +x {0}/tests/test.sh && exec {0}/tests/test.sh"
_READ_TIMEOUT_S = 10.0


class HarborVerifier:
    name = "harbor"
    version = "3"

    async def grade(self, task: Task, tests: Files, sandbox: Sandbox) -> Verdict:
        root = shlex.quote(sandbox.root)
        await sandbox.put(tests, "/tests")
        script = _RUN.format(root)
        timeout_s = task.verifier.timeout_s
        done = await sandbox.exec(script, timeout_s=timeout_s, merge_stderr=True, output_limit=_OUTPUT_LIMIT)
        evidence = tail(done.stdout)
        if done.timed_out:
            raise VerifierError(f"{task.task_id}: tests/test.sh took longer than {timeout_s:g} s: {evidence}")
        read = await sandbox.exec(_READ.format(root), timeout_s=_READ_TIMEOUT_S, output_limit=_REWARD_LIMIT)
        if read.exit_code != 0:
            raise VerifierError(
                f"{task.task_id}: tests/test.sh (exit {done.exit_code}) wrote neither reward.txt nor reward.json in "
                f"/logs/verifier: {evidence}"
            )
        components = _rewards(task, read.stdout)
        return Verdict(_score(components), components, evidence)


def _rewards(task: Task, output: bytes) -> dict[str, float]:
    name, _, content = output.partition(b"\n")
    try:
        values = {"reward": float(content)} if name == b"reward.txt" else _named(content)
    except (ValueError, msgspec.DecodeError) as error:
        raise VerifierError(f"{task.task_id}: {name.decode()}: {content[:200]!r}: {error}") from error
    if not values or not all(math.isfinite(value) for value in values.values()):
        raise VerifierError(f"{task.task_id}: {name.decode()}: {content[:200]!r} is not a finite number")
    return values


def _named(content: bytes) -> dict[str, float]:
    """{"name": number or true/false}; msgspec.ValidationError for anything else."""
    values = msgspec.json.decode(content, type=dict[str, float | bool])
    return {name: float(value) for name, value in values.items()}


def _score(components: dict[str, float]) -> float:
    """The component called `reward`; without one, the mean of all."""
    return components.get("reward", sum(components.values()) / len(components))
