"""The sampler: what it draws, and the log-probabilities it reports."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kat_stream.engines.embedded.attention import sample
from kat_stream.engines.embedded.request import GenerateBody, Request, SamplingBody
from kat_stream.errors import EngineRejected

OFF = [1000.0, 1.0, 0.0]


def draw(
    logits: torch.Tensor, count: int, *, temperature: float = 1.0, filters: list[float] | None = None
) -> torch.Tensor:
    """`count` draws from one row of logits at evenly spread quantiles."""
    rows = logits[None].expand(count, -1)
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    limits = torch.empty(0, 3, dtype=torch.float64) if filters is None else torch.tensor([filters] * count).double()
    tokens, logprobs = sample(rows, torch.full((count,), temperature), uniform, limits)
    expected = torch.log_softmax(logits / (temperature or 1.0), -1)[tokens]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)
    return torch.bincount(tokens, minlength=len(logits)).double() / count


def test_draws_follow_the_distribution() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2
    for temperature in (0.5, 1.0, 1.7):
        frequencies = draw(logits, 20000, temperature=temperature)
        expected = torch.softmax(logits.double() / temperature, -1)
        # Evenly spread quantiles miss each probability by less than one draw at either end.
        assert (frequencies - expected).abs().max() <= 2 / 20000


def test_filters_keep_what_sglang_keeps_and_report_unfiltered_logprobs() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = probabilities.log()
    for filters, kept in (([2.0, 1.0, 0.0], 2), ([1000.0, 0.5, 0.0], 2), ([1000.0, 1.0, 0.3], 3), (OFF, 5)):
        expected = torch.cat([probabilities[:kept] / probabilities[:kept].sum(), torch.zeros(5 - kept)]).double()
        assert (draw(logits, 10000, filters=filters) - expected).abs().max() <= 3e-4, filters


def test_temperature_zero_is_greedy_with_plain_logprobs() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert draw(logits, 10, temperature=0.0).tolist() == [0.0, 1.0, 0.0]


def test_the_extremes_of_the_uniform_number_are_possible_tokens() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]] * 2)
    uniform = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    tokens, _ = sample(logits, torch.ones(2), uniform, torch.empty(0, 3, dtype=torch.float64))
    assert set(tokens.tolist()) <= {1, 2}


def test_a_seed_decides_each_position_alone() -> None:
    def numbers(seed: int) -> list[float]:
        request = Request(
            rid="r", prompt=np.array([1], np.int32), params=SamplingBody(), limit=100, start=1, stop_ids=frozenset(),
            body=GenerateBody(), arrived=0.0,
        )  # fmt: skip
        drawn = []
        for _ in range(2000):
            drawn.append(request.uniform(seed))
            request.accept(3, -1.0, "v")
        return drawn

    assert numbers(7) == numbers(7) != numbers(8)
    values = np.array([numbers(seed) for seed in range(3)])
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02
    assert np.abs(np.corrcoef(values) - np.eye(3)).max() < 0.08


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0.0),
        ("top_p", 1.1), ("top_k", 0), ("min_p", -0.1), ("min_p", 2.0), ("max_new_tokens", -1), ("n", 2),
        ("stream_interval", 0),
    ],
)  # fmt: skip
def test_values_out_of_range_name_their_field(field: str, value: float) -> None:
    with pytest.raises(EngineRejected, match=field):
        SamplingBody(**{field: value}).check()  # type: ignore[arg-type]
