"""The demo's wording of each agent is the agent's own: one real rollout says what a demonstration says, and passes."""

from __future__ import annotations

import random
import re

import pytest

from kat_stream.config import load
from kat_stream.demo.adaptation import conversation
from kat_stream.demo.demonstrations import clean
from kat_stream.demo.recording import record
from kat_stream.demo.wording import get_wording, settings_of, wording_names
from kat_stream.env.grading import Grader
from kat_stream.env.scaffolds import get_scaffold
from kat_stream.errors import ConfigError
from tests.contract.env_kit import backend, needs_bwrap

pytestmark = pytest.mark.anyio

LOOKS_FIRST = 1
"""A task whose solution reads a file before it writes one."""
DRAWN_ANEW = re.compile(r"Chunk ID: [0-9a-f]{6}\nWall time: \d+\.\d{4} seconds")


@needs_bwrap
@pytest.mark.parametrize("name", wording_names())
async def test_the_agent_says_what_a_demonstration_says_and_its_task_passes(name: str) -> None:
    try:
        get_scaffold(name).needs()
    except ConfigError as error:
        pytest.skip(str(error))
    wording = get_wording(name)
    async with backend() as sandboxes:
        recording = await record(name, wording, sandboxes, load(settings_of(name)).sampler.max_context, LOOKS_FIRST)
        assert recording.trajectory.outcome == "submitted", recording.trajectory.log
        reward = await Grader(sandboxes).grade(recording.trajectory)
    assert reward.score == 1.0
    prompt, demonstration = recording.prompt(), clean(recording.task)
    assert len(recording.prompts) == len(demonstration.turns) >= 3
    said = DRAWN_ANEW.sub("", prompt.head + conversation(demonstration, prompt, wording, random.Random(0)))
    for seen in recording.prompts:
        assert said.startswith(DRAWN_ANEW.sub("", seen))
