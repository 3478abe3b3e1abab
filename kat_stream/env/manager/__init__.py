"""The trajectory manager's second half: finished rollouts as rows of a data set. (The first is env/trajectories.py.)

Owns what a format is, one file each, and the rules that choose what is learned from before any format sees it.
Pure but for `parquet` and `export`: no I/O, no clock. Invariant: ids and log-probabilities in a row are those that were
recorded.
"""

from kat_stream.env.manager.base import GROUP, Columns, Format, Row
from kat_stream.env.manager.rollout import Rollout, Step, rollout_of
from kat_stream.env.manager.rules import FAILED, Rules, apply_rules
from kat_stream.env.manager.transcript import Policy, Transcript

__all__ = [
    "FAILED",
    "GROUP",
    "Columns",
    "Format",
    "Policy",
    "Rollout",
    "Row",
    "Rules",
    "Step",
    "Transcript",
    "apply_rules",
    "rollout_of",
]
