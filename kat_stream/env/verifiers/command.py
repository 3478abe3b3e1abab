"""Grades by the exit code of one command, run in the work tree: 0 is score 1, anything else score 0.

Owns the options `tests_directory` (where the tests are put; default /tests; the command finds it as $TESTS) and
`timeout` ("fail": running out of time is score 0, for tests that run the agent's own code; otherwise it is a failure of
the verifier). Invariant: a command whose program is not there, and is none that the work had to bring, is a
VerifierError; with a program that is there, exit codes 126 and 127 are the work's like any other.
"""

from __future__ import annotations

import posixpath
import re
import shlex

from kat_stream.env.datasets import Files
from kat_stream.env.sandboxes.base import Sandbox
from kat_stream.env.verifiers.base import Verdict, tail
from kat_stream.errors import VerifierError
from topics import Task

_TESTS = "/tests"
_OUTPUT_LIMIT = 1 << 18
# What `sh` answers when it cannot find or start the command itself; the work's own code can end with these, too.
_CANNOT_RUN = (126, 127)
# Says, in the first line of the output and before the work's code runs, whether the command's program is there. In a
# shell of its own: what begins the command may be no word at all.
_LOOK = "(eval {}) >/dev/null 2>&1; echo $?\n"
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


class CommandVerifier:
    name = "command"
    version = "2"

    async def grade(self, task: Task, tests: Files, sandbox: Sandbox) -> Verdict:
        spec = task.verifier
        directory = spec.options.get("tests_directory", _TESTS)
        env = {"TESTS": sandbox.root + directory}
        await sandbox.put(tests, directory)
        program = _program(spec.command)
        done = await sandbox.exec(
            _LOOK.format(shlex.quote(f"command -v {program}")) + spec.command,
            timeout_s=spec.timeout_s,
            env=env,
            merge_stderr=True,
            output_limit=_OUTPUT_LIMIT,
        )
        found, _, output = done.stdout.partition(b"\n")
        startable = found == b"0" or _of_the_work(program, task.environment.workdir)
        evidence = tail(output)
        if done.timed_out:
            return self._too_slow(task, evidence)
        if done.exit_code in _CANNOT_RUN and not startable:
            raise VerifierError(f"{task.task_id}: {spec.command!r} cannot be run (exit {done.exit_code}): {evidence}")
        score = float(done.exit_code == 0)
        return Verdict(score, {"passed": score}, f"{evidence}[exit {done.exit_code}]")

    def _too_slow(self, task: Task, evidence: str) -> Verdict:
        message = f"the tests took longer than {task.verifier.timeout_s:g} s"
        if task.verifier.options.get("timeout") != "fail":
            raise VerifierError(f"{task.task_id}: {message}: {evidence}")
        return Verdict(0.0, {"passed": 0.0}, f"{evidence}[{message}]")


def _of_the_work(program: str, workdir: str) -> bool:
    """Whether it is a file of the work tree, and so the work's to bring."""
    path = posixpath.normpath(posixpath.join(workdir, program.strip("'\"")))
    return "/" in program and "$" not in program and path.startswith(f"{workdir}/")


def _program(command: str) -> str:
    """The first word that is no assignment, quoted as it was; empty where the words cannot be told apart."""
    try:
        words = shlex.split(command, posix=False)
    except ValueError:
        return ""
    return next((word for word in words if not _ASSIGNMENT.match(word)), "")
