"""Token-granular radix tree over cached keys and values: which pool slots hold the KV of which token prefix.

Owns the mapping prefix -> slots and the least-recently-used order. Invariant: every slot that was inserted is in
exactly one node until `evict` or `clear` hands it back, and a node with a lock, or with a locked descendant, is never
evicted. Source: the RadixAttention design of SGLang (Zheng et al., 2024), page size 1.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from kat_stream.trees.forest import common_prefix

Tokens = NDArray[np.int32]
Slots = NDArray[np.int64]


class Node:
    """An edge of the tree: `tokens` int32 [n] and the pool `slots` int64 [n] that hold their keys and values."""

    __slots__ = ("children", "locks", "parent", "slots", "tokens", "used")

    def __init__(self, tokens: Tokens, slots: Slots, parent: Node | None) -> None:
        self.tokens = tokens
        self.slots = slots
        self.parent = parent
        self.children: dict[int, Node] = {}
        self.locks = 0
        self.used = 0

    def __lt__(self, other: Node) -> bool:
        """Older first: the order in which leaves are evicted."""
        return self.used < other.used


class RadixCache:
    """The tree. `size` counts all tokens held, `evictable` those that no running request has locked."""

    def __init__(self) -> None:
        self.root = Node(np.empty(0, np.int32), np.empty(0, np.int64), None)
        self.size = 0
        self.evictable = 0
        self._tick = 0

    def match(self, tokens: Tokens) -> tuple[Slots, Node]:
        """The slots of the longest cached prefix of `tokens` (int32 [n]) and the node that ends it."""
        node, found, at = self.root, [], 0
        while at < len(tokens) and (child := node.children.get(int(tokens[at]))) is not None:
            shared = common_prefix(child.tokens, tokens[at:])
            if shared < len(child.tokens):
                child = self._split(child, shared)
            self._touch(child)
            found.append(child.slots)
            node, at = child, at + shared
        return (np.concatenate(found) if found else np.empty(0, np.int64)), node

    def match_length(self, tokens: Tokens) -> int:
        """How many leading tokens are cached, without marking them as used."""
        node, at = self.root, 0
        while at < len(tokens) and (child := node.children.get(int(tokens[at]))) is not None:
            shared = common_prefix(child.tokens, tokens[at:])
            at += shared
            if shared < len(child.tokens):
                break
            node = child
        return at

    def insert(self, tokens: Tokens, slots: Slots) -> Slots:
        """Take ownership of `slots` int64 [n]; returns those that were not needed, because the tree had the tokens."""
        held, node = self.match(tokens)
        known = len(held)
        if known < len(tokens):
            leaf = Node(tokens[known:].copy(), slots[known:].copy(), node)
            node.children[int(tokens[known])] = leaf
            self._touch(leaf)
            self.size += len(leaf.tokens)
            self.evictable += len(leaf.tokens)
        spare: Slots = slots[:known][slots[:known] != held]
        return spare

    def lock(self, node: Node | None) -> None:
        """Protect a prefix from eviction while a request reads it."""
        while node is not None:
            if node.locks == 0:
                self.evictable -= len(node.tokens)
            node.locks += 1
            node = node.parent

    def unlock(self, node: Node | None) -> None:
        """Undo one `lock` of the same node."""
        while node is not None:
            node.locks -= 1
            if node.locks == 0:
                self.evictable += len(node.tokens)
            node = node.parent

    def evict(self, count: int) -> list[int]:
        """Drop least recently used unlocked leaves until at least `count` slots are free, or none is left."""
        heap = [node for node in self._leaves() if node.locks == 0]
        heapq.heapify(heap)
        freed: list[int] = []
        while heap and len(freed) < count:
            node = heapq.heappop(heap)
            freed.extend(node.slots.tolist())
            parent = self._remove(node)
            if parent is not self.root and not parent.children and parent.locks == 0:
                heapq.heappush(heap, parent)
        return freed

    def _leaves(self) -> list[Node]:
        stack, leaves = list(self.root.children.values()), []
        while stack:
            node = stack.pop()
            if node.children:
                stack.extend(node.children.values())
            else:
                leaves.append(node)
        return leaves

    def _remove(self, node: Node) -> Node:
        assert node.parent is not None
        del node.parent.children[int(node.tokens[0])]
        self.size -= len(node.tokens)
        self.evictable -= len(node.tokens)
        return node.parent

    def _split(self, node: Node, at: int) -> Node:
        """Cut `node` after `at` tokens; returns the new upper half, which keeps the locks of the lower one."""
        assert node.parent is not None
        upper = Node(node.tokens[:at], node.slots[:at], node.parent)
        upper.locks, upper.used = node.locks, node.used
        node.parent.children[int(node.tokens[0])] = upper
        node.tokens, node.slots, node.parent = node.tokens[at:], node.slots[at:], upper
        upper.children[int(node.tokens[0])] = node
        return upper

    def _touch(self, node: Node) -> None:
        self._tick += 1
        node.used = self._tick
