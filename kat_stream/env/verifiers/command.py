"""Grades by the exit code of one command, run in the work tree: 0 is score 1, anything else score 0.

Owns the options `tests_directory` (where the tests are put; default /tests; the command finds it as $TESTS) and
`timeout` ("fail": running out of time is score 0, for tests that run the agent's own code; otherwise it is a failure of
the verifier).
"""

from __future__ import annotations

from kat_stream.env.datasets import Files
from kat_stream.env.sandboxes.base import Sandbox
from kat_stream.env.verifiers.base import Verdict, tail
from kat_stream.errors import VerifierError
from topics import Task

_TESTS = "/tests"
_OUTPUT_LIMIT = 1 << 18
# What `sh` answers when it cannot find or start the command itself.
_CANNOT_RUN = (126, 127)


class CommandVerifier:
    name = "command"
    version = "1"

    async def grade(self, task: Task, tests: Files, sandbox: Sandbox) -> Verdict:
        spec = task.verifier
        directory = spec.options.get("tests_directory", _TESTS)
        await sandbox.put(tests, directory)
        done = await sandbox.exec(
            spec.command,
            timeout_s=spec.timeout_s,
            env={"TESTS": sandbox.root + directory},
            merge_stderr=True,
            output_limit=_OUTPUT_LIMIT,
        )
        evidence = tail(done.stdout)
        if done.timed_out:
            return self._too_slow(task, evidence)
        if done.exit_code in _CANNOT_RUN:
            raise VerifierError(f"{task.task_id}: {spec.command!r} cannot be run (exit {done.exit_code}): {evidence}")
        score = float(done.exit_code == 0)
        return Verdict(score, {"passed": score}, f"{evidence}[exit {done.exit_code}]")

    def _too_slow(self, task: Task, evidence: str) -> Verdict:
        message = f"the tests took longer than {task.verifier.timeout_s:g} s"
        if task.verifier.options.get("timeout") != "fail":
            raise VerifierError(f"{task.task_id}: {message}: {evidence}")
        return Verdict(0.0, {"passed": 0.0}, f"{evidence}[{message}]")
