"""Other people's losses on fixed tensors, as numbers that our tests compare with: writes `losses.npz` beside this file.

    ops/setup.sh test       (verl and AgileRL into .venv/oracles: verl brings a package `tests` that would hide ours)
    .venv/bin/python tests/oracles/make_losses.py

The functions are taken from the installed packages' own source files, unchanged, and run without the packages' other
imports (ray, vllm, deepspeed), which their mathematics does not need.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

OUT = Path(__file__).with_name("losses.npz")
PACKAGES = ("verl", "agilerl", "trl")
PLACES = [str(Path(sys.prefix, "oracles")), *sys.path]
LOW, HIGH, DUAL = 0.02, 0.025, 1.3


def available() -> bool:
    """True if every oracle is installed here."""
    return all(found(name) is not None for name in PACKAGES)


def found(package: str) -> ModuleSpec | None:
    return PathFinder.find_spec(package, PLACES)


def functions(package: str, file: str, *names: str, **world: Any) -> SimpleNamespace:
    """The named functions or methods of a package's file, with `world` as their globals."""
    spec = found(package)
    assert spec is not None and spec.submodule_search_locations
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text())
    wanted = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names}
    for node in wanted.values():
        node.decorator_list = []
        node.returns = None
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            argument.annotation = None
    scope: dict[str, Any] = {"torch": torch, "np": np, "Any": Any, **world}
    exec(compile(ast.Module(list(wanted.values()), []), file, "exec"), scope)
    return SimpleNamespace(**{name: scope[name] for name in names})


def version(package: str) -> str:
    return next(iter(distributions(name=package, path=PLACES))).version


def tensors() -> dict[str, Tensor]:
    """8 sequences of up to 12 tokens in up to 4 turns; float64."""
    rng = np.random.default_rng(11)
    rows, columns = 8, 12
    turns = np.full((rows, columns), -1)
    for row in turns:
        cuts = np.sort(rng.choice(np.arange(1, columns), 3, replace=False))
        row[:] = np.searchsorted(cuts, np.arange(columns), "right")
        row[columns - rng.integers(0, 4) :] = -1
    old = -rng.uniform(0.5, 3, turns.shape)
    return {
        "turn_ids": torch.from_numpy(turns),
        "mask": torch.from_numpy((turns >= 0).astype(np.float64)),
        "old": torch.from_numpy(old),
        "logp": torch.from_numpy(old + rng.normal(0, 0.1, turns.shape)),
        "advantage": torch.from_numpy(rng.standard_normal(rows)),
        "reward": torch.from_numpy(rng.integers(0, 2, rows).astype(np.float64) + 0.25 * rng.random(rows)),
    }


