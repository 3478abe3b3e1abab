"""mini-swe-agent as a scaffold: everything about it stands in mini-swe-agent.toml."""

from __future__ import annotations

from pathlib import Path

from kat_stream.env.scaffolds.blackbox import BlackBox, read_description

_DESCRIPTION = Path(__file__).with_name("mini-swe-agent.toml")


class MiniSweAgent(BlackBox):
    def __init__(self) -> None:
        super().__init__(read_description(_DESCRIPTION))
