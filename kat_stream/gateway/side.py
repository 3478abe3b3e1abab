"""Side requests: what an agent asks beside its task. They are served and recorded, and never trained.

Measured in research/scaffolds.md: titles, commit messages and quota probes. Summaries of the history are no side
requests: what the policy writes there decides how the task goes on. Pure.
"""

from __future__ import annotations

from kat_stream.gateway.messages import ModelCall

SUFFIX = "-small"
"""`MODEL-small` is the name for an agent's small or weak model: what is asked of it is beside the task."""
_TITLES = ("you are a title generator", "generate a concise title", "generate a short title")
_COMMIT = "commit message"
_HEAD = 400
"""Characters of the instructions in which they say what they are for."""


def side_reason(call: ModelCall) -> str:
    """model | probe | title | commit; empty for the task's own work."""
    if call.model.endswith(SUFFIX):
        return "model"
    if call.max_tokens == 1:
        return "probe"
    if call.tools:
        return ""
    purpose = call.system()[:_HEAD].lower()
    if any(title in purpose for title in _TITLES):
        return "title"
    return "commit" if _COMMIT in purpose and "generate" in purpose else ""
