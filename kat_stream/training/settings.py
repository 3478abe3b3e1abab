"""The learner's part of a run's configuration, and its name in a record.

Invariant: two runs with one digest use the same loss and the same optimizer.
"""

from __future__ import annotations

import hashlib

import msgspec

from kat_stream.config import Config
from kat_stream.training.learner import LearnerConfig


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
    )


def digest(config: LearnerConfig) -> str:
    """sha256 of every setting of loss and optimizer."""
    return hashlib.sha256(msgspec.json.encode(config)).hexdigest()
