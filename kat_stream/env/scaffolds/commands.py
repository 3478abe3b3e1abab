"""One command of an agent that runs in the worker: how long it may take, and how much of its output is seen.

Invariant: whatever the command does, what comes back is text within the bounds that the limits of the rollout set.
"""

from __future__ import annotations

from kat_stream.env.sandboxes.base import TIMED_OUT, Sandbox
from kat_stream.env.scaffolds.base import Limits
from kat_stream.env.scaffolds.shell_prompt import observation

_NO_COMMAND = b"no command in the reply"
_USAGE_ERROR = 2
_MIN_COMMAND_S = 5.0
_MIN_OBSERVATION_BYTES = 400


def seen_bytes(limits: Limits) -> int:
    """Bytes of one observation, at most."""
    return max(_MIN_OBSERVATION_BYTES, limits.max_context // 4)


async def observe(sandbox: Sandbox, command: str, limits: Limits) -> str:
    """Run a command and word what came back; what is no command is answered as the shell would. SandboxDied."""
    limit_bytes = seen_bytes(limits)
    if not command or "\0" in command:
        return observation(_NO_COMMAND, _USAGE_ERROR, limit_bytes)
    timeout_s = max(_MIN_COMMAND_S, limits.seconds / 10)
    done = await sandbox.exec(command, timeout_s=timeout_s, merge_stderr=True, output_limit=limit_bytes * 4)
    return observation(done.stdout, TIMED_OUT if done.timed_out else done.exit_code, limit_bytes)
