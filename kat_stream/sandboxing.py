"""Which sandbox back end a run uses: the configured one, and for the demo the best that this machine has."""

from __future__ import annotations

import logging

import msgspec

from kat_stream.config import RolloutSection
from kat_stream.env.sandboxes import SandboxBackend, available, get_sandbox

log = logging.getLogger(__name__)

UNSAFE = "local"


def open_backend(section: RolloutSection) -> SandboxBackend:
    """The configured back end; ConfigError if it isolates nothing and that was not asked for."""
    if section.sandbox == UNSAFE:
        return get_sandbox(UNSAFE, allow_unsafe=section.allow_unsafe)
    return get_sandbox(section.sandbox)


def or_local(section: RolloutSection) -> tuple[RolloutSection, str]:
    """The section as it is, or with no isolation where the back end cannot work here, and then why."""
    reason = available().get(section.sandbox, "unknown")
    if not reason:
        return section, ""
    return msgspec.structs.replace(section, sandbox=UNSAFE, allow_unsafe=True), reason
