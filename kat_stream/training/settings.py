"""The learner's part of a run's configuration, the learner it asks for, and its name in a record.

Invariant: two runs with one digest use the same loss and the same optimizer.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from kat_stream.config import Config
from kat_stream.errors import ConfigError
from kat_stream.training.learner import LearnerConfig, TorchLearner
from kat_stream.training.parallel import open_learner


def learner_config(config: Config) -> LearnerConfig:
    """`ConfigError` for values outside their range."""
    section = config.trainer
    return LearnerConfig(
        loss=section.loss,
        ratio=section.ratio(),
        distillation=section.distillation(),
        penalty=section.penalty(),
        attention=section.attention,
        learning_rate=section.learning_rate,
        warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay,
        grad_clip=section.grad_clip,
        micro_batch_tokens=section.micro_batch_tokens,
        updates=section.updates,
        routing_replay=section.routing_replay,
    )


def make_learner(config: Config, model_dir: Path) -> TorchLearner:
    """The learner of a run, on as many processes as it says. `ConfigError` if the model cannot be divided so."""
    section = config.trainer
    if section.learner == "torch":
        return open_learner(
            model_dir,
            learner_config(config),
            ranks=section.ranks,
            threads=section.threads,
            step_s=section.step_timeout_s,
            sharding=section.sharding,
        )
    try:
        from kat_stream.training.megatron.ranks import open_megatron
    except ModuleNotFoundError as error:
        raise ConfigError(f"trainer.learner is megatron: {error}; install the extra `megatron`") from error
    return open_megatron(
        model_dir,
        learner_config(config),
        ranks=section.ranks,
        threads=section.threads,
        step_s=section.step_timeout_s,
        tensor_parallel=section.megatron.tensor_parallel,
        expert_parallel=section.megatron.expert_parallel,
    )


def digest(config: LearnerConfig) -> str:
    """sha256 of every setting of loss and optimizer."""
    return hashlib.sha256(msgspec.json.encode(config)).hexdigest()
