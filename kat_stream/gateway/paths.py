"""The token tree of a session: one node a turn, each holding only the tokens it added.

Owns mounting under the longest known prefix. Invariants: the path of a node (its prompt and its sampled ids) is the
first `start` tokens of its parent's path followed by `delta`; no two nodes hang at one place with the same next token,
so that one walk from the root, a memory comparison a turn, finds the longest prefix. Ids are packed as int32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

WIDTH = 4


@dataclass(slots=True, eq=False)
class Node:
    """One turn. `start`, `at`, `length` count tokens; `delta` is int32[length - start]."""

    turn_id: str
    parent: Node | None
    start: int
    delta: bytes
    at: int = 0
    """Where this path left all paths known before it: behind `start` if others had meanwhile sampled the same."""
    branches: dict[tuple[int, bytes], Node] = field(default_factory=dict)
    """Later paths that leave this one, by place and next token."""
    home: Node | None = None
    """Where a walk along this path ends, if others had sampled all of it before."""

    @property
    def length(self) -> int:
        return self.start + len(self.delta) // WIDTH

    def path(self) -> bytes:
        """int32[length]: prompt and sampled ids of this turn."""
        pieces = []
        node: Node | None = self
        end = self.length
        while node is not None:
            # A node that starts at or behind the cut adds nothing to what is wanted of its path.
            pieces.append(node.delta[: max(end - node.start, 0) * WIDTH])
            end = min(end, node.start)
            node = node.parent
        return b"".join(reversed(pieces))


class PathTree:
    """All paths that a session has seen."""

    def __init__(self) -> None:
        self._root = Node("", None, 0, b"")

    def mount(self, prompt: bytes, prefer: Node | None = None) -> tuple[Node | None, int]:
        """(turn, n): the prompt int32[P] begins with the first n tokens of that turn's path; n is the longest known.

        `prefer`: a turn whose whole path begins the prompt; of turns that share equally much it is taken, else the
        oldest. (None, 0) if the session knows no prompt that begins like this one.
        """
        node, matched = self._walk(prompt, prefer)
        if prefer is not None and prefer.length == matched:
            return prefer, matched
        return (None, 0) if node is self._root else (node, matched)

    def add(self, turn_id: str, parent: Node | None, start: int, path: bytes) -> Node:
        """A finished turn becomes a place to mount at; `path` int32[n] is its prompt and sampled ids."""
        host, at = self._walk(path, parent if parent is not None and parent.length == start else None)
        node = Node(turn_id, parent, start, path[start * WIDTH :], at)
        if at < node.length:
            host.branches[at, _token(path, at)] = node
        else:
            node.home = host
        return node

    def _walk(self, path: bytes, behind: Node | None = None) -> tuple[Node, int]:
        """The node whose path shares most with this one, and how many tokens.

        What begins with the whole path of `behind` is looked at from there on: a turn costs what it adds.
        """
        node, matched, view = self._root, 0, memoryview(path)
        if behind is not None:
            node, matched = behind.home or behind, behind.length
            matched += common(view[matched * WIDTH :], memoryview(node.delta)[(matched - node.start) * WIDTH :])
        while (branch := node.branches.get((matched, _token(path, matched)))) is not None:
            own = memoryview(branch.delta)[(branch.at - branch.start) * WIDTH :]
            node, matched = branch, branch.at + common(view[branch.at * WIDTH :], own)
        return node, matched


def _token(path: bytes, at: int) -> bytes:
    return path[at * WIDTH : (at + 1) * WIDTH]


def common(a: memoryview, b: memoryview) -> int:
    """Tokens that two packed sequences have in common from the start: comparisons of halves, each a memcmp."""
    size = min(len(a), len(b)) // WIDTH
    if a[: size * WIDTH] == b[: size * WIDTH]:
        return size
    low, high = 0, size
    while high - low > 1:
        middle = (low + high) // 2
        if a[low * WIDTH : middle * WIDTH] == b[low * WIDTH : middle * WIDTH]:
            low = middle
        else:
            high = middle
    return low
