"""Every installed agent, unmodified, in a sandbox without a network: its records, the engine and training agree."""

from __future__ import annotations

import aiohttp
import msgspec
import pytest

from kat_stream.cli.main import main
from kat_stream.env.scaffolds import get_scaffold
from kat_stream.env.scaffolds.check import check, wrong_records
from kat_stream.env.scaffolds.description import Step
from kat_stream.env.scaffolds.registry import described, installed_agents
from kat_stream.env.scaffolds.rehearsal import Stage, playing, stage, tokenizer
from tests.contract.env_kit import backend, needs_bwrap
from topics import Sampling, Turn
from topics.record import ints, pack_ints

pytestmark = pytest.mark.anyio


@needs_bwrap
@pytest.mark.parametrize("name", installed_agents())
async def test_an_installed_agent_works_and_its_tokens_are_trained_once(name: str) -> None:
    async with backend() as sandboxes:
        checked = await check(name, sandboxes)
    assert checked.wrong == (), checked.trajectory.log
    assert len(checked.trajectory.turns) >= len(get_scaffold(name).description.check.steps)  # type: ignore[attr-defined]
    assert checked.trainable == checked.sampled - sum(
        len(t.sampled_ids) // 4 for t in checked.trajectory.turns if t.side
    )
    assert checked.memory_bytes < get_scaffold(name).needs().memory_mb << 20


async def recorded(world: Stage) -> list[Turn]:
    """Two turns of a session, as an agent would make them."""
    session = await world.control.open(
        run="r", group_id="r-t0", rollout_id="r-t0-0", sampling=Sampling(), purpose="train"
    )
    messages = [{"role": "user", "content": "echo this"}]
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {session.key}"}) as http:
        for _ in range(2):
            url = f"{world.data_url}{session.path}/v1/chat/completions"
            async with http.post(url, json={"model": "policy", "messages": messages}) as answer:
                said = (await answer.json())["choices"][0]["message"]
            messages += [{"role": "assistant", "content": said["content"]}, {"role": "user", "content": "on"}]
    return await world.control.close(session.session_id)


def tampered(turn: Turn, what: str) -> Turn:
    ids = [*ints(getattr(turn, what))]
    return msgspec.structs.replace(turn, **{what: pack_ints([ids[0] + 1, *ids[1:]])})


async def test_the_check_sees_where_records_engine_and_training_disagree() -> None:
    policy = playing([Step(say="echo one"), Step(say="echo two")])
    async with stage(policy) as world:
        first, second = turns = await recorded(world)
        assert wrong_records(turns, world, policy) == []
        assert wrong_records([first], world, policy) == [
            f"the engine saw call {second.turn_id} and no record tells of it"
        ]
        assert "other prompt ids" in wrong_records([first, tampered(second, "prompt_ids")], world, policy)[0]
        assert "other ids were sampled" in wrong_records([first, tampered(second, "sampled_ids")], world, policy)[0]
        assert "no tree" in wrong_records([second], world, policy)[0]
        assert "recorded twice" in wrong_records([*turns, second], world, policy)[0]
        lost = msgspec.structs.replace(second, trainable=False)
        sampled = [len(turn.sampled_ids) // 4 for turn in turns]
        said = f"{sum(sampled)} tokens were sampled, {sampled[0]} are trained and 0 are side or aborted"
        assert wrong_records([first, lost], world, policy) == [said]
        assert wrong_records([first, msgspec.structs.replace(lost, side="title")], world, policy) == []


async def test_a_scripted_reply_is_never_what_the_tokenizer_would_write() -> None:
    policy = playing([Step(say="echo", tool="bash", arguments={"command": "echo"})])
    sampled = policy([])
    words = tokenizer()
    assert words.decode(sampled, skip_special_tokens=True).startswith("echo\n<tool_call>\n{")
    assert words.encode(words.decode(sampled), add_special_tokens=False) != sampled


def test_what_cannot_be_checked_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    assert main(["scaffolds", "check", "codex"]) == 2
    assert "run: kat-stream scaffolds install codex" in capsys.readouterr().err
    assert main(["scaffolds", "check", "shell"]) == 2
    assert "shell runs in the worker" in capsys.readouterr().err


def test_the_list_has_described_and_registered_agents(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaffolds", "list"]) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {*described(), "shell", "oracle", "nop"} <= names
