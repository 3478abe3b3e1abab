"""The scheduler over random histories: every log-probability is that of a plain forward, and no slot is ever lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kat_stream.engines.embedded.kv import DENSE_POOLS
from kat_stream.engines.embedded.request import GenerateBody, Request, SamplingBody
from kat_stream.engines.embedded.runner import ModelRunner, load_weights
from kat_stream.engines.embedded.scheduler import Scheduler, Update
from kat_stream.errors import ConfigError, DataError
from tests.engine_kit import VOCAB, plain_logprobs, plain_model, save_model

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("engine")
    return {version: save_model(base / version, seed) for seed, version in enumerate(("v0", "v1"))}


@pytest.fixture(scope="module")
def runner(directories: dict[str, Path]) -> ModelRunner:
    return ModelRunner(directories["v0"], 192, "v0")


def make_request(name: str, prompt: list[int], count: int, *, start: int | None = None, **params: object) -> Request:
    body = GenerateBody(
        input_ids=prompt, return_logprob=True,
        sampling_params=SamplingBody(max_new_tokens=count, ignore_eos=True, **params),  # type: ignore[arg-type]
    )  # fmt: skip
    return Request(
        rid=name, prompt=np.array(prompt, np.int32), params=body.sampling_params, limit=count,
        start=len(prompt) if start is None else start, stop_ids=frozenset(), body=body, arrived=0.0,
    )  # fmt: skip


class Engine:
    """A scheduler whose finished requests are kept, and whose books are checked after every step."""

    def __init__(self, runner: ModelRunner, max_running: int = 8) -> None:
        self.runner = runner
        self.ended: list[Request] = []
        self.scheduler = Scheduler(runner, max_running, self._progress, np.random.default_rng(0))

    def _progress(self, request: Request, finished: bool) -> None:
        if finished:
            self.ended.append(request)

    def step(self) -> bool:
        with torch.inference_mode():
            worked = self.scheduler.step()
        self.runner.kv.audit(list(self.scheduler.live()))
        return worked

    def drain(self, limit: int = 3000) -> None:
        while self.step():
            limit -= 1
            assert limit > 0, "the engine does not come to rest"

    def update(self, directory: Path, version: str, *, flush: bool = True) -> list[BaseException | None]:
        source, answers = load_weights(directory), []  # type: ignore[var-annotated]
        apply = lambda: self.runner.replace(source, directory, version)  # noqa: E731
        self.scheduler.update(Update(apply, flush, answers.append))
        return answers

    def reset(self, directory: Path, version: str) -> None:
        self.scheduler.abort(lambda _: True)
        self.scheduler.resume()
        self.update(directory, version)
        self.drain()
        assert self.runner.kv.available == self.runner.kv.total


def check_logprobs(request: Request, models: dict[str, object]) -> None:
    """Each span against a plain forward of that span's weights; the spans cover the output without gaps."""
    ids = [*request.prompt.tolist(), *request.output]
    assert [start for _, start, _ in request.spans] == [0, *(end for _, _, end in request.spans)][:-1]
    assert (request.spans[-1][2] if request.spans else 0) == len(request.output) == len(request.logprobs)
    for version, start, end in request.spans:
        expected = plain_logprobs(models[version], ids, request.params.temperature)[len(request.prompt) - 1 :]  # type: ignore[arg-type]
        np.testing.assert_allclose(request.logprobs[start:end], expected[start:end], rtol=0, atol=TOLERANCE)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 3), st.integers(1, 70), st.integers(1, 20)),
        st.tuples(st.just("steps"), st.integers(1, 6)),
        st.tuples(st.just("abort"), st.integers(0, 12)),
        st.tuples(st.just("pause"), st.sampled_from(["abort", "retract", "in_place"])),
        st.tuples(st.just("update"), st.booleans()),
        st.tuples(st.just("resume")),
        st.tuples(st.just("flush")),
    ),
    min_size=3, max_size=25,
)  # fmt: skip


