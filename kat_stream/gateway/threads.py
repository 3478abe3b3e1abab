"""What agents say about themselves in headers: the thread of their work that a call belongs to.

Measured in research/scaffolds.md 1: Claude Code, Codex, opencode and Kilo name their threads, sub-agents by names of
their own; the others say nothing, and their threads are told apart by their instructions. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

_HEADERS = ("x-claude-code-agent-id", "x-claude-code-session-id", "thread-id", "x-session-id")
"""The first that is there counts: Claude Code names the session in every call, and the agent only in a sub-agent's."""
_LONGEST = 64


def named_thread(headers: Mapping[str, str]) -> str:
    """The agent's name for this thread, empty if it gives none. Anything odd is no name."""
    for header in _HEADERS:
        if name := headers.get(header, ""):
            plain = len(name) <= _LONGEST and name.isascii() and name.replace("-", "").replace("_", "").isalnum()
            return name if plain else ""
    return ""
