"""Dead letters are counted for whoever watches the rate of them."""

from __future__ import annotations

import anyio
from prometheus_client import REGISTRY

from kat_stream.errors import TurnError
from kat_stream.log.base import Delivered, Position
from kat_stream.log.dead_letter_cap import DeadLetterCap
from kat_stream.log.handling import Handling, Settled
from kat_stream.log.outcome import Outcome

LETTERS = {"stage": "verifier", "topic": "trajectories", "error": "TurnError"}


async def refuse(delivered: Delivered) -> Outcome:
    raise TurnError("no such turn")


def test_a_dead_letter_is_counted_by_stage_topic_and_error() -> None:
    before = REGISTRY.get_sample_value("kat_dead_letters_total", LETTERS) or 0.0
    handling = Handling("run-of-today.verifier", refuse, 1, DeadLetterCap(), tiers=True)
    delivered = Delivered(Position("trajectories", 3, 7), b"g", b"?", {}, 0)
    settled = anyio.run(handling.settle, delivered)
    assert isinstance(settled, Settled) and [message.topic for message in settled.messages] == ["dead.letters"]
    assert REGISTRY.get_sample_value("kat_dead_letters_total", LETTERS) == before + 1