@given(actions=ACTIONS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_history_keeps_logprobs_exact_and_books_balanced(
    actions: list[tuple], runner: ModelRunner, directories: dict[str, Path]
) -> None:
    models = {version: plain_model(path) for version, path in directories.items()}
    engine = Engine(runner)
    engine.reset(directories["v0"], "v0")
    families = [np.random.default_rng(seed).integers(3, VOCAB, 200).tolist() for seed in range(4)]
    count = 0
    for action, *values in actions:
        if action == "submit":
            family, length, new = values
            # Three numbers in each id, so that no id is the prefix of another.
            engine.scheduler.submit(make_request(f"{count:03d}", families[family][:length], new, start=0))
            count += 1
        elif action == "steps":
            for _ in range(values[0]):
                engine.step()
        elif action == "abort":
            engine.scheduler.abort(lambda request, name=f"{values[0]:03d}": request.rid == name)
        elif action == "pause":
            # Old keys and values under new weights are exact in no span: freeze-and-update has its own test.
            engine.scheduler.pause("retract" if engine.scheduler.updates else values[0])
        elif action == "update":
            if engine.scheduler.paused and (engine.scheduler.prefilling or runner.kv.rows):
                engine.scheduler.pause("retract")
            version = "v1" if runner.version == "v0" else "v0"
            engine.update(directories[version], version)
        elif action == "resume":
            engine.scheduler.resume()
        else:
            engine.scheduler.flush()
    engine.scheduler.resume()
    engine.drain()
    assert len(engine.ended) == count
    assert runner.kv.available == runner.kv.total
    for request in engine.ended:
        assert request.finish is not None
        if request.finish["type"] == "length":
            assert len(request.output) == request.limit
            assert len(request.prompt_logprobs) == len(request.prompt) - 1
        check_logprobs(request, models)
        whole = len(request.prompt_logprobs) == len(request.prompt) - 1
        if whole and len(request.spans) == 1 and request.retractions == 0:
            expected = plain_logprobs(models[request.spans[0][0]], request.prompt.tolist() + request.output[:1])
            np.testing.assert_allclose(request.prompt_logprobs, expected[:-1], rtol=0, atol=TOLERANCE)


def test_shared_prompts_are_computed_once(runner: ModelRunner, directories: dict[str, Path]) -> None:
    engine = Engine(runner)
    engine.reset(directories["v0"], "v0")
    before = engine.scheduler.stats.prefilled_tokens
    prompt = list(range(3, 63))
    for index in range(6):
        engine.scheduler.submit(make_request(f"{index:03d}", prompt, 4))
    engine.drain()
    assert engine.scheduler.stats.prefilled_tokens - before == len(prompt)
    assert sorted(request.cached for request in engine.ended) == [0, *[len(prompt) - 1] * 5]


def test_a_turn_costs_only_its_new_tokens(runner: ModelRunner, directories: dict[str, Path]) -> None:
    engine = Engine(runner)
    engine.reset(directories["v0"], "v0")
    history = list(range(3, 33))
    for turn in range(4):
        engine.scheduler.submit(make_request(f"{turn:03d}", history, 5))
        before = engine.scheduler.stats.prefilled_tokens
        engine.drain()
        answer = engine.ended[-1]
        # The last sampled token of the turn before has no keys and values yet.
        assert engine.scheduler.stats.prefilled_tokens - before == (len(history) if turn == 0 else 1 + 7)
        assert answer.cached == (0 if turn == 0 else len(history) - 8)
        history = [*history, *answer.output, *range(40, 47)]


def test_out_of_memory_retracts_the_youngest_and_ends_all(runner: ModelRunner, directories: dict[str, Path]) -> None:
    engine = Engine(runner)
    engine.reset(directories["v0"], "v0")
    models = {"v0": plain_model(directories["v0"])}
    retracted = engine.scheduler.stats.retracted
    for index in range(5):
        engine.scheduler.submit(make_request(f"{index:03d}", [3 + index, *range(10, 35)], 60))
    engine.drain()
    assert engine.scheduler.stats.retracted > retracted
    assert engine.ended[0].rid == "000" and engine.ended[0].retractions == 0
    for request in engine.ended:
        assert len(request.output) == 60
        check_logprobs(request, models)


def test_decoding_goes_on_while_a_long_prompt_is_prefilled(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kat_stream.engines.embedded.scheduler.PREFILL_BUDGET", 16)
    engine = Engine(ModelRunner(directories["v0"], 512, "v0"))
    short = make_request("000", [5, 6, 7], 40)
    engine.scheduler.submit(short)
    engine.step()
    engine.scheduler.submit(make_request("001", np.random.default_rng(0).integers(3, VOCAB, 160).tolist(), 3, start=0))
    for step in range(9):
        engine.step()
        assert len(short.output) == step + 2
    engine.drain()
    for request in engine.ended:
        check_logprobs(request, {"v0": plain_model(directories["v0"])})


def test_an_update_waits_for_what_is_in_flight_and_holds_back_what_comes(
    runner: ModelRunner, directories: dict[str, Path]
) -> None:
    engine = Engine(runner)
    engine.reset(directories["v0"], "v0")
    engine.scheduler.submit(make_request("000", [3, 4, 5], 6))
    engine.step()
    answers = engine.update(directories["v1"], "v1")
    engine.scheduler.submit(make_request("001", [3, 4, 5], 6))
    engine.drain()
    assert answers == [None]
    assert [request.spans for request in engine.ended] == [[("v0", 0, 6)], [("v1", 0, 6)]]
    assert engine.ended[1].cached == 0


def test_in_place_keeps_old_keys_and_values_and_says_so(runner: ModelRunner, directories: dict[str, Path]) -> None:
    engine = Engine(runner)
    engine.reset(directories["v0"], "v0")
    request = make_request("000", list(range(3, 23)), 10)
    engine.scheduler.submit(request)
    for _ in range(4):
        engine.step()
    engine.scheduler.pause("in_place")
    engine.update(directories["v1"], "v1")
    engine.drain()
    engine.scheduler.resume()
    engine.scheduler.submit(make_request("001", list(range(3, 23)), 4))
    engine.drain()
    assert request.spans == [("v0", 0, 4), ("v1", 4, 10)]
    # Keys and values of prompt and first three outputs by the old weights, the rest on top of them by the new ones.
    old, new = plain_model(directories["v0"]), plain_model(directories["v1"])
    ids = torch.tensor([[*request.prompt.tolist(), *request.output]])
    with torch.no_grad():
        first = old(input_ids=ids[:, :23], use_cache=True)
        second = new(input_ids=ids[:, 23:-1], cache=first.cache, use_cache=True)
    logits = torch.cat([first.logits[0, 19:], second.logits[0]])
    expected = torch.log_softmax(logits, -1).gather(1, ids[0, 20:, None])[:, 0].numpy()
    np.testing.assert_allclose(request.logprobs, expected, rtol=0, atol=TOLERANCE)
    fresh = next(other for other in engine.ended if other is not request)
    assert fresh.cached == 0, "a prefix of the old weights was served to a new request"
    check_logprobs(fresh, {"v1": new})


def test_a_long_request_beside_many_short_ones_takes_rows_of_them_not_memory(tmp_path: Path) -> None:
    model = save_model(tmp_path, 0, "long")
    engine = Engine(ModelRunner(model, 512, "v0"), max_running=32)
    kv, most_rows = engine.runner.kv, 0
    # It outgrows rows of 256 tokens while it runs, beside as many others as may have those.
    engine.scheduler.submit(make_request("long", [3 + n % 90 for n in range(240)], 40))
    for name in range(20):
        engine.scheduler.submit(make_request(f"{name:03d}", [3 + name] * 6, 5 if name < 12 else 60))
    while engine.step():
        assert kv.dense.shape[2] * kv.dense.shape[4] <= DENSE_POOLS * kv.total
        most_rows = max(most_rows, len(kv.rows))
    assert len(engine.ended) == 21 and engine.scheduler.stats.retracted > 0 and most_rows == 16
    for request in engine.ended:
        check_logprobs(request, {"v0": plain_model(model)})


def test_rows_that_were_needed_once_are_given_back_when_nothing_runs(tmp_path: Path) -> None:
    engine = Engine(ModelRunner(save_model(tmp_path, 0, "long"), 2048, "v0"))
    kv = engine.runner.kv
    first = kv.dense.shape
    engine.scheduler.submit(make_request("long", [3 + n % 90 for n in range(1500)], 2))
    engine.drain()
    assert kv.dense.shape == first and len(engine.ended[0].output) == 2


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_serve_on(
    runner: ModelRunner, directories: dict[str, Path], tmp_path: Path
) -> None:
    engine = Engine(runner)
    engine.reset(directories["v0"], "v0")
    answers = engine.update(save_model(tmp_path / "llama", 3, "llama"), "bad")
    engine.scheduler.submit(make_request("000", [3, 4, 5], 4))
    engine.drain()
    assert isinstance(answers[0], DataError)
    check_logprobs(engine.ended[0], {"v0": plain_model(directories["v0"])})
    with pytest.raises(DataError, match=r"config\.json"):
        load_weights(tmp_path)


def test_buffers_that_a_checkpoint_holds_are_replaced_with_the_parameters(tmp_path: Path) -> None:
    old, new = (save_model(tmp_path / name, seed, "glm4_moe") for seed, name in enumerate(("v0", "v1")))
    engine = Engine(ModelRunner(old, 192, "v0"))
    engine.update(new, "v1")
    engine.scheduler.submit(make_request("000", list(range(3, 43)), 8))
    engine.drain()
    (answer,) = engine.ended
    assert len(answer.output) == 8 and [version for version, _, _ in answer.spans] == ["v1"]
    check_logprobs(answer, {"v1": plain_model(new)})


def test_a_truncated_checkpoint_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = save_model(tmp_path / "broken", 5)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="up_proj"):
        load_weights(broken)
    (broken / "model.safetensors").write_bytes((directories["v0"] / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(DataError, match="broken"):
        load_weights(broken)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3_moe"])
def test_other_architectures_agree_with_their_own_forward(family: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path / family, 11, family)
    engine = Engine(ModelRunner(directory, 256, "v0"))
    random = np.random.default_rng(1)
    for index in range(4):
        engine.scheduler.submit(make_request(f"{index:03d}", random.integers(3, VOCAB, 9 * index + 3).tolist(), 8))
    engine.drain()
    assert len(engine.ended) == 4
    for request in engine.ended:
        check_logprobs(request, {"v0": plain_model(directory)})


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("sliding", "a sliding window"),
        ("wide window", "a sliding window"),
        ("window by mask", "a sliding window"),
        ("stretched", "RoPE of type longrope"),
        ("twice a layer", "attention the embedded engine does not compute"),
        ("latent", "attention the embedded engine does not compute"),
    ],
)
def test_an_attention_we_do_not_compute_is_refused(family: str, reason: str, tmp_path: Path) -> None:
    """Also where it shows only beyond what a model is tried on at load, or only from one step to the next."""
    with pytest.raises(ConfigError, match=reason):
        ModelRunner(save_model(tmp_path / "model", 0, family), 256, "v0")
