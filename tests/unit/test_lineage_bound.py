"""Any order of sampling, packing, steps and crashes: nothing twice, nothing skipped, the staleness bound holds.

The truth is kept apart from the names of versions: each version remembers which optimizer steps its weights contain.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kat_stream.curriculum import Schedule
from kat_stream.observe.lineages import surviving
from kat_stream.rl.group import GroupRules, pack_group
from kat_stream.rl.staleness import age
from kat_stream.rl.step import assemble
from kat_stream.versions import Versions
from tests.unit.records import RUN, request, reward, trajectory, turn
from topics import PackedBatch, PolicyVersion, Sampling, TrainStep, VersionSpan, format_version

GROUPS, STEPS = 2, 30
WORDS = (
    *["ask"] * 8, *["finish first"] * 6, *["finish last"] * 6, *["train"] * 6, *["train and save"] * 3,
    *["adopt"] * 4, *["sample"] * 2, "crash", "die unannounced",
)  # fmt: skip
"""As often as they are named; a group may stay open while others overtake it."""
Ancestry = tuple[int, ...]


@dataclass
class World:
    """Trainer, sampler, engine and packer as rules over one log of one partition."""

    bound: int
    versions: list[PolicyVersion] = field(default_factory=list)
    truth: dict[str, Ancestry] = field(default_factory=dict)
    batches: list[PackedBatch] = field(default_factory=list)
    spans_of: dict[str, list[str]] = field(default_factory=dict)
    steps: list[TrainStep] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    saved: list[tuple[str, int, int, Ancestry]] = field(default_factory=list)
    asked = made = lives = 0
    engine = lineage = ""
    number = position = 0
    weights: Ancestry = ()

    def reader(self) -> Versions:
        """What anybody makes of `policy.versions`."""
        read = Versions(RUN)
        for version in self.versions:
            read.take(version)
        return read

    def live(self) -> None:
        """A trainer starts, as `consumers.trainer` does."""
        read = self.reader()
        parent, self.number, self.position, self.weights = (*read.root[:1], 0, 0, ())
        at = read.root[1]
        for lineage, step, position, weights in reversed(self.saved):
            if age(format_version(lineage, step), read.head, read.forks) is not None:
                parent, at, self.number, self.position, self.weights = lineage, step, step, position, weights
                break
        self.lives += 1
        self.lineage = f"life{self.lives}"
        self.publish(parent, at)

    def publish(self, parent: str, at: int) -> None:
        self.parent = (parent, at)
        version = PolicyVersion(
            run=RUN, model="m", lineage=self.lineage, number=self.number, path="", checksum="",
            parent_lineage=parent, parent_number=at,
        )  # fmt: skip
        self.versions.append(version)
        self.truth[version.version] = self.weights

    def ask(self) -> None:
        schedule = Schedule(
            run=RUN, seed=0, steps=STEPS, group_size=2, groups_per_step=GROUPS, staleness=self.bound,
            sampling=Sampling(), eval_before=False, eval_after=False, eval_every=0, eval_tasks=0,
        )  # fmt: skip
        newest = self.versions[-1].number
        if self.asked < schedule.admissible_groups(newest):
            assert self.asked < (newest + 1 + self.bound) * GROUPS
            group = f"{RUN}-t{self.asked:06d}"
            self.asked += 1
            self.open.append(group)
            self.spans_of[group] = [self.engine]

    def finish(self, which: int) -> None:
        if not self.open:
            return
        group = self.open.pop(which)
        members = []
        for sample in range(2):
            asked = request(group, sample, 2)
            spans = tuple(VersionSpan(name, at, at + 1) for at, name in enumerate(self.spans_of[group]))
            said = turn(asked, [1, 2], [3 + sample] * len(spans))
            members.append((trajectory(asked, replace(said, spans=spans)), reward(asked, float(sample))))
        rules = GroupRules(staleness=self.bound, budget_tokens=256)
        read = self.reader()
        self.batches.append(pack_group(members, read.head, read.forks, rules))

    def train(self, *, save: bool, announce: bool = True) -> None:
        groups = self.batches[self.position : self.position + GROUPS]
        if len(groups) < GROUPS or self.number == STEPS:
            return
        read = self.reader()
        head = format_version(self.lineage, self.number)
        step = assemble(groups, head, read.forks, self.bound)
        self.check(step.trained)
        self.made += 1
        self.weights = (*self.weights, self.made)
        self.number += 1
        self.position += GROUPS
        if not announce:
            return
        self.steps.append(
            TrainStep(
                run=RUN,
                lineage=self.lineage,
                step=self.number,
                metrics={},
                groups=step.groups,
                trained=step.trained,
                stale=step.stale,
                unix_s=float(self.made),
            )  # fmt: skip
        )
        self.publish(*self.parent)
        if save:
            self.saved.append((self.lineage, self.number, self.position, self.weights))

    def check(self, trained: tuple[str, ...]) -> None:
        """By the truth: what a token was sampled with is contained in the weights, and at most `bound` steps behind."""
        for rollout_id in trained:
            for name in self.spans_of[rollout_id.rpartition("-")[0]]:
                then = self.truth[name]
                assert self.weights[: len(then)] == then
                assert len(self.weights) - len(then) <= self.bound

    def play(self, word: str) -> None:
        match word:
            case "ask":
                self.ask()
            case "adopt":
                self.engine = self.versions[-1].version
            case "sample":
                for group in self.open:
                    self.spans_of[group].append(self.engine)
            case "finish first" | "finish last":
                self.finish(0 if word == "finish first" else -1)
            case "train":
                self.train(save=False)
            case "train and save":
                self.train(save=True)
            case "crash":
                self.live()
            case "die unannounced":
                self.train(save=False, announce=False)
                self.live()


@given(words=st.lists(st.sampled_from(WORDS), min_size=100, max_size=250), bound=st.integers(0, 3))
@settings(max_examples=60)
def test_nothing_twice_nothing_skipped_and_the_bound_holds(words: list[str], bound: int) -> None:
    world = World(bound)
    world.live()
    world.engine = world.versions[-1].version
    for word in words:
        world.play(word)
    count = surviving(world.steps)
    assert [step.step for step in count] == list(range(1, len(count) + 1))
    consumed = [group for step in count for group in step.groups]
    assert consumed == [batch.group_id for batch in world.batches[: len(consumed)]]
    packed = {m.rollout_id for b in world.batches[: len(consumed)] for m in b.members if m.fate == "packed"}
    named = [rollout for step in count for rollout in (*step.trained, *step.stale)]
    assert sorted(named) == sorted(packed)


def test_a_life_without_a_checkpoint_still_trains_what_the_first_weights_sampled() -> None:
    world = World(2)
    world.live()
    world.engine = world.versions[-1].version
    for word in ("ask", "ask", "finish first", "finish first", "train", "crash", "train"):
        world.play(word)
    (step,) = surviving(world.steps)
    assert (step.lineage, len(step.trained)) == ("life2", 4)
