"""Malformed records: bytes broken by chance, and valid records whose contents contradict each other.

Invariant: a seed gives the same messages again. Malformed records carry group ids of their own (`bad-...`), so that no
good group waits for one of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import msgspec

from kat_stream.log import Message
from kat_stream.log.message import seal
from tests import observe_kit as kit
from topics import (
    DeadLetter,
    GroupMember,
    Record,
    Reward,
    Score,
    VersionSpan,
    topic_of,
)
from topics.record import pack_floats, pack_ints

ABSURD = (0, -1, 1 << 31, -(1 << 31), (1 << 63) - 1, -(1 << 63), 1 << 63, (1 << 64) - 1)
NUMBERS = (float("nan"), float("inf"), float("-inf"), -1e308, 1e308, 0.0)
HEADERS = (
    b"",
    b"0",
    b"-1",
    b"2000",
    b"9" * 400,
    b"9" * 5000,
    b"\xff\xfe",
    b"00-\xff-00-01",
    b"00-" + b"z" * 32 + b"-0-1",
)
TEXTS = ("", "bad", "\x00", "☃" * 40, "a.b.c", ".5", "lineage.-3", "\u202e", "x" * 5000)


def good(number: int) -> list[Record]:
    """Every record of one group of two, which must come through."""
    group = f"{kit.RUN}-t{number:06d}"
    asked = [kit.request(group, sample, 2) for sample in range(2)]
    records: list[Record] = [*asked]
    for one in asked:
        records += [kit.trajectory(one), kit.reward(one, float(one.sample))]
    return records


def malformed(chance: random.Random) -> Iterator[Message]:
    """Without end, each of another kind."""
    number = 0
    while True:
        number += 1
        record = chance.choice(_samples(f"bad-t{number:06d}"))
        if chance.random() < 0.5:
            yield _broken(chance, record)
        else:
            yield _contradicting(chance, record)


def _samples(group: str) -> list[Record]:
    asked = kit.request(group, 0, 1)
    member = GroupMember(
        rollout_id=asked.rollout_id, fate="packed", reward=1.0, turns=2, tokens=5, oldest_version="a.0"
    )
    empty: dict[str, object] = {"run": kit.RUN, "group_id": group, "rollout_id": asked.rollout_id}
    return [
        kit.task(group),
        asked,
        *kit.turns(asked),
        kit.trajectory(asked),
        kit.reward(asked, 1.0),
        Score(**empty, scorer="s", version="1", turn_ids=("t",), repeats=2, logprobs=pack_floats([-1.0, -2.0])),
        kit.batch(group, [member]),
        kit.step(1, [group], [asked.rollout_id]),
        kit.entry(asked, "packed"),
        kit.version(1),
        DeadLetter(
            run=kit.RUN, stage="s", topic="turns", partition=0, offset=1, error_type="E", message="m", value=b"\xff"
        ),
    ]


def _broken(chance: random.Random, record: Record) -> Message:
    """A message whose bytes, headers or place were damaged."""
    message = seal(record)
    damage: Callable[[random.Random, Message], Message] = chance.choice(
        (_flipped, _cut, _long, _deep, _mislabelled, _headers)
    )
    return damage(chance, message)


def _with(message: Message, value: bytes) -> Message:
    return Message(message.topic, message.partition, message.key, value, message.headers)


def _flipped(chance: random.Random, message: Message) -> Message:
    data = bytearray(message.value)
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return _with(message, bytes(data))


def _cut(chance: random.Random, message: Message) -> Message:
    return _with(message, message.value[: chance.randrange(len(message.value))])


def _long(chance: random.Random, message: Message) -> Message:
    """A length that the bytes do not have: array, map, string or binary of 4 GiB."""
    at = chance.randrange(len(message.value))
    return _with(message, message.value[:at] + bytes([chance.choice((0xDD, 0xDF, 0xDB, 0xC6))]) + b"\xff" * 4)


def _deep(chance: random.Random, message: Message) -> Message:
    return _with(message, message.value[:-1] + b"\x91" * chance.choice((50, 5000)) + b"\xc0")


def _mislabelled(chance: random.Random, message: Message) -> Message:
    """Under another record's name, an unknown version, no name, or on a partition where it does not belong."""
    name = chance.choice((b"Reward/1", b"Trajectory/1", b"Trajectory/999", b"", b"\xff\xfe", b"PackedBatch/1"))
    partition = chance.randrange(topic_of(Reward).partitions) if message.topic in ("trajectories", "rewards") else 0
    return Message(message.topic, partition, message.key, message.value, {**message.headers, "record": name})


def _headers(chance: random.Random, message: Message) -> Message:
    """A header that the loop itself reads, as another program may have written it."""
    name = chance.choice(("traceparent", "attempt", "stage", "due", "replayed", "another"))
    headers = {**message.headers, name: chance.choice(HEADERS)}
    return Message(message.topic, message.partition, message.key, message.value, headers)


def _contradicting(chance: random.Random, record: Record) -> Message:
    """The record decodes, but some of its fields cannot be true."""
    changes = {}
    for name in chance.sample(record.__struct_fields__, k=min(2, len(record.__struct_fields__))):
        if name not in ("group_id", "run", topic_of(record).key):
            changes[name] = _absurd(chance, getattr(record, name))
    if not changes:
        changes = {"run": "another-run"}
    return seal(msgspec.structs.replace(record, **changes))


def _absurd(chance: random.Random, value: object) -> object:
    match value:
        case bool():
            return not value
        case int():
            return chance.choice(ABSURD)
        case float():
            return chance.choice(NUMBERS)
        case str():
            return chance.choice(TEXTS)
        case bytes():
            return chance.choice(
                (b"", value[:-1], value[:-4], value + b"\x00", pack_ints([-1]), pack_floats(NUMBERS[:1]))
            )
        case tuple() if value:
            return tuple(_inside(chance, item) for item in (value * chance.choice((1, 2)))[: chance.choice((1, 100))])
        case msgspec.Struct():
            return _inside(chance, value)
    return value


def _inside(chance: random.Random, item: object) -> object:
    """One field of an inner struct made absurd."""
    if not isinstance(item, msgspec.Struct):
        return _absurd(chance, item)
    if isinstance(item, VersionSpan):
        return VersionSpan(chance.choice(TEXTS), chance.choice(ABSURD), chance.choice(ABSURD))
    name = chance.choice([field for field in item.__struct_fields__ if field not in ("group_id", "run")])
    return msgspec.structs.replace(item, **{name: _absurd(chance, getattr(item, name))})
