"""The scorer on real engines: right log-probs of the right tokens, one weight version, an answer whatever happens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import anyio
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from consumers.scorer import IDENTICAL, Found, ScorerHandler, _say_identical, score_of, teachers_of
from kat_stream.config import ScorerSection, TeacherSection
from kat_stream.engines.client import EngineClient
from kat_stream.engines.embedded import start_engine
from kat_stream.engines.embedded.runner import Dtype
from kat_stream.errors import ConfigError, EngineRejected
from kat_stream.log.base import Delivered, Position
from kat_stream.log.outcome import Emit
from kat_stream.rl.scores import repeats_of
from kat_stream.rl.teachers import Teachers
from tests.engine_kit import CONTEXT, VOCAB, plain_logprobs, plain_model, save_model, save_tokenizer
from tests.unit.records import RUN, request, trajectory, turn
from tests.waiting import until
from topics import Score, Trajectory, Turn, encode, header_of
from topics.record import pack_ints

pytestmark = pytest.mark.anyio
SECTION = ScorerSection(enabled=True, repeats=3, call_timeout_s=60.0)
ROOT, CHILD, FORK = "root", "child", "fork"
IDS = {
    ROOT: ([3, 4, 5, 6], [7, 8, 9]),
    CHILD: ([3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13]),
    FORK: ([3, 4, 5, 6, 20], [21, 22, 23, 24]),
}


@dataclass
class World:
    model: Path
    engines: list[EngineClient]
    teacher: EngineClient

    def handler(self, section: ScorerSection = SECTION, teachers: Teachers | None = None) -> ScorerHandler:
        return ScorerHandler(RUN, section, self.engines, teachers, {"expert": self.teacher})


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("weights")
    return save_model(base / "policy", 0, "qwen3_moe"), save_model(base / "expert", 1)


@asynccontextmanager
async def world(directories: tuple[Path, Path], engines: int = 2) -> AsyncIterator[World]:
    policy, expert = directories
    servers = [await _engine(policy, "a.0") for _ in range(engines)]
    servers.append(await _engine(expert, "expert"))
    try:
        async with aiohttp.ClientSession() as session:
            clients = [EngineClient(server.url, session) for server in servers]
            yield World(policy, clients[:-1], clients[-1])
    finally:
        for server in servers:
            await server.close()


async def _engine(model: Path, version: str):  # type: ignore[no-untyped-def]
    return await start_engine(model, model_name="m", max_total_tokens=2048, max_running=8, weight_version=version)


def made(versions: dict[str, str] | None = None, **fields: object) -> Trajectory:
    """A turn, one that goes on from it, and one that forks."""
    asked = request()
    turns = [
        turn(asked, prompt, sampled, name=name, version=(versions or {}).get(name, "a.0"))
        for name, (prompt, sampled) in IDS.items()
    ]
    turns[1] = _delta(turns[1], ROOT, 7, IDS[CHILD][0][7:])
    turns[2] = _delta(turns[2], ROOT, 4, IDS[FORK][0][4:])
    return trajectory(asked, *turns, **fields)


def _delta(whole: Turn, parent: str, prefix: int, prompt: list[int]) -> Turn:
    values = {name: getattr(whole, name) for name in whole.__struct_fields__}
    return Turn(**values | {"parent": parent, "prefix_len": prefix, "prompt_ids": pack_ints(prompt)})


async def scored(handler: ScorerHandler, one: Trajectory) -> list[Score]:
    headers = {"record": header_of(Trajectory).encode()}
    outcome = await handler(Delivered(Position("trajectories", 0, 0), None, encode(one), headers, 0))
    assert isinstance(outcome, Emit)
    assert all(isinstance(record, Score) for record in outcome.records)
    return list(outcome.records)  # type: ignore[arg-type]


def expected(model: Path, *names: str) -> np.ndarray:
    plain = plain_model(model)
    rows = [plain_logprobs(plain, [*IDS[name][0], *IDS[name][1]])[-len(IDS[name][1]) :] for name in names]
    return np.concatenate(rows)


@pytest.mark.parametrize("bypass", [False, True])
async def test_repeats_are_the_models_log_probs_of_what_was_sampled(
    directories: tuple[Path, Path], bypass: bool
) -> None:
    section = ScorerSection(enabled=True, repeats=3, bypass_cache=bypass)
    async with world(directories) as here:
        (score,) = await scored(here.handler(section), made(life="l"))
    assert (score.kind, score.reason, score.version, score.life) == ("repeats", "", "a.0", "l")
    assert score.turn_ids == (ROOT, CHILD, FORK)
    assert score.repeats == (1 if score.identical else 3)
    for row in repeats_of(score):
        np.testing.assert_allclose(row, expected(here.model, ROOT, CHILD, FORK), rtol=0, atol=2e-5)


async def test_turns_of_other_weights_are_left_out(directories: tuple[Path, Path]) -> None:
    async with world(directories) as here:
        (score,) = await scored(here.handler(), made({ROOT: "a.1", FORK: "b.0"}))
        assert score.turn_ids == (CHILD,)
        np.testing.assert_allclose(repeats_of(score)[0], expected(here.model, CHILD), rtol=0, atol=2e-5)
        (none,) = await scored(here.handler(), made(dict.fromkeys(IDS, "a.1")))
    assert (none.reason, none.turn_ids, none.repeats) == ("other_version", (), 0)


async def test_weights_that_change_meanwhile_give_no_score(directories: tuple[Path, Path]) -> None:
    async with world(directories, engines=1) as here:
        (engine,) = here.engines
        await engine.pause("in_place")
        found: list[Score] = []

        async def ask() -> None:
            found.extend(await scored(here.handler(), made()))

        async def waiting() -> bool:
            return sum(load.num_waiting_reqs for load in await engine.loads()) == SECTION.repeats

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await until(waiting, "all repeats waiting")
            await engine.update_weights(here.model, "a.1")
            await engine.resume()
    assert [score.reason for score in found] == ["other_version"]


async def test_engines_of_different_minds_give_no_score(directories: tuple[Path, Path]) -> None:
    async with world(directories) as here:
        await here.engines[1].update_weights(here.model, "a.1")
        (score,) = await scored(here.handler(), made())
    assert score.reason == "other_version"


async def test_an_engine_that_is_away_is_a_reason_not_a_crash(directories: tuple[Path, Path]) -> None:
    server = await _engine(directories[0], "a.0")
    await server.close()
    async with aiohttp.ClientSession() as session:
        handler = ScorerHandler(RUN, SECTION, [EngineClient(server.url, session)], None, {})
        (score,) = await scored(handler, made())
    assert score.reason.startswith("engine: ") and score.repeats == 0


async def test_each_family_is_scored_by_its_own_expert_alone(directories: tuple[Path, Path]) -> None:
    table = Teachers({("d", "shell"): {"expert": 0.9}}, {"expert": "v"}, default="expert")
    other = Teachers({("elsewhere", "shell"): {"expert": 0.9}}, {"expert": "v"}, default="expert")
    section = ScorerSection(enabled=True, repeats=0)
    async with world(directories, engines=1) as here:
        (score,) = await scored(here.handler(section, table), made(dict.fromkeys(IDS, "z.9")))
        (unmapped,) = await scored(here.handler(section, other), made())
    assert (score.kind, score.scorer, score.version, score.repeats) == ("teacher", "expert", "expert", 1)
    np.testing.assert_allclose(repeats_of(score)[0], expected(directories[1], ROOT, CHILD, FORK), rtol=0, atol=2e-5)
    assert (unmapped.reason, unmapped.scorer) == ("unmapped", "")


@pytest.mark.parametrize("fields", [{"outcome": "infra_error"}, {"outcome": "cancelled"}])
async def test_what_is_not_graded_is_not_scored(directories: tuple[Path, Path], fields: dict[str, str]) -> None:
    handler = ScorerHandler(RUN, SECTION, [], None, {})
    assert await scored(handler, made(None, **fields)) == []


async def test_identical_repeats_are_said_to_be_no_benefit(caplog: pytest.LogCaptureFixture) -> None:
    _say_identical.cache_clear()
    values = np.full((4, 9), -1.25, np.float32)
    before = IDENTICAL._value.get()
    score = score_of(made(), "repeats", "engines", Found(version="a.0", logprobs=values))
    assert score.identical and score.repeats == 1
    assert "no benefit" in caplog.text and IDENTICAL._value.get() == before + 1
    values[1, 0] += 0.5
    differing = score_of(made(), "repeats", "engines", Found(version="a.0", logprobs=values))
    assert not differing.identical and differing.repeats == 4


def test_a_teacher_with_other_token_ids_is_refused(tmp_path: Path) -> None:
    stranger = save_model(tmp_path / "stranger", 0)
    save_tokenizer(stranger)
    _with_template(stranger)
    section = ScorerSection(
        enabled=True, teachers=(TeacherSection(name="t", url="http://h", model=str(stranger), scores={"d/shell": 1.0}),)
    )
    with pytest.raises(ConfigError, match="teacher 't' has the vocabulary"):
        teachers_of(section, "demo")
    own = TeacherSection(name="t", url="http://h", model="demo", scores={"d/shell": 1.0})
    table = teachers_of(ScorerSection(enabled=True, teachers=(own,)), "demo")
    assert table is not None and table.choose(("d", "shell")) == "t"


def _with_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_half_precision_is_near_but_not_equal(directories: tuple[Path, Path], dtype: Dtype) -> None:
    server = await start_engine(directories[0], model_name="m", max_total_tokens=512, max_running=4, dtype=dtype)
    ids = [*IDS[FORK][0], *IDS[FORK][1]]
    try:
        async with aiohttp.ClientSession() as session:
            engine = EngineClient(server.url, session)
            made = await engine.prefill(ids, 1, rid="half", deadline_s=60)
            await engine.update_weights(directories[0], "again")
            again = await engine.prefill(ids, 1, rid="again", deadline_s=60)
    finally:
        await server.close()
    difference = np.abs(np.array(made.logprobs) - plain_logprobs(plain_model(directories[0]), ids))
    assert 0 < difference.max() < 1.0
    assert (made.version, again.version) == ("default", "again") and again.logprobs == made.logprobs


async def test_half_precision_errs_no_more_far_into_a_path_than_the_model_does_by_itself(tmp_path: Path) -> None:
    model = save_model(tmp_path, 0, "long")
    ids = np.random.default_rng(0).integers(3, VOCAB, 2500).tolist()
    server = await start_engine(model, model_name="m", max_total_tokens=4096, max_running=4, dtype="bfloat16")
    try:
        async with aiohttp.ClientSession() as session:
            made = await EngineClient(server.url, session).prefill(ids, 1500, rid="half", deadline_s=60)
    finally:
        await server.close()
    exact = plain_model(model)
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    truth = np.array(plain_logprobs(exact, ids))[1499:]
    error, least = (
        np.abs(np.array(values) - truth).mean() for values in (made.logprobs, plain_logprobs(own, ids)[1499:])
    )
    assert 0 < error < 1.5 * least


async def test_a_prompt_may_fill_the_context_when_nothing_is_sampled(directories: tuple[Path, Path]) -> None:
    ids = [3 + n % 90 for n in range(CONTEXT)]
    async with world(directories, engines=1) as here:
        made = await here.engines[0].prefill(ids, CONTEXT - 2, rid="full", deadline_s=60)
        with pytest.raises(EngineRejected, match="longer than the model's context"):
            await here.engines[0].prefill([*ids, 5], CONTEXT, rid="over", deadline_s=60)
    assert len(made.logprobs) == 2
