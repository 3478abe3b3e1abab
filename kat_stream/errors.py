"""Errors, named by the boundary that was crossed; `retriable` is part of the type.

    KatError
    +-- ConfigError              the user's configuration; names file, key and the nearest valid key
    +-- DataError                a record, task or file that cannot be used as it is
    |   +-- DecodeError          bytes that are not the record they claim to be
    |   +-- TaskError            a task directory that is broken
    |   +-- TurnError            a recorded turn that cannot be trained on
    |   +-- BatchError           a packed batch that is inconsistent or too long for the model
    |   +-- OffPolicyError       a loss that is exact only on-policy met samples of another policy
    |   +-- BlobError            a blob that is gone or whose bytes are not those that were put
    |   +-- CheckpointError      a checkpoint or weight directory that is truncated, foreign or changed
    +-- LogError                 the event log
    |   +-- LogUnavailable       (retriable) broker away, outcome unknown
    |   |   +-- BlobUnavailable  the store of large values is away
    |   +-- AccessDenied         the broker does not let this user in, or not do that
    |   +-- FencedError          another member owns the partition now; stop writing
    |   +-- TooManyDeadLetters   a stage cannot use most of what it reads: stopped before it drains the topic
    +-- EngineError              an inference engine
    |   +-- EngineUnavailable    (retriable)
    |   +-- EngineRejected       the request itself is wrong, e.g. longer than the context
    +-- SandboxError             the isolation layer
    |   +-- SandboxUnavailable   (retriable) could not be created
    |   +-- SandboxDied          the sandbox went away under a running command
    +-- GatewayError             (retriable) the LLM proxy, seen from the worker
    |   +-- RequestRefused       an agent's request that is answered with an error; has HTTP's status and a code
    |       +-- ContextOverflow  the conversation is longer than the policy's context; each wire has words for it
    +-- VerifierError            (retriable) the grader failed, which says nothing about the work
    +-- StepCancelled            the learner was asked to stop between micro-batches; nothing was changed
    +-- StorageError             the run's folder is full or cannot be written
    |   +-- ArchiveInUse         another archiver writes to the same archive
    +-- ServiceDied              a service process that cannot be kept alive; carries its last words
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


class TurnError(DataError):
    pass


class BatchError(DataError):
    pass


class OffPolicyError(DataError):
    pass


class BlobError(DataError):
    pass


class CheckpointError(DataError):
    pass


class LogError(KatError):
    pass


class LogUnavailable(LogError):
    retriable = True


class BlobUnavailable(LogUnavailable):
    pass


class AccessDenied(LogError):
    """The broker refuses a user: waiting does not help, an operator has to grant it."""

    def __init__(self, principal: str, operation: str, resource: str, what: str) -> None:
        super().__init__(f"{what}: {principal} may not {operation} {resource}")
        self.principal, self.operation, self.resource = principal, operation, resource


class FencedError(LogError):
    pass


class TooManyDeadLetters(LogError):
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
    retriable = True


class RequestRefused(GatewayError):
    """An agent's request that is answered with an error: HTTP status, machine-readable code, the field at fault."""

    def __init__(self, message: str, param: str = "", *, status: int = 400, code: str = "") -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class ContextOverflow(RequestRefused):
    """A prompt of `tokens` tokens where `limit` is the longest; clients compact when they are told in known words.

    `tokens` is what was counted: a prompt that is far too long is not counted to its end, and has more.
    """

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"a prompt of {tokens} tokens, at most {limit}", "messages", code="context_length_exceeded")
        self.tokens, self.limit = tokens, limit


class VerifierError(KatError):
    retriable = True


class StepCancelled(KatError):
    pass


class StorageError(KatError):
    pass


class ArchiveInUse(StorageError):
    pass


class ServiceDied(KatError):
    pass


class DeadlineExceeded(KatError):
    """A wait ran out of time."""

    retriable = True

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"{what}: nothing within {seconds:g} s")
        self.what = what
        self.seconds = seconds


def on_purpose(error: BaseException) -> KatError | None:
    """The KatError behind an error: itself, or the first of a task group that failed with nothing else; None: a bug."""
    if isinstance(error, KatError):
        return error
    if isinstance(error, BaseExceptionGroup):
        known = [on_purpose(inner) for inner in error.exceptions]
        return known[0] if all(known) else None
    return None
