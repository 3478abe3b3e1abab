"""Demonstrations of the training split: conversations with known outputs, in the exact form of an agent.

Owns what the warm start shows the policy: clean solutions, solutions after an error, and sloppy ones (which RL is there
to remove). Invariant: every output is what the real command prints in the task's work tree; a test runs a sample.
Commands are predicted, not run: a sandbox call costs more than the training step it feeds.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from kat_stream.demo.prediction import Printed, predict
from kat_stream.env.mend import MendTask
from kat_stream.env.mend.words import NAMES
from kat_stream.env.scaffolds.shell_prompt import FINISH_COMMAND, first_messages, observation

MAX_TURNS = 6


@dataclass(frozen=True)
class Turn:
    """One command, what it prints (None after the last), and whether to learn to give it."""

    command: str
    printed: Printed | None
    learn: bool = True


@dataclass(frozen=True)
class Demonstration:
    """The commands given to one task; the last is FINISH_COMMAND, or the last that the limit of turns permits."""

    task: MendTask
    turns: tuple[Turn, ...]

    def messages(self) -> list[dict[str, str]]:
        """The conversation as the shell agent has it."""
        messages = first_messages(self.task.instruction)
        for turn in self.turns:
            messages.append({"role": "assistant", "content": turn.command})
            if turn.printed is not None:
                seen = observation(turn.printed.output.encode(), turn.printed.exit_code)
                messages.append({"role": "user", "content": seen})
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
        turns.append(Turn(command, None if last else predict(command, tree)))
    return Demonstration(task, tuple(turns))


def _slip(task: MendTask, rng: random.Random) -> Turn:
    """The first command with one name mistaken, if that fails and changes nothing; else a file that is not there."""
    first = task.solution[0]
    other = rng.choice([name for name in NAMES if name not in first])
    names = [name for name in re.findall(r"\w+", first) if name in NAMES]
    if names:
        command = first.replace(rng.choice(names), other)
        printed = predict(command, _tree(task))
        if printed.exit_code != 0:
            return Turn(command, printed, learn=False)
    command = rng.choice(("cat {}.py", "sed -i /x/d {}.py", "chmod +x {}.py")).format(other)
    return Turn(command, predict(command, {}), learn=False)


def _tree(task: MendTask) -> dict[str, str]:
    return {path: content.decode() for path, (content, _) in task.files.items()}
