"""Step time of the Megatron learner against the torch learner, on the same trees, one rank each.

    python -m tests.benchmarks.megatron [--por 0.5 0.75] [--steps 5]

Both run in one process, one thread, in turns; CPU seconds of a step, which a loaded machine stretches least: best and
median of the steps after the first.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from kat_stream.rl.settings import RatioConfig
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.megatron.ranks import open_megatron
from kat_stream.trees import TrainBatch, make_batch
from tests.benchmarks.trees import VOCABULARY, synthetic

PATHS, LENGTH, SAMPLED = 8, 512, 48


def models() -> dict[str, PreTrainedModel]:
    """Dense of 4 layers x 256; a mixture of 8 experts, 2 a token."""
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 32,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    }  # fmt: skip
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384, "norm_topk_prob": True}
    return {
        "dense": Qwen3ForCausalLM(Qwen3Config(**shape)),
        "mixture": Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts)),
    }


def trees(por: float) -> TrainBatch:
    """One tree with as much overlap as the POR says."""
    turns = synthetic(por, PATHS, LENGTH, SAMPLED)
    return make_batch(
        turns, rollout=range(PATHS), advantage=[(-1.0) ** k for k in range(PATHS)], weight=[1.0] * PATHS,
        rollout_ids=[str(k) for k in range(PATHS)], budget_tokens=1 << 20,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--por", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = LearnerConfig(ratio=RatioConfig(mask="none"), micro_batch_tokens=1 << 20)
    print("model    POR   tokens  torch best/median CPU s  megatron best/median CPU s  ratio of best")
    for name, model in models().items():
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            learners = (
                TorchLearner(Path(folder), config),
                open_megatron(
                    Path(folder), config, ranks=1, threads=1, step_s=600.0, tensor_parallel=1, expert_parallel=1
                ),
            )
            for por in arguments.por:
                batch = trees(por)
                seconds: list[list[float]] = [[], []]
                for _ in range(arguments.steps + 1):
                    for learner, taken in zip(learners, seconds, strict=True):
                        began = time.process_time()
                        learner.step(batch)
                        taken.append(time.process_time() - began)
                one, other = (taken[1:] for taken in seconds)
                print(
                    f"{name:8} {por:.2f} {batch.tree_tokens:7d}  {min(one):13.3f} {median(one):9.3f}  "
                    f"{min(other):16.3f} {median(other):9.3f}  {min(other) / min(one):12.2f}",
                    flush=True,
                )
            for learner in learners:
                learner.close()


if __name__ == "__main__":
    main()
