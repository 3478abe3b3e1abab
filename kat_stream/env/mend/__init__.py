"""Mend: a seeded family of small repositories, each with one failing test that one to four shell commands mend.

Owns the demo's tasks. Invariant: the solution of every task makes its check pass, the untouched repository makes it
fail, and no command sequence that mends a held-out task is the solution of a training task.
"""

from kat_stream.env.mend.generator import MendTask, generate
from kat_stream.env.mend.harbor import repository, write_task

__all__ = ["MendTask", "generate", "repository", "write_task"]
