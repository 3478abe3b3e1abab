"""Our losses against those of verl, AgileRL and TRL on the same tensors, where they define the same thing.

`tests/oracles/losses.npz` holds their losses and gradients (versions inside; `tests/oracles/make_losses.py` writes
it). Where those packages are installed, the file is made again and compared with what is committed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kat_stream.rl.advantages import ADVANTAGES
from kat_stream.rl.loss import LossInputs
from kat_stream.rl.penalty import kl
from kat_stream.rl.settings import RatioConfig
from kat_stream.rl.turn_ratio import turn_ratio
from kat_stream.rl.units import make_units
from tests.oracles import make_losses

GOLDEN = dict(np.load(Path(make_losses.OUT)))
OPEN = {"clip_low": make_losses.LOW, "clip_high": make_losses.HIGH, "mask": "none"}
TOLERANCE = {"verl": 1e-7, "agilerl": 1e-6, "trl": 1e-12}
"""verl adds 1e-8 to a length; AgileRL pools in float32."""
CASES = {
    "verl/ppo_dual_clip_token_mean": ("token", 0.0, make_losses.DUAL, "global"),
    "verl/gspo": ("sequence", 1.0, None, "trajectory"),
    "agilerl/turn_product": ("turn", 0.0, None, "global"),
    "agilerl/turn_geometric": ("turn", 1.0, None, "global"),
    "agilerl/trajectory": ("sequence", 1.0, None, "trajectory"),
    "agilerl/token": ("token", 0.0, None, "global"),
    "trl/grpo_token": ("token", 0.0, None, "sequence mean"),
    "trl/gspo": ("sequence", 1.0, None, "trajectory"),
}
"""Oracle -> level, p, dual clip, aggregation."""


def our_inputs(level: str, aggregation: str) -> tuple[LossInputs, np.ndarray]:
    """The golden tensors as units, and which of the padded grid's places their tokens are."""
    turns = GOLDEN["turn_ids"]
    places = np.flatnonzero(turns.ravel() >= 0)
    row = places // turns.shape[1]
    key = np.stack([row, turns.ravel()[places]], axis=1)
    found, inverse, lengths = np.unique(key, axis=0, return_inverse=True, return_counts=True)
    rollout = found[:, 0].astype(np.int32)
    weight = np.ones(len(found))
    if aggregation == "global" and level == "token":
        weight = lengths.astype(np.float64)
    elif aggregation == "trajectory":
        weight = 1.0 / np.bincount(rollout)[rollout]
    elif aggregation == "sequence mean":
        weight = lengths / np.bincount(row)[rollout]
    units = make_units(level, lengths.astype(np.int32), rollout, GOLDEN["advantage"][rollout], weight)  # type: ignore[arg-type]
    assert (np.diff(inverse.ravel()) >= 0).all()
    logp = torch.from_numpy(GOLDEN["logp"].ravel()[places]).requires_grad_()
    old = torch.from_numpy(GOLDEN["old"].ravel()[places])
    arrays = (torch.from_numpy(a) for a in (units.unit, units.length, units.advantage, units.weight))
    return LossInputs(logp, old, *arrays, reference_logp=old - 0.1), places


def check(name: str, loss: torch.Tensor, inputs: LossInputs, places: np.ndarray) -> None:
    torch.autograd.backward(loss)
    gradient = np.zeros(GOLDEN["logp"].size)
    assert inputs.logp.grad is not None
    gradient[places] = inputs.logp.grad.numpy()
    tolerance = TOLERANCE[name.partition("/")[0]]
    assert loss.item() == pytest.approx(float(GOLDEN[f"{name}/loss"]), abs=tolerance)
    assert np.abs(gradient - GOLDEN[f"{name}/gradient"].ravel()).max() < tolerance
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_the_oracles(name: str) -> None:
    level, p, dual, aggregation = CASES[name]
    inputs, places = our_inputs(level, aggregation)
    config = RatioConfig(level=level, length_exponent=p, dual_clip=dual, **OPEN)  # type: ignore[arg-type]
    output = turn_ratio(inputs, config)
    assert 0 < output.clipped.sum() < len(output.clipped)
    check(name, output.loss, inputs, places)


def test_the_kl_term_is_trls() -> None:
    inputs, places = our_inputs("token", "sequence mean")
    loss = turn_ratio(inputs, RatioConfig(level="token", dual_clip=None, **OPEN)).loss  # type: ignore[arg-type]
    check("trl/grpo_kl_k3", loss + 0.1 * kl(inputs, "k3"), inputs, places)


@pytest.mark.parametrize("name", ["group_mean", "leave_one_out"])
def test_advantages_are_verls(name: str) -> None:
    groups = GOLDEN["reward"].reshape(2, 4)
    ours = np.concatenate([ADVANTAGES[name](group) for group in groups])  # type: ignore[arg-type]
    assert np.abs(ours - GOLDEN[f"verl/{name}"]).max() < 1e-6


@pytest.mark.skipif(not make_losses.available(), reason="verl, agilerl and trl are not installed")
def test_the_committed_numbers_are_what_the_oracles_say() -> None:
    made = make_losses.build()
    assert made.keys() == GOLDEN.keys()
    for name, value in made.items():
        if name != "versions":
            assert np.allclose(value, GOLDEN[name], atol=1e-9), name
