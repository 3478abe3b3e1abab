"""Runs the task's reference solution: an upper bound for every agent and half of a dataset's audit.

Invariant: what the oracle changes goes the same way as an agent's work (patch, clean sandbox, verifier).
"""

from __future__ import annotations

from kat_stream.env.datasets import files_of
from kat_stream.env.sandboxes.base import Sandbox
from kat_stream.env.scaffolds.base import Limits, Needs, ScaffoldResult, SessionEndpoint, log_tail
from kat_stream.errors import TaskError
from topics import Task

_OUTPUT_LIMIT = 1 << 18


class OracleScaffold:
    name = "oracle"

    def needs(self) -> Needs:
        return Needs(session=False)

    async def run(self, task: Task, session: SessionEndpoint, sandbox: Sandbox, limits: Limits) -> ScaffoldResult:
        files = await files_of(task, "solution")
        if "solve.sh" not in files:
            raise TaskError(f"{task.task_id}: no reference solution (solution/solve.sh)")
        await sandbox.put(files, "/solution")
        script = f"/bin/chmod +x {sandbox.root}/solution/solve.sh && exec {sandbox.root}/solution/solve.sh"
        done = await sandbox.exec(script, timeout_s=limits.seconds, merge_stderr=True, output_limit=_OUTPUT_LIMIT)
        log = log_tail(done.stdout)
        if done.timed_out:
            return ScaffoldResult("time_limit", f"the solution took longer than {limits.seconds:g} s", log)
        if done.exit_code != 0:
            return ScaffoldResult("agent_error", f"the solution failed with exit code {done.exit_code}", log)
        return ScaffoldResult("submitted", "", log)

    async def close(self) -> None:
        pass
