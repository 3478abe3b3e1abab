"""Demonstrations of the training split: conversations in the exact form of the shell agent, with known outputs.

Owns what the warm start shows the policy: clean solutions, solutions after an error, and sloppy ones (which RL is there
to remove). Invariant: every output is what the real command prints in the task's work tree; a test runs a sample.
Commands are predicted, not run: a sandbox call costs more than the training step it feeds.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from kat_stream.demo.prediction import predict
from kat_stream.env.mend import MendTask
from kat_stream.env.mend.words import NAMES
from kat_stream.env.scaffolds.shell_prompt import FINISH_COMMAND, first_messages

MAX_TURNS = 6


@dataclass(frozen=True)
class Turn:
    """One assistant message, the observation that follows (empty after the last), and whether to learn the message."""

    command: str
    observed: str
    learn: bool = True


@dataclass(frozen=True)
class Demonstration:
    """A conversation with one task: its messages are the prompt's, then the turns'."""

    task: MendTask
    turns: tuple[Turn, ...]

    def messages(self) -> list[dict[str, str]]:
        messages = first_messages(self.task.instruction)
        for turn in self.turns:
            messages.append({"role": "assistant", "content": turn.command})
            if turn.observed:
                messages.append({"role": "user", "content": turn.observed})
        return messages


def clean(task: MendTask) -> Demonstration:
    """The solution, then the finish command."""
    return _demonstrate(task, (*task.solution, FINISH_COMMAND))


def recovered(task: MendTask, rng: random.Random) -> Demonstration:
    """A command that fails, then the solution: the slip is context, it is not learnt."""
    slip = _slip(task, rng)
    rest = _demonstrate(task, (*task.solution, FINISH_COMMAND)).turns
    return Demonstration(task, (slip, *rest))


def sloppy(task: MendTask, rng: random.Random) -> Demonstration:
    """One of the three habits that RL must break: submit too early, the template's usual fault, never submit."""
    habit = rng.choices(("early", "fault", "never"), weights=(4, 5, 1))[0]
    if habit == "early":
        return _demonstrate(task, (*task.solution[:-1], FINISH_COMMAND))
    if habit == "fault":
        return _demonstrate(task, (*task.solution[:-1], fault(task), FINISH_COMMAND))
    commands = (*task.solution, *("ls",) * MAX_TURNS)[:MAX_TURNS]
    return _demonstrate(task, commands)


def fault(task: MendTask) -> str:
    """The wrong last command that is usual for the template; it changes too much, too little or the wrong thing."""
    right = task.solution[-1]
    for pattern, replacement in _FAULTS:
        wrong = re.sub(pattern, replacement, right)
        if wrong != right:
            return wrong
    raise ValueError(f"no fault is known for {right!r}")


_FAULTS = (
    (r"^sed -i /(.*)/d (.*)$", r"rm \2"),
    (r"^sed -i \"1i (.*)\" (.*)$", r"echo \1>>\2"),
    (r"^sed -i ", "sed "),
    (r">>", ">"),
    (r"^mv ", "cp "),
    (r"^cp ", "mv "),
    (r"^chmod \+x ", "chmod -x "),
    (r"^touch ", "mkdir "),
)


def _demonstrate(task: MendTask, commands: tuple[str, ...]) -> Demonstration:
    tree = _tree(task)
    turns = []
    for number, command in enumerate(commands, start=1):
        last = command == FINISH_COMMAND or number == MAX_TURNS
        turns.append(Turn(command, "" if last else predict(command, tree)))
    return Demonstration(task, tuple(turns))


def _slip(task: MendTask, rng: random.Random) -> Turn:
    """The first command with one name mistaken, if that fails and changes nothing; else a file that is not there."""
    first = task.solution[0]
    other = rng.choice([name for name in NAMES if name not in first])
    names = [name for name in re.findall(r"\w+", first) if name in NAMES]
    if names:
        command = first.replace(rng.choice(names), other)
        observed = predict(command, _tree(task))
        if not observed.endswith("[exit 0]"):
            return Turn(command, observed, learn=False)
    command = rng.choice(("cat {}.py", "sed -i /x/d {}.py", "chmod +x {}.py")).format(other)
    return Turn(command, predict(command, {}), learn=False)


def _tree(task: MendTask) -> dict[str, str]:
    return {path: content.decode() for path, (content, _) in task.files.items()}