def derive(case: dict[str, Tensor], loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    logp = case["logp"].clone().requires_grad_()
    value = loss(logp)
    torch.autograd.backward(value)
    assert logp.grad is not None
    return value.detach(), logp.grad


def from_verl(case: dict[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    means = functions("verl", "utils/torch_functional.py", "masked_sum", "masked_mean")
    settings = type(
        "ActorConfig", (SimpleNamespace,), {"get": lambda self, key, default=None: getattr(self, key, default)}
    )
    names = ("agg_loss", "compute_policy_loss_vanilla", "compute_policy_loss_gspo")
    core = functions("verl", "trainer/ppo/core_algos.py", *names, verl_F=means, ActorConfig=settings, AlgoConfig=int)
    config = settings(clip_ratio=LOW, clip_ratio_low=LOW, clip_ratio_high=HIGH, clip_ratio_c=DUAL, global_batch_info={})
    wide = case["advantage"][:, None].expand_as(case["old"])

    def run(function: Any, mode: str) -> Callable[[Tensor], Tensor]:
        return lambda logp: function(case["old"], logp, wide, case["mask"], mode, config)[0]

    return {
        "verl/ppo_dual_clip_token_mean": run(core.compute_policy_loss_vanilla, "token-mean"),
        "verl/gspo": run(core.compute_policy_loss_gspo, "seq-mean-token-mean"),
    }


def from_agilerl(case: dict[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    names = ("masked_mean", "pool_by_turns", "pool_log_ratio_by_level", "clipped_min_surrogate")
    tools = functions("agilerl", "utils/llm_utils.py", *names)

    def run(level: str, reduction: str) -> Callable[[Tensor], Tensor]:
        def loss(logp: Tensor) -> Tensor:
            ratio, active = tools.pool_log_ratio_by_level(
                logp - case["old"], case["mask"], case["turn_ids"], level, turn_reduction=reduction
            )
            wide = case["advantage"][:, None].expand_as(ratio)
            return tools.clipped_min_surrogate(ratio, wide, active, 1 - LOW, 1 + HIGH)[0]

        return loss

    return {
        "agilerl/turn_product": run("turn", "sum"),
        "agilerl/turn_geometric": run("turn", "mean"),
        "agilerl/trajectory": run("trajectory", "mean"),
        "agilerl/token": run("token", "mean"),
    }


class _Trainer:
    """As much of a GRPOTrainer as `_compute_loss` asks for; whatever it reports goes nowhere."""

    def __init__(self, logp: Tensor, level: str, delta: float | None, beta: float) -> None:
        self._answer = (logp, torch.zeros_like(logp), None)
        self.importance_sampling_level, self.loss_type, self.beta = level, "grpo", beta
        self.epsilon_low, self.epsilon_high = LOW, HIGH
        self.args = SimpleNamespace(delta=delta, use_bias_correction_kl=False)
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self.use_vllm = self.vllm_importance_sampling_correction = self._entropy_bonus_enabled = False
        self.aux_loss_enabled = False
        self.current_gradient_accumulation_steps = 1
        self.model = SimpleNamespace(training=True)
        self.accelerator = SimpleNamespace(reduce=lambda value, **_: value, gather=lambda value: value)
        self._metrics: Any = defaultdict(lambda: defaultdict(list))

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return self._answer


def from_trl(case: dict[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    method = functions("trl", "trainer/grpo_trainer.py", "_compute_loss", nanmin=torch.min, nanmax=torch.max)

    def run(level: str, delta: float | None = None, beta: float = 0.0) -> Callable[[Tensor], Tensor]:
        def loss(logp: Tensor) -> Tensor:
            ids = torch.zeros(logp.shape, dtype=torch.int64)
            inputs = {
                "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": case["mask"],
                "advantages": case["advantage"], "old_per_token_logps": case["old"],
                "ref_per_token_logps": case["old"] - 0.1,
            }  # fmt: skip
            value: Tensor = method._compute_loss(_Trainer(logp, level, delta, beta), None, inputs)
            return value

        return loss

    return {"trl/grpo_token": run("token"), "trl/gspo": run("sequence"), "trl/grpo_kl_k3": run("token", None, 0.1)}


def advantages(case: dict[str, Tensor]) -> dict[str, Tensor]:
    """verl's advantages of the 8 sequences as two groups of 4."""
    names = ("compute_grpo_outcome_advantage", "compute_rloo_outcome_advantage")
    core = functions("verl", "trainer/ppo/core_algos.py", *names, defaultdict=defaultdict)
    index = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    scores = torch.zeros_like(case["mask"])
    scores[:, 0] = case["reward"]
    kinds = {
        "group_mean": lambda: core.compute_grpo_outcome_advantage(
            scores, case["mask"], index, norm_adv_by_std_in_grpo=False
        ),
        "leave_one_out": lambda: core.compute_rloo_outcome_advantage(scores, case["mask"], index),
    }
    return {f"verl/{name}": make()[0][:, 0] for name, make in kinds.items()}


def build() -> dict[str, np.ndarray]:
    """Every array of the file, by name."""
    case = tensors()
    arrays = {name: value.numpy() for name, value in case.items()}
    for source in (from_verl, from_agilerl, from_trl):
        for name, loss in source(case).items():
            value, gradient = derive(case, loss)
            arrays[f"{name}/loss"], arrays[f"{name}/gradient"] = value.numpy(), gradient.numpy()
    arrays |= {name: value.numpy() for name, value in advantages(case).items()}
    arrays["versions"] = np.array([f"{name} {version(name)}" for name in PACKAGES])
    return arrays


if __name__ == "__main__":
    np.savez_compressed(OUT, **build())
    print(OUT, OUT.stat().st_size, "bytes")
