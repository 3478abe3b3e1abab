"""What a template writes behind a reply, seen without the whole history: long conversations cost what is new in them.

Owns the shortened history and the proof that it serves. Most templates write a message by itself, by its neighbours, by
what stands at the head and by where a user spoke last. For those, what follows a reply is the same behind a history
from whose middle whole exchanges were left out. Invariant: this is used for a template only after `is_local` saw both
histories give the same on conversations of each kind, and never where earlier reasoning might be dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kat_stream.gateway.messages import Message, ToolCall
from kat_stream.gateway.parsers.reasoning import CLOSING

STUB: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
]
"""Stands for a tool set: templates write tools at the head."""
_KEPT = 2
"""Newest exchanges of a shortened history: results of tools may be written by what stands before them."""
_WORTH = 4
"""Exchanges that must be left out for it to be worth the trouble."""
Behind = Callable[[Sequence[Message], Message, Sequence[Message], Any], tuple[str, str] | None]
"""(history, reply, what follows, tools) -> the template's text of the reply, and what it puts behind it."""


def shorten(history: Sequence[Message]) -> tuple[Message, ...] | None:
    """The head, the exchange in which a user spoke last, and the newest ones; None if little can be left out.

    An exchange is an assistant's message and all up to the next.
    """
    starts = [at for at, message in enumerate(history) if message.role == "assistant"]
    if len(starts) < _KEPT + _WORTH:
        return None
    spoke = next((at for at in range(len(history) - 1, -1, -1) if history[at].role == "user"), 0)
    asked = max((number for number, start in enumerate(starts) if start < spoke), default=-1)
    newest = len(starts) - _KEPT
    kept = list(history[: starts[0]])
    if 0 <= asked < newest:
        kept += history[starts[asked] : starts[asked + 1]]
    return (*kept, *history[starts[newest] :])


def may_go_on(following: Sequence[Message], *, thought: bool) -> bool:
    """Whether these may be written behind a shortened history.

    Where a user speaks, a template may drop what was thought before; instructions in the middle are rare.
    """
    roles = {message.role for message in following}
    return roles <= {"tool"} or (roles <= {"tool", "user"} and not thought)


def thinks(message: Message) -> bool:
    """Whether a message holds reasoning, in its place or in its text."""
    return bool(message.reasoning) or CLOSING in message.content


def is_local(behind: Behind) -> bool:
    """Whether a template writes the same behind a reply for a shortened history as for the whole one."""
    return all(
        behind(whole, reply, following, tools) == behind(short, reply, following, STUB if tools else None)
        for whole, reply, following, tools in trials()
        if (short := shorten(whole)) is not None
    )


Trial = tuple[tuple[Message, ...], Message, tuple[Message, ...], list[dict[str, Any]] | None]


def trials() -> list[Trial]:
    """(history, reply, what follows, tools) of conversations with tools, users, both, parallel calls and reasoning."""
    system, task = Message(role="system", content="Be brief."), Message(role="user", content="Mend it.")
    tools = [
        {"type": "function", "function": {"name": n, "description": n, "parameters": {"type": "object"}}} for n in "gh"
    ]
    user, result = _user("More?"), _results(1, 99)
    worked = [part for i in range(9) for part in (_works(i, 1 + i % 2), *_results(1 + i % 2, i))]
    thought = [part for i in range(9) for part in (_works(i, 1, thought=f"hm {i}" if i % 3 else ""), *_results(1, i))]
    talked = [part for i in range(9) for part in (_says(i), *_user(f"And {i}?"))]
    both = [*worked[:9], _says(1), *_user("Go on."), *worked[9:]]
    return [
        ((system, task, *worked), _works(99, 1), result, tools),
        ((system, task, *worked), _works(99, 2), _results(2, 99), tools),
        ((task, *worked), _says(99), user, tools),
        ((system, task, *thought), _works(99, 1, thought="so"), result, tools),
        ((system, task, *talked), _says(99), user, None),
        ((task, *talked), _says(99), (*user, *user), None),
        ((system, task, *both), _works(99, 1), result, tools),
        ((task, *both), _says(99), user, tools),
        ((task, *talked, *worked), _works(99, 1), (*result, *user), tools),
    ]


def _user(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def _says(number: int) -> Message:
    return Message(role="assistant", content=f"Done {number}.")


def _works(number: int, calls: int, thought: str = "") -> Message:
    made = tuple(ToolCall(f"call{number}x{i}", "gh"[i], f'{{"a": "{number}", "b": {i}}}') for i in range(calls))
    return Message(role="assistant", content="" if number % 4 else "I look.", tool_calls=made, reasoning=thought)


def _results(calls: int, number: int) -> tuple[Message, ...]:
    return tuple(
        Message(role="tool", content=f"out {number} {i}", tool_call_id=f"call{number}x{i}", name="gh"[i])
        for i in range(calls)
    )
