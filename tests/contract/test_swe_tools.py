"""The white-box agent with SWE-agent's tools: edits in real sandboxes, whole rollouts through the real gateway."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat_stream.env.sandboxes.base import Sandbox, SandboxSpec
from kat_stream.env.scaffolds.base import Limits
from kat_stream.env.scaffolds.commands import observe
from kat_stream.env.scaffolds.editor import FILE_LIMIT, Edit, Editor, Refused, _inserted, numbered
from kat_stream.env.scaffolds.swe_wording import EDITOR, NO_CALL, SUBMIT
from kat_stream.errors import SandboxDied
from tests.contract.env_kit import backend, first_task, graded, harbor_task, needs_bwrap, request, roll
from tests.contract.gateway_kit import CHATML, THINKING, World, saying, tokenizer, world
from topics import Trajectory

pytestmark = [pytest.mark.anyio, needs_bwrap]


@asynccontextmanager
async def editor(**files: str) -> AsyncIterator[tuple[Editor, Sandbox]]:
    """An editor in a sandbox with these files in its work tree."""
    async with backend() as sandboxes, await sandboxes.create(SandboxSpec()) as sandbox:
        await sandbox.put({name: (text.encode(), 0o755) for name, text in files.items()}, "/work")
        yield Editor(sandbox), sandbox


def edit(command: str, path: str = "/work/a", **more: Any) -> Edit:
    return msgspec.convert({"command": command, "path": path, **more}, Edit)


async def test_a_file_is_seen_created_changed_and_put_back() -> None:
    async with editor(a="one\r\ntwo\nthree") as (tool, sandbox):
        assert await tool.run(edit("view", view_range=[2, -1])) == (
            "/work/a, lines numbered as by `cat -n`:\n     2\ttwo\n     3\tthree\n"
        )
        shown = await tool.run(edit("str_replace", old_str="two", new_str="2\n2b"))
        assert "     2\t2\n     3\t2b\n     4\tthree\n" in shown
        await tool.run(edit("insert", insert_line=0, new_str="zero\n"))
        assert await sandbox.read_file("a", 100) == b"zero\none\r\n2\n2b\nthree"
        await tool.run(edit("undo_edit"))
        await tool.run(edit("undo_edit"))
        assert await sandbox.read_file("a", 100) == b"one\r\ntwo\nthree"
        await tool.run(edit("str_replace", old_str="one\r\n"))
        assert await sandbox.read_file("a", 100) == b"two\nthree"
        await tool.run(edit("create", "/work/deep/er/ä b", file_text="new\n"))
        assert await sandbox.read_file("deep/er/ä b", 100) == b"new\n"
        listing = await tool.run(edit("view", "/work"))
        assert listing.splitlines()[1:] == [".", "./a", "./deep", "./deep/er"]


async def test_a_file_keeps_its_mode_and_a_link_stays_a_link() -> None:
    async with editor(a="echo one\n") as (tool, sandbox):
        await sandbox.exec("ln -s a link", timeout_s=10)
        await tool.run(edit("str_replace", "/work/link", old_str="one", new_str="two"))
        done = await sandbox.exec("./a; readlink link", timeout_s=10)
        assert done.stdout == b"two\na\n"


REFUSED = {
    "relative": (edit("view", "a"), "not absolute"),
    "not there": (edit("view", "/work/none"), "does not exist"),
    "a range beyond the end": (edit("view", view_range=[1, 9]), "lines 1 to 3"),
    "a range of one": (edit("view", view_range=[1]), r"view_range \[1\]"),
    "there already": (edit("create", file_text=""), "exists already"),
    "nothing to create": (edit("create", "/work/b"), "needs file_text"),
    "not found": (edit("str_replace", old_str="four"), "does not appear"),
    "found twice": (edit("str_replace", old_str="t"), r"lines \[2, 3\]"),
    "nothing to find": (edit("str_replace", new_str="x"), "needs old_str"),
    "nowhere to insert": (edit("insert", new_str="x"), "needs insert_line"),
    "beyond the end": (edit("insert", insert_line=4, new_str="x"), "0 to 3"),
    "nothing to undo": (edit("undo_edit"), "no edit"),
    "a directory": (edit("str_replace", "/work", old_str="a"), "not a regular file"),
    "binary": (edit("view", "/work/binary"), "UTF-8"),
    "read-only": (edit("create", "/usr/bin/x", file_text="x"), "cannot be written"),
    "too large": (edit("view", "/work/large"), "larger than"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_cannot_be_edited_is_told_and_changes_nothing(case: str) -> None:
    asked, told = REFUSED[case]
    async with editor(a="one\ntwo\nthree\n") as (tool, sandbox):
        fill = f"printf '\\377' > binary; head -c {FILE_LIMIT + 1} /dev/zero > large; sha256sum * > /tmp/before"
        await sandbox.exec(fill, timeout_s=20)
        with pytest.raises(Refused, match=told):
            await tool.run(asked)
        assert (await sandbox.exec("sha256sum * | diff - /tmp/before", timeout_s=20)).exit_code == 0


async def test_an_edit_for_which_the_disk_has_no_room_leaves_the_file_as_it_was() -> None:
    old = "line\n" * 200_000 + "mark\n"
    async with editor(a=old) as (tool, sandbox):
        await sandbox.exec("ln -s new link", timeout_s=10)
        await tool.run(edit("str_replace", old_str="mark", new_str="m" * 3_000_000))
        await tool.run(edit("str_replace", old_str="m" * 3_000_000, new_str="mark"))
        await sandbox.exec("cat /dev/zero > filler", timeout_s=20)
        for refused in (
            edit("str_replace", old_str="mark", new_str="m" * 300_000),
            edit("undo_edit"),
            edit("create", "/work/new", file_text="x" * 300_000),
            edit("create", "/work/link", file_text="x" * 300_000),
        ):
            with pytest.raises(Refused, match=r"cannot be written: .*No space left on device$"):
                await tool.run(refused)
        assert await sandbox.read_file("a", 4_000_000) == old.encode()
        assert (await sandbox.exec("ls; readlink link", timeout_s=10)).stdout == b"a\nfiller\nlink\nnew\n"
        await sandbox.exec("rm filler", timeout_s=10)
        await tool.run(edit("undo_edit"))
        assert len(await sandbox.read_file("a", 5_000_000)) == len(old) - 4 + 3_000_000


async def test_an_old_str_that_is_everywhere_in_a_large_file_is_refused_at_once() -> None:
    async with editor(a="e\n" * 500_000) as (tool, _):
        with pytest.raises(Refused, match=r"lines \[1, 2, 3, 4, 5, 6, 7, 8, 9, 10\]"):
            await tool.run(edit("str_replace", old_str="e", new_str="x"))


async def test_what_is_seen_of_a_long_output_ends_as_the_output_does() -> None:
    async with editor() as (_, sandbox):
        limits = Limits(max_turns=1, max_new_tokens=1, max_context=4096, seconds=60.0)
        seen = await observe(sandbox, "seq 1 200000; echo FAILED=3; exit 1", limits)
        assert seen.startswith("1\n2\n")
        assert seen.endswith("\n199999\n200000\nFAILED=3\n[exit 1]")


async def test_a_sandbox_that_is_gone_is_no_refusal() -> None:
    async with editor(a="one\n") as (tool, sandbox):
        await sandbox.destroy()
        with pytest.raises(SandboxDied):
            await tool.run(edit("view"))


@given(st.lists(st.sampled_from(["", "a", "b c"]), max_size=4), st.booleans(), st.integers(0, 4), st.sampled_from("xy"))
def test_an_insertion_adds_its_lines_and_nothing_else(lines: list[str], ends: bool, at: int, new: str) -> None:
    text = "\n".join(lines) + ("\n" if ends and lines else "")
    count = len(numbered(text, 1, 99).splitlines())
    if at > count:
        with pytest.raises(Refused):
            _inserted(text, edit("insert", insert_line=at, new_str=new))
        return
    changed, line = _inserted(text, edit("insert", insert_line=at, new_str=new))
    had, has = text.split("\n"), changed.split("\n")
    assert (has[:at], has[at], has[at + 1 :], line) == (had[:at], new, had[at:], at + 1)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@asynccontextmanager
async def working(
    tmp_path: Path, *replies: str, template: str = CHATML, **sampling: int
) -> AsyncIterator[tuple[Trajectory, World, Any]]:
    """A rollout of a policy that says these replies, the last one for ever, and its reward."""
    harbor_task(tmp_path)
    task = msgspec.structs.replace(first_task(f"harbor:{tmp_path}"), scaffold="swe-tools")
    more = {"max_turns": 10, "max_context": 8000, "max_new_tokens": 400, **sampling}
    async with backend() as sandboxes, world(saying(*replies), tools="hermes", template=template) as gateway:
        trajectory = await roll(sandboxes, request(task, **more), gateway)
        yield trajectory, gateway, await graded(sandboxes, trajectory)


@pytest.mark.parametrize(("template", "thought"), [(CHATML, ""), (THINKING, "<think>\nhm\n</think>\n\n")])
async def test_a_rollout_with_every_tool_is_one_path_of_trained_turns(
    tmp_path: Path, template: str, thought: str
) -> None:
    async with working(
        tmp_path,
        thought + call("bash", command="pwd"),
        call(EDITOR, command="view", path="/app/state.txt"),
        "Two at once. "
        + call(EDITOR, command="str_replace", path="/app/state.txt", old_str="broken", new_str="fixed")
        + call("bash", command="cat state.txt"),
        call("bash", command="true"),
        call(SUBMIT),
        template=template,
    ) as (trajectory, gateway, reward):
        assert (trajectory.outcome, reward.score) == ("submitted", 1.0), trajectory.detail
        assert b"+fixed" in trajectory.patch
        turns = trajectory.turns
        assert [turn.fork for turn in turns] == [""] * 5
        assert [turn.parent for turn in turns] == ["", *(turn.turn_id for turn in turns[:-1])]
        assert all(turn.trainable for turn in turns)
        seen = tokenizer().decode(gateway.engines[0].requests[-1].input_ids)
        assert thought in seen
        for told in ("/app\n[exit 0]", "     1\tbroken", "has been edited", "fixed\n[exit 0]", "\n[exit 0]"):
            assert told in seen


async def test_calls_that_are_none_are_told_and_cost_a_turn(tmp_path: Path) -> None:
    async with working(
        tmp_path,
        "I think.",
        call("fly", to="the moon"),
        call("bash"),
        call(EDITOR, command="paint", path="/work"),
        call("bash", command=" "),
        call("bash", command="sleep 100"),
        max_turns=6,
    ) as (trajectory, gateway, reward):
        assert (trajectory.outcome, reward.score) == ("turn_limit", 0.0), trajectory.detail
        seen = tokenizer().decode(gateway.engines[0].requests[-1].input_ids)
        for told in (NO_CALL, "no tool 'fly'", "arguments of bash", "arguments of str_replace_editor", "no command"):
            assert told in seen


@pytest.mark.parametrize(
    ("reply", "sampling", "outcome"),
    [
        (call("bash", command="head -c 3000 /dev/zero | tr '\\0' x"), {"max_context": 3000}, "token_limit"),
        ("x" * 60, {"max_new_tokens": 20}, "token_limit"),
        (call("bash", command="kill -9 -1"), {"max_turns": 2}, "turn_limit"),
    ],
    ids=["a full context", "a reply that is cut", "a command that kills all it sees"],
)
async def test_how_else_a_rollout_ends(tmp_path: Path, reply: str, sampling: dict[str, int], outcome: str) -> None:
    async with working(tmp_path, reply, **sampling) as (trajectory, _, reward):
        assert (trajectory.outcome, trajectory.error_class) == (outcome, ""), trajectory.detail
        assert reward.status == "graded"
