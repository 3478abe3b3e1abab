"""How a black-box agent words a conversation: a command as a call of its tool, an output as its tool's result, the end.

Owns the wording of the agents that the demo knows. Pure: no I/O. Invariant: a conversation written here is, text for
text, what the gateway renders when the unmodified agent has it (but for what the agent draws anew each time, such as
the id of an output); a contract test has each installed agent say one.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from pathlib import Path

from kat_stream.errors import ConfigError

_CALL, _ARGUMENT, _CLOSE = '<tool_call>\n{"name": "', '", "arguments": {"', '"}}\n</tool_call>'
_EXIT_CODES = (0, 1, 2)


class Wording(ABC):
    """One agent's way to speak. `tool` takes a shell command as its argument `argument`."""

    tool: str
    argument: str
    finish: str
    """The policy's last message."""

    def call(self, command: str) -> str:
        """The policy's message that runs a command."""
        return self._opening() + json.dumps(command, ensure_ascii=False)[1:-1] + _CLOSE

    def phrases(self) -> list[str]:
        """Texts that come again in every conversation: each is one token of the policy."""
        return [self._opening(), _CLOSE, r"\"", *self._frame()]

    @abstractmethod
    def observation(self, output: str, exit_code: int, rng: random.Random) -> str:
        """The tool's result as the policy sees it."""

    @abstractmethod
    def _frame(self) -> list[str]:
        """The unchanging texts of an observation."""

    def _opening(self) -> str:
        return f'{_CALL}{self.tool}{_ARGUMENT}{self.argument}": "'


class MiniSweAgent(Wording):
    """mini-swe-agent 2: an output is a JSON object, escaped for HTML as jinja's `tojson` does."""

    tool, argument = "bash", "command"
    _escapes = (("<", r"\u003c"), (">", r"\u003e"), ("&", r"\u0026"), ("'", r"\u0027"))

    def __init__(self) -> None:
        self.finish = self.call("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")

    def observation(self, output: str, exit_code: int, rng: random.Random) -> str:
        escaped = json.dumps(output)
        for sign, code in self._escapes:
            escaped = escaped.replace(sign, code)
        return f'{self._head(exit_code)}{escaped[1:-1]}"\n}}'

    def _frame(self) -> list[str]:
        heads = [self._head(code) for code in _EXIT_CODES]
        return [self.finish, *heads, '"\n}', r"\n", *(code for _, code in self._escapes)]

    @staticmethod
    def _head(exit_code: int) -> str:
        return f'{{\n  "returncode": {exit_code},\n  "output": "'


class Codex(Wording):
    """Codex CLI: an output as it is, under five lines about it; an answer without a call is the end."""

    tool, argument, finish = "exec_command", "cmd", "submit"

    def observation(self, output: str, exit_code: int, rng: random.Random) -> str:
        chunk, ticks = f"{rng.getrandbits(24):06x}", rng.choice((0, 0, rng.randrange(600)))
        # It counts four bytes as a token.
        count = -(-len(output.encode()) // 4)
        lines = f"Chunk ID: {chunk}\nWall time: 0.{ticks:04d} seconds\nProcess exited with code {exit_code}\n"
        return f"{lines}Original token count: {count}\nOutput:\n{output}"

    def _frame(self) -> list[str]:
        exits = [f" seconds\nProcess exited with code {code}\nOriginal token count: " for code in _EXIT_CODES]
        return ["Chunk ID: ", "\nWall time: 0.", *exits, "\nOutput:\n"]


_WORDINGS: dict[str, type[Wording]] = {"mini-swe-agent": MiniSweAgent, "codex": Codex}


def wording_names() -> list[str]:
    """The black-box agents that the demo can teach its policy to speak through, sorted."""
    return sorted(_WORDINGS)


def get_wording(scaffold: str) -> Wording:
    """The wording of a scaffold, in whichever version; ConfigError names those there are."""
    return _WORDINGS[_known(scaffold)]()


def settings_of(scaffold: str) -> Path:
    """The TOML file of the demo with this agent; ConfigError as `get_wording`."""
    return Path(__file__).with_name(f"{_known(scaffold)}.toml")


def _known(scaffold: str) -> str:
    bare = scaffold.partition("@")[0]
    if bare not in _WORDINGS:
        raise ConfigError(f"demo: no scaffold {scaffold!r}; there are: shell, {', '.join(wording_names())}")
    return bare
