"""A row cut into unbranched runs, for attention without an N x N mask.

Invariant: every token is a query in exactly one run, and the key at column d of its run is its ancestor (or itself) at
depth d; so the mask of a bucket is `column <= depth`, whatever the shape of the tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kat_stream.trees.layout import TreeLayout

Wide = NDArray[np.int64]
CALL_COST = 32_768
"""Query-key pairs that cost as much as one more attention call: buckets may waste that much padding."""


@dataclass(frozen=True, eq=False, slots=True)
class Bucket:
    """B runs of similar shape, padded to Q queries and K keys."""

    query: Wide
    """int64[B, Q] number of each query; padding is query 0."""
    depth: Wide
    """int64[B, Q] depth of each query; padding is 0, so that it sees one key and stays finite."""
    key: Wide
    """int64[B, K] row index of the ancestor at each depth; padding is token 0."""


@dataclass(frozen=True, eq=False, slots=True)
class Segments:
    buckets: tuple[Bucket, ...]
    place: Wide
    """int64[N]: where each query is among all query slots of all buckets."""
    pairs: int
    """Query-key pairs computed, padding included."""


def cut_segments(layout: TreeLayout, above: int = 0) -> Segments:
    """Runs where each token's parent is the token before it, bucketed by shape.

    The first `above` tokens are a path that only gives keys: queries are numbered from the token after it.
    """
    starts, stops, paths = run_paths(layout, above)
    sizes = [(int(stop - start), len(path)) for start, stop, path in zip(starts, stops, paths, strict=True)]
    buckets: list[Bucket] = []
    place = np.empty(len(layout) - above, np.int64)
    slots = pairs = 0
    for runs in _group(sizes):
        bucket = _bucket(starts[runs] - above, stops[runs] - above, [paths[i] for i in runs])
        width = bucket.query.shape[1]
        for k, run in enumerate(runs):
            count = stops[run] - starts[run]
            place[starts[run] - above : stops[run] - above] = slots + k * width + np.arange(count)
        slots += bucket.query.size
        pairs += bucket.query.size * bucket.key.shape[1]
        buckets.append(bucket)
    return Segments(tuple(buckets), place, pairs)


def run_paths(layout: TreeLayout, above: int = 0) -> tuple[Wide, Wide, list[Wide]]:
    """(start, stop) of each unbranched run from token `above` on, and the tokens from the root to the run's last."""
    at = np.arange(above, len(layout))
    starts = at[(layout.parent[above:] != at - 1) | (at == above)]
    stops = np.append(starts[1:], len(layout))
    return starts, stops, _paths(layout, starts, stops, above)


def _paths(layout: TreeLayout, starts: Wide, stops: Wide, above: int) -> list[Wide]:
    run_of = np.repeat(np.arange(len(starts)), stops - starts)
    chain = np.arange(above)
    paths: list[Wide] = []
    for start, stop in zip(starts, stops, strict=True):
        own = np.arange(start, stop)
        parent = layout.parent[start]
        before = chain if parent < above else paths[run_of[parent - above]]
        paths.append(np.concatenate([before[: layout.pos[start]], own]))
    return paths


def _group(sizes: list[tuple[int, int]]) -> list[list[int]]:
    """Runs that share a bucket: similar shapes, as long as padding wastes less than a call costs."""
    groups: list[list[int]] = []
    queries = keys = useful = 0
    for run in sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True):
        rows, columns = sizes[run]
        widest, longest = max(queries, rows), max(keys, columns)
        padded = widest * longest * (len(groups[-1]) + 1) if groups else 0
        if groups and padded <= 1.25 * (useful + rows * columns) + CALL_COST:
            groups[-1].append(run)
            queries, keys, useful = widest, longest, useful + rows * columns
        else:
            groups.append([run])
            queries, keys, useful = rows, columns, rows * columns
    return groups


def _bucket(starts: Wide, stops: Wide, paths: list[Wide]) -> Bucket:
    wide, tall = int((stops - starts).max()), max(map(len, paths))
    query = np.zeros((len(starts), wide), np.int64)
    depth = np.zeros_like(query)
    key = np.zeros((len(starts), tall), np.int64)
    for k, (start, stop, path) in enumerate(zip(starts, stops, paths, strict=True)):
        query[k, : stop - start] = np.arange(start, stop)
        depth[k, : stop - start] = np.arange(len(path) - (stop - start), len(path))
        key[k, : len(path)] = path
    return Bucket(query, depth, key)
