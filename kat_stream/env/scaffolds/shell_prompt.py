"""The white-box shell agent's wording: what the policy is told, and how a command's output comes back.

Owns the agent's protocol with the policy. Pure: no I/O. Invariant: the messages of a turn extend those of the turn
before, so that a chat template that only appends keeps one token prefix over a rollout.

The protocol: each assistant message is one shell command, run with `sh -c` in the work tree; its output comes back as a
user message; the message FINISH_COMMAND ends the rollout.
"""

from __future__ import annotations

SYSTEM_PROMPT = "Mend the repository."
FINISH_COMMAND = "submit"

_GAP = "\n...\n"


def first_messages(instruction: str) -> list[dict[str, str]]:
    """The conversation before the policy's first turn."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": instruction}]


def observation(output: bytes, exit_code: int, limit_bytes: int = 400) -> str:
    """What a command printed, cut in the middle to `limit_bytes`, then its exit code.

    Bytes that are not UTF-8 become U+FFFD; an output without a final newline gets one.
    """
    text = cut(output, limit_bytes)
    if text and not text.endswith("\n"):
        text += "\n"
    return f"{text}[exit {exit_code}]"


def cut(output: bytes, limit_bytes: int) -> str:
    """As text, without its middle if it has more than `limit_bytes`."""
    if len(output) <= limit_bytes:
        return output.decode("utf-8", errors="replace")
    head = output[: limit_bytes // 2]
    tail = output[len(output) - limit_bytes // 2 :]
    return head.decode("utf-8", errors="replace") + _GAP + tail.decode("utf-8", errors="replace")
