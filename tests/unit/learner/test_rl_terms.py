"""Masks, bands, denominators, static weights, distillation, KL, entropy: each against enumeration or plain Python."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kat_stream.errors import BatchError, ConfigError, OffPolicyError
from kat_stream.rl.distillation import distillation
from kat_stream.rl.loss import LossInputs
from kat_stream.rl.masks import MASKS, mismatch_scale
from kat_stream.rl.objective import Objective
from kat_stream.rl.penalty import entropy, kl
from kat_stream.rl.settings import DistillationConfig, PenaltyConfig, RatioConfig
from kat_stream.rl.static_weights import static_weights
from kat_stream.rl.teachers import Teachers
from kat_stream.rl.turn_ratio import LOSS, turn_ratio

FREE = RatioConfig(mask="none", dual_clip=None, clip_low=0.99, clip_high=1e9)


def case(seed: int, gap: float, turns: int = 40) -> LossInputs:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, turns)
    total = int(lengths.sum())
    rollout = torch.from_numpy(-rng.uniform(0.5, 3, total))
    weight = rng.uniform(0.1, 1, turns)
    return LossInputs(
        logp=(rollout + torch.from_numpy(rng.normal(0, gap, total))).requires_grad_(),
        rollout_logp=rollout,
        unit=torch.from_numpy(np.repeat(np.arange(turns), lengths)),
        length=torch.from_numpy(lengths.astype(np.float64)),
        advantage=torch.from_numpy(rng.standard_normal(turns)),
        weight=torch.from_numpy(weight / weight.sum()),
    )


def gradient(loss: Tensor, inputs: LossInputs) -> Tensor:
    (found,) = torch.autograd.grad(loss, inputs.logp)
    return found


def test_masks_are_what_their_names_say() -> None:
    k = torch.tensor([0.4, 0.9, 3.0, 6.0, math.nan, math.inf], dtype=torch.float64)
    at, ones = torch.arange(6), torch.ones(6, dtype=torch.float64)
    found = {name: mask(k, at, ones, 0.5, 5.0).tolist() for name, mask in MASKS.items()}
    assert found == {
        "icepop": [0, 0.9, 3.0, 0, 0, 0],
        "truncated": [0.4, 0.9, 3.0, 5.0, 0, 5.0],
        "token": [0, 1, 1, 0, 0, 0],
        "unit": [0, pytest.approx(0.9), pytest.approx(3.0), 0, 0, 0],
        "none": [1] * 6,
    }


def test_a_unit_is_masked_as_a_whole_by_its_geometric_mean() -> None:
    k = torch.tensor([4.0, 0.25, 1.01, 1.02, 1.0, math.nan], dtype=torch.float64)
    unit, length = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([2.0, 2.0, 2.0])
    scale = MASKS["unit"](k, unit, length, 0.999, 1.002)
    assert scale.tolist() == [4.0, 0.25, 0, 0, 0, 0]


@pytest.mark.parametrize("name", sorted(MASKS))
def test_masks_have_no_gradient_and_leave_equal_engines_alone(name: str) -> None:
    inputs = case(0, 0.0)
    rollout = inputs.logp.detach().clone().requires_grad_()
    config = replace(FREE, mask=name, denominator="train")  # type: ignore[arg-type]
    with_mask = turn_ratio(replace(inputs, rollout_logp=rollout), config)
    plain = turn_ratio(inputs, replace(FREE, denominator="train"))
    assert with_mask.loss.item() == plain.loss.item()
    assert (gradient(with_mask.loss, inputs) == gradient(plain.loss, inputs)).all()
    scale = mismatch_scale(inputs.logp, rollout, inputs.unit, inputs.length, config)
    assert not scale.requires_grad
    assert rollout.grad is None


def test_a_few_disturbed_tokens_hurt_less_with_icepop() -> None:
    """1 % of tokens off by 2 nats in the engine: the masked gradient is nearer to the clean one than any other."""
    rng = np.random.default_rng(3)
    inputs = case(3, 0.02, turns=600)
    noise = np.where(rng.random(len(inputs.logp)) < 0.01, rng.choice([-2.0, 2.0], len(inputs.logp)), 0.0)
    dirty = replace(inputs, rollout_logp=inputs.logp.detach() + torch.from_numpy(noise))
    clean = gradient(turn_ratio(inputs, replace(FREE, denominator="train")).loss, inputs)
    far = {}
    for name in ("icepop", "truncated", "none"):
        denominator = "rollout" if name == "none" else "train"
        config = replace(FREE, mask=name, mask_high=5.0, denominator=denominator)  # type: ignore[arg-type]
        far[name] = float((gradient(turn_ratio(dirty, config).loss, inputs) - clean).norm())
    assert far["icepop"] < far["truncated"] < far["none"]


def test_the_decoupled_form_divides_by_the_learners_own_and_weighs_by_the_engines() -> None:
    inputs = case(4, 0.1)
    prox = (inputs.logp.detach() + 0.05).clone()
    config = replace(FREE, denominator="train", mask="icepop", length_exponent=1.0)
    output = turn_ratio(replace(inputs, prox_logp=prox), config)
    k = (prox - inputs.rollout_logp).exp()
    expected = torch.zeros_like(inputs.logp)
    for t, u in enumerate(inputs.unit.tolist()):
        ratio = math.exp(-0.05)
        expected[t] = -inputs.weight[u] * inputs.advantage[u] * ratio / inputs.length[u] * k[t]
    assert torch.allclose(gradient(output.loss, inputs), expected, atol=1e-14)
    assert torch.allclose(output.ratio, torch.full_like(output.ratio, math.exp(-0.05)))


def test_a_sqrt_length_band_grows_with_the_turn() -> None:
    length = torch.tensor([1.0, 4.0, 4.0], dtype=torch.float64)
    logs = torch.tensor([1.01, 1.99, 2.01], dtype=torch.float64) * math.log(1.2)
    one = torch.ones(3, dtype=torch.float64)
    inputs = LossInputs(logs, 0 * one, torch.arange(3), length, one, one / 3)
    config = RatioConfig(mask="none", clip_band="sqrt_length", clip_high=0.2)
    output = turn_ratio(inputs, config)
    assert output.clipped.tolist() == [True, False, True]
    assert output.loss.item() == pytest.approx(-(1.2 + 1.2**1.99 + 1.44) / 3)
    assert turn_ratio(inputs, replace(config, clip_band="constant")).clipped.all()


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gap", [0.0, 1e-7])
def test_static_weights_are_the_ratios_gradient_on_policy(p: float, gap: float) -> None:
    inputs = case(5, gap)
    config = replace(FREE, length_exponent=p)
    expected = gradient(turn_ratio(inputs, config).loss, inputs)
    output = static_weights(replace(inputs, advantage=inputs.advantage.clamp(min=0)), config)
    assert not output.masked.any()  # a turn with nothing to learn is not one on which the engines disagree
    found = gradient(static_weights(inputs, config).loss, inputs)
    assert (found - expected).abs().max() <= (1e-15 if gap == 0 else 1e-6)


def test_static_weights_are_refused_off_policy_where_they_would_be_wrong() -> None:
    """Negative control: without the refusal the gradient would be far off."""
    inputs = case(6, 0.2)
    with pytest.raises(OffPolicyError, match="log-ratio is .* nats"):
        static_weights(inputs, FREE)
    on_policy = replace(inputs, rollout_logp=inputs.logp.detach())
    wrong = gradient(static_weights(on_policy, FREE).loss, inputs)
    right = gradient(turn_ratio(inputs, FREE).loss, inputs)
    assert float((wrong - right).norm() / right.norm()) > 0.2
    broken = replace(inputs, rollout_logp=torch.full_like(inputs.rollout_logp, math.nan))
    with pytest.raises(OffPolicyError):
        static_weights(broken, FREE)


def enumeration(logits: Tensor, teacher: Tensor) -> tuple[LossInputs, Tensor]:
    """Every token of a small vocabulary once, weighted by its probability: sums over it are exact expectations."""
    logp = logits.log_softmax(-1)
    size = len(logits)
    one = torch.ones(size, dtype=torch.float64)
    probability = logp.detach().exp()
    inputs = LossInputs(
        logp, logp.detach(), torch.arange(size), one, one, probability, teacher_logp=teacher, reference_logp=teacher
    )
    return inputs, (logp.exp() * (logp - teacher)).sum()


def test_distillation_has_exactly_the_gradient_of_the_reverse_kl() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(9, dtype=torch.float64).log_softmax(-1)
    inputs, exact = enumeration(logits, teacher)
    config = DistillationConfig(coefficient=1.0, clip=100.0)
    (found,) = torch.autograd.grad(distillation(inputs, RatioConfig(), config).loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    assert (found - expected).abs().max() < 1e-10
    # The mean of logp - logp_T as a direct loss looks alike and teaches nothing: the teacher drops out.
    (direct,) = torch.autograd.grad((inputs.weight * (inputs.logp - teacher)).sum(), logits)
    assert direct.abs().max() < 1e-10 < expected.abs().max()


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_kl_gradients_are_exact_where_they_claim_to_be(estimator: str) -> None:
    torch.manual_seed(1)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    inputs, exact = enumeration(logits, torch.randn(7, dtype=torch.float64).log_softmax(-1))
    (found,) = torch.autograd.grad(kl(inputs, estimator), logits, retain_graph=True)  # type: ignore[arg-type]
    (expected,) = torch.autograd.grad(exact, logits)
    assert (found - expected).abs().max() < 1e-10


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_values_are_unbiased(estimator: str) -> None:
    torch.manual_seed(2)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    inputs, exact = enumeration(logits, torch.randn(7, dtype=torch.float64).log_softmax(-1))
    assert kl(inputs, estimator).item() == pytest.approx(exact.item(), abs=1e-12)  # type: ignore[arg-type]


def test_a_teacher_that_agrees_teaches_nothing() -> None:
    inputs = case(7, 0.1)
    same = replace(inputs, teacher_logp=inputs.logp.detach())
    loss = distillation(same, RatioConfig(), DistillationConfig(coefficient=1.0)).loss
    assert loss.item() == 0
    assert (gradient(loss, inputs) == 0).all()


def test_a_coefficient_of_zero_is_the_policy_loss_to_the_bit_and_no_advantage_is_distillation_alone() -> None:
    inputs = case(8, 0.1)
    taught = replace(inputs, teacher_logp=inputs.logp.detach() + 0.3)
    plain = Objective(policy=LOSS, ratio=FREE)
    assert plain.value(taught).loss.item() == turn_ratio(inputs, FREE).loss.item()
    config = DistillationConfig(coefficient=0.7)
    joint = Objective(policy=LOSS, ratio=FREE, distillation=config)
    idle = replace(taught, advantage=torch.zeros_like(taught.advantage))
    alone = gradient(0.7 * distillation(idle, FREE, config).loss, inputs)
    assert torch.equal(gradient(joint.value(idle).loss, inputs), alone)
    both = gradient(joint.value(taught).loss, inputs)
    assert torch.allclose(both, gradient(turn_ratio(taught, FREE).loss, inputs) + alone, atol=1e-15)


def test_tokens_without_a_teacher_give_nothing_and_signals_are_clipped() -> None:
    inputs = case(9, 0.0)
    teacher = inputs.logp.detach() + 9.0
    teacher[::2] = math.nan
    config = DistillationConfig(coefficient=1.0, clip=5.0)
    loss = distillation(replace(inputs, teacher_logp=teacher), RatioConfig(mask="none"), config).loss
    found = gradient(loss, inputs)
    assert (found[::2] == 0).all()
    assert torch.allclose(found[1::2], -5.0 * inputs.token_weight[1::2])


@pytest.mark.parametrize("field", ["teacher_logp", "reference_logp", "entropy"])
def test_a_term_without_its_input_is_refused(field: str) -> None:
    inputs = case(10, 0.0)
    with pytest.raises(BatchError):
        if field == "teacher_logp":
            distillation(inputs, FREE, DistillationConfig(coefficient=1.0))
        elif field == "entropy":
            entropy(inputs)
        else:
            kl(inputs, "k3")


def test_each_sample_is_scored_by_the_best_teacher_of_its_own_family() -> None:
    scores = {
        ("swe", "shell"): {"a": 0.6, "b": 0.7},
        ("web", "shell"): {"a": 0.9, "b": 0.1},
        ("x", "y"): {"a": 1, "b": 1},
    }
    teachers = Teachers(scores, {"a": "v1", "b": "v1"}, default="b")
    assert [teachers.choose(f) for f in (("swe", "shell"), ("web", "shell"), ("x", "y"), ("none", "shell"))] == [
        "b", "a", "b", None,
    ]  # fmt: skip
    teachers.check("v1")
    with pytest.raises(ConfigError, match="teacher 'a' has the vocabulary v1, the policy has v2"):
        teachers.check("v2")


@pytest.mark.parametrize(
    "make",
    [
        lambda: RatioConfig(mask="ice"),  # type: ignore[arg-type]
        lambda: RatioConfig(denominator="old"),  # type: ignore[arg-type]
        lambda: RatioConfig(clip_band="wide"),  # type: ignore[arg-type]
        lambda: RatioConfig(length_exponent=0.7),
        lambda: DistillationConfig(coefficient=-1.0),
        lambda: DistillationConfig(clip=0.0),
        lambda: PenaltyConfig(kl_estimator="k4"),  # type: ignore[arg-type]
        lambda: PenaltyConfig(kl_coefficient=-0.1),
    ],
)
def test_meaningless_settings_are_refused(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("variance", "length", "p", "low", "high", "expected"),
    [
        (1e-3, 50, 0.0, 0.2, 0.2, 0.37),
        (1e-3, 500, 0.0, 0.2, 0.2, 0.77),
        (1e-3 / 8, 500, 0.0, 0.2, 0.2, 0.42),
        (1e-3, 500, 1.0, 3e-4, 4e-4, 0.81),
        (1e-3 / 32, 2000, 1.0, 3e-4, 4e-4, 0.01),
    ],
)
def test_noise_alone_leaves_the_band_as_often_as_predicted(
    variance: float, length: int, p: float, low: float, high: float, expected: float
) -> None:
    """The table of research 2.3, for engines that differ by noise of this variance a token; 4000 turns."""
    turns = 4000
    noise = np.random.default_rng(0).normal(0, math.sqrt(variance * length), turns)
    one = torch.ones(turns, dtype=torch.float64)
    sums = torch.from_numpy(noise)
    inputs = LossInputs(sums, 0 * one, torch.arange(turns), length * one, one, one / turns)
    config = RatioConfig(mask="none", dual_clip=None, length_exponent=p, clip_low=low, clip_high=high)
    over = turn_ratio(inputs, config).clipped.double().mean().item()
    under = turn_ratio(replace(inputs, advantage=-one), config).clipped.double().mean().item()
    assert over + under == pytest.approx(expected, abs=0.025)


def test_a_student_of_two_experts_is_as_good_as_each_on_its_own_task() -> None:
    """O5: sampled distillation, each task from its best teacher; averaged weights and imitation of both are not."""
    torch.manual_seed(4)
    size, good = 8, (2, 5)
    experts = {name: torch.zeros(2, size, dtype=torch.float64) for name in ("a", "b")}
    for task, name in enumerate(("a", "b")):
        experts[name][task, good[task]] = 6.0  # knows its own task,
        experts[name][1 - task, 7] = 6.0  # and is sure of a wrong answer to the other
    skill = {name: logits.softmax(-1)[[0, 1], good].tolist() for name, logits in experts.items()}
    measured = {(f"task{t}", "shell"): {name: skill[name][t] for name in experts} for t in (0, 1)}
    teachers = Teachers(measured, {"a": "v", "b": "v"}, default="a")
    chosen = [teachers.choose((f"task{t}", "shell")) or "" for t in (0, 1)]
    student = torch.zeros(2, size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    teacher = torch.stack([experts[name][t].log_softmax(-1) for t, name in enumerate(chosen)])
    for _ in range(300):
        policy = student.log_softmax(-1)
        action = torch.multinomial(policy.detach().exp(), 16, replacement=True)
        logp, one = policy.gather(1, action).flatten(), torch.ones(32, dtype=torch.float64)
        inputs = LossInputs(
            logp, logp.detach(), torch.arange(32), one, 0 * one, one / 32,
            teacher_logp=teacher.gather(1, action).flatten(),
        )  # fmt: skip
        optimizer.zero_grad()
        torch.autograd.backward(distillation(inputs, FREE, DistillationConfig(coefficient=1.0, clip=10.0)).loss)
        optimizer.step()
    reached = student.softmax(-1)[[0, 1], good].tolist()
    best = [skill[name][t] for t, name in enumerate(chosen)]
    averaged = ((experts["a"] + experts["b"]) / 2).softmax(-1)[[0, 1], good].tolist()
    imitated = ((experts["a"].softmax(-1) + experts["b"].softmax(-1)) / 2)[[0, 1], good].tolist()
    for t in (0, 1):
        assert reached[t] >= 0.95 * best[t] > max(averaged[t], imitated[t])


@pytest.mark.parametrize("name", sorted(MASKS))
def test_a_mask_weighs_a_token_neither_more_nor_less_than_a_number_can(name: str) -> None:
    """k may overflow inside a unit whose mean is in the band, or where the band has no ends; 0 would leave it out."""
    train, rollout = torch.tensor([0.0, -200.0]), torch.tensor([-200.0, 0.0])
    config = replace(FREE, mask=name, mask_low=0.0, mask_high=math.inf, denominator="train")  # type: ignore[arg-type]
    unit, length = torch.zeros(2, dtype=torch.int64), torch.tensor([2.0])
    scale = mismatch_scale(train, rollout, unit, length, config)
    assert scale.isfinite().all()
    assert (scale > 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_kl_of_tokens_without_weight_is_zero_whatever_they_are(estimator: str) -> None:
    inputs = case(5, 0.1)
    logp = (inputs.logp.detach() - 800).requires_grad_()
    far = replace(inputs, logp=logp, weight=0 * inputs.weight, reference_logp=inputs.rollout_logp)
    penalty = kl(far, estimator)  # type: ignore[arg-type]
    torch.autograd.backward(penalty)
    assert penalty.item() == 0
    assert logp.grad is not None
    assert (logp.grad == 0).all()
