"""Turns of agents as token trees: each unique token once, each turn still its own object. Pure numpy, no I/O, no clock.

records --turns--> TurnTokens --forest--> TreeLayout (DFS) --packing--> rows --batch--> TrainBatch <--wire--> bytes
"""

from kat_stream.trees.batch import TrainBatch, make_batch, merge
from kat_stream.trees.forest import build_forest
from kat_stream.trees.layout import TreeLayout, check_layout, concat
from kat_stream.trees.packing import pack
from kat_stream.trees.partition import partition, with_path
from kat_stream.trees.turns import TurnTokens, turns_of
from kat_stream.trees.wire import from_arrays, to_arrays

__all__ = [
    "TrainBatch",
    "TreeLayout",
    "TurnTokens",
    "build_forest",
    "check_layout",
    "concat",
    "from_arrays",
    "make_batch",
    "merge",
    "pack",
    "partition",
    "to_arrays",
    "turns_of",
    "with_path",
]
