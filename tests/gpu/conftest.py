"""What only an accelerator can say; where PyTorch finds none, nothing is collected here."""

from __future__ import annotations

import torch

from tests.unit.learner.conftest import batch_of_fixture, grow_fixture, model_dir

__all__ = ["batch_of_fixture", "grow_fixture", "model_dir"]

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
