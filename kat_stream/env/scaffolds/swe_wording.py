"""What the policy is told by the agent with SWE-agent's tools. Owns wording and tool schemas; pure.

Names and arguments of the tools are SWE-agent's (tools/edit_anthropic, tools/submit and its `bash`), so that a policy
that knows one knows the other.
"""

from __future__ import annotations

from typing import Any

BASH, EDITOR, SUBMIT = "bash", "str_replace_editor", "submit"
SYSTEM_PROMPT = "You work on a repository with the tools that you are given, until its task is done."
NO_CALL = f"Your reply called no tool. Call `{BASH}` or `{EDITOR}`, or `{SUBMIT}` when you are done."


def first_messages(instruction: str, workdir: str) -> list[dict[str, Any]]:
    """The conversation before the policy's first turn."""
    place = f"The repository is in {workdir}. When the task is done, call `{SUBMIT}`.\n\n"
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": place + instruction}]


def _tool(name: str, description: str, required: tuple[str, ...] = (), **properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


TOOLS = [
    _tool(
        BASH,
        "Runs a command with the shell, in the repository. It must end by itself and reads no input.",
        ("command",),
        command=_text("The command to run."),
    ),
    _tool(
        EDITOR,
        "Shows, creates and changes files. `view` numbers the lines of a file, or lists a directory two levels deep. "
        "`create` makes a file that is not there yet. `str_replace` replaces `old_str`, which must appear in the file "
        "exactly once, white space included. `insert` puts `new_str` after a line. `undo_edit` takes the last change "
        "of the file back.",
        ("command", "path"),
        command={
            "type": "string",
            "enum": ["view", "create", "str_replace", "insert", "undo_edit"],
            "description": "What to do.",
        },
        path=_text("Absolute path of a file, or of a directory to view."),
        file_text=_text("create: all that the file will hold."),
        old_str=_text("str_replace: the text to replace."),
        new_str=_text("str_replace: what comes in its place (left out: nothing); insert: the lines to put in."),
        insert_line={"type": "integer", "description": "insert: the line to insert after; 0: at the beginning."},
        view_range={
            "type": "array",
            "items": {"type": "integer"},
            "description": "view: [first, last] line to show, counted from 1; -1 is the last line of the file.",
        },
    ),
    _tool(SUBMIT, "Ends the work: what the repository holds now is the answer."),
]
