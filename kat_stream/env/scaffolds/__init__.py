"""Scaffolds of KwaiEnv: the agents that work on tasks, one file (or one data file) an agent behind one protocol.

Owns the protocol's registration. Invariant: an agent knows its base URL, its key and its sandbox, nothing else.
"""

from kat_stream.env.scaffolds.base import GROUP, Limits, Needs, Scaffold, ScaffoldResult, SessionEndpoint
from kat_stream.env.scaffolds.registry import get_scaffold

__all__ = ["GROUP", "Limits", "Needs", "Scaffold", "ScaffoldResult", "SessionEndpoint", "get_scaffold"]
