"""The stage loop, three ways: `run_work`, `run_transform`, and `Log.follow` for readers without a group.

Invariant: a message is finished only together with, or after, what follows from it (DESIGN.md section 6).
"""

from __future__ import annotations

from kat_stream.log.transform import run_transform
from kat_stream.log.work import run_work

__all__ = ["run_transform", "run_work"]
