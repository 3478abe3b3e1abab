"""Errors, named by the boundary that was crossed; `retriable` is part of the type.

    KatError
    +-- ConfigError              the user's configuration; names file, key and the nearest valid key
    +-- DataError                a record, task or file that cannot be used as it is
    |   +-- DecodeError          bytes that are not the record they claim to be
    |   +-- TaskError            a task directory that is broken
    +-- LogError                 the event log
    |   +-- LogUnavailable       (retriable) broker away, outcome unknown
    |   +-- FencedError          another member owns the partition now; stop writing
    +-- EngineError              an inference engine
    |   +-- EngineUnavailable    (retriable)
    |   +-- EngineRejected       the request itself is wrong, e.g. longer than the context
    +-- SandboxError             the isolation layer
    |   +-- SandboxUnavailable   (retriable) could not be created
    |   +-- SandboxDied          the sandbox went away under a running command
    +-- GatewayError             the LLM proxy, seen from the worker
    +-- VerifierError            (retriable) the grader failed, which says nothing about the work
    +-- DeadlineExceeded         a wait ran out; says what was awaited and for how long

A failed rollout is a record, never an exception that leaves its stage; a broken invariant is a crash.
"""

from __future__ import annotations


class KatError(Exception):
    """Root of every error this package raises on purpose."""

    retriable: bool = False


class ConfigError(KatError):
    pass


class DataError(KatError):
    pass


class DecodeError(DataError):
    pass


class TaskError(DataError):
    pass


class LogError(KatError):
    pass


class LogUnavailable(LogError):
    retriable = True


class FencedError(LogError):
    pass


class EngineError(KatError):
    pass


class EngineUnavailable(EngineError):
    retriable = True


class EngineRejected(EngineError):
    pass


class SandboxError(KatError):
    pass


class SandboxUnavailable(SandboxError):
    retriable = True


class SandboxDied(SandboxError):
    pass


class GatewayError(KatError):
    pass


class VerifierError(KatError):
    retriable = True


class DeadlineExceeded(KatError):
    """A wait ran out of time."""

    retriable = True

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"{what}: nothing within {seconds:g} s")
        self.what = what
        self.seconds = seconds
