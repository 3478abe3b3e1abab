"""Conversations of OpenAI messages with their tools, whatever dialect the agent spoke: Anthropic's blocks included.

One row a line of `linear`. `messages` and `tools` are what chat templates, TRL and `kat-stream sft` read: arguments of
tool calls are JSON values. An exchange whose tool call failed and was left out is not in the messages.
Invariant: what the policy said is taken from the record, never parsed again from text.
"""

from __future__ import annotations

from collections.abc import Iterable

from kat_stream.env.manager.base import Columns, Row
from kat_stream.env.manager.linear import merge
from kat_stream.env.manager.rollout import Rollout
from kat_stream.env.manager.transcript import Policy

COLUMNS: Columns = {
    "messages": "json[]",
    "tools": "json",
    "learned": "string[]",
    "exact": "bool",
}
"""`learned`: turns of which this is the first row; of a second branch the shared beginning is context. `exact`: the
policy's template renders messages and tools to exactly the ids that were recorded."""


class Sft:
    columns: Columns = COLUMNS

    def rows(self, rollout: Rollout, policy: Policy) -> Iterable[Row]:
        for line in merge(rollout):
            said = policy.transcript(rollout, line.last)
            yield {
                "messages": [message.for_template() for message in said.messages],
                "tools": said.tools,
                "learned": [rollout.steps[span.turn].record.turn_id for span in line.spans],
                "exact": said.exact,
            }


FORMAT = Sft()
