"""Reasoning in the policy's text: `<think>...</think>` before the reply, as Qwen3, DeepSeek, GLM and Kimi write it.

Invariant: reasoning only begins a reply; a later marker is text. What was never closed is all reasoning.
"""

from __future__ import annotations

from typing import NamedTuple

OPENING, CLOSING = "<think>", "</think>"


class Thought(NamedTuple):
    """Line breaks around both parts belong to the markers."""

    reasoning: str
    content: str
    closed: bool


def opened_by(prompt: str) -> bool:
    """Whether the template already opened the reasoning that the policy is to write."""
    return prompt[-16:].rstrip().endswith(OPENING)


def split(text: str, *, opened: bool) -> Thought:
    """A whole reply as reasoning and what follows it."""
    if not opened:
        if not text.lstrip().startswith(OPENING):
            return Thought("", text, True)
        text = text.lstrip().removeprefix(OPENING)
    reasoning, marker, content = text.partition(CLOSING)
    return Thought(reasoning.strip("\n"), content.lstrip("\n"), bool(marker))
