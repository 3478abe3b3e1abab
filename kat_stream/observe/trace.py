"""The life of one rollout across all topics, told for people. Pure: records in, lines out.

Invariants: the story depends on the set of records, not on their order or repetition; token counts and log-probs are
those of the records, and text is only what the records hold or what `decode` makes of their token ids. A record whose
arrays are damaged is one line that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kat_stream.observe.ledger import Fate, Ledger
from kat_stream.observe.tail import reward_of, rollouts_of
from kat_stream.observe.text import block, clock, number, one_line, plural, versions
from topics import (
    OUTCOMES,
    DeadLetter,
    GroupMember,
    LedgerEntry,
    PackedBatch,
    PolicyVersion,
    Record,
    Reward,
    RolloutRequest,
    Score,
    Task,
    TrainStep,
    Trajectory,
    Turn,
)
from topics.record import floats, ints
from topics.turn import MARKS

Decode = Callable[[Sequence[int]], str]
UNTOLD = (Task, PolicyVersion, DeadLetter)
"""Records that are of no single rollout."""
TOLD_TOPICS = ("rollout.requests", "turns", "trajectories", "rewards", "scores", "batches", "train.steps", "ledger")
RATIO_METRICS = ("loss", "mean_ratio", "clip_fraction", "log_ratio_abs", "masked_fraction")
_TOKENS_A_LINE = 8


@dataclass(slots=True)
class RolloutTrace:
    """Feed it the records of a run; it keeps those of its rollout."""

    rollout_id: str
    _told: dict[object, tuple[int, Record]] = field(default_factory=dict)
    _turns: dict[str, tuple[int, Turn]] = field(default_factory=dict)
    _ledger: Ledger = field(default_factory=Ledger)

    def apply(self, record: Record, timestamp_ms: int) -> None:
        """Take in one record of any rollout."""
        if isinstance(record, TrainStep):
            self._ledger.apply(record)  # every step: which lineage survives is seen from all of them
        if isinstance(record, UNTOLD) or self.rollout_id not in rollouts_of(record):
            return
        self._ledger.apply(record)
        match record:
            case Turn():
                self._turns[record.turn_id] = (timestamp_ms, record)
            case Trajectory():
                for turn in record.turns:
                    self._turns.setdefault(turn.turn_id, (timestamp_ms, turn))
        if not isinstance(record, Turn):
            self._told.setdefault(_key(record), (timestamp_ms, record))

    @property
    def known(self) -> bool:
        return bool(self._told or self._turns)

    @property
    def fate(self) -> Fate:
        """Where the rollout stands; `unknown` if nothing says that it was requested."""
        return self._ledger.fates().get(self.rollout_id, Fate("unknown"))

    def lines(self, *, tokens: bool = False, decode: Decode | None = None) -> Iterator[str]:
        """The story. `tokens`: ids and log-probs too; `decode`: token ids to text, to show what the agent was told."""
        yield from self._head()
        for timestamp_ms, record in self._events():
            first, *rest = self._shown(record, tokens, decode)
            yield f"{clock(timestamp_ms)} {first}"
            yield from rest
        yield f"fate: {_fate(self.fate)}"

    def _events(self) -> list[tuple[int, Record]]:
        """By time; records of one millisecond in the order of the pipeline."""
        events = [event for event in self._told.values() if not isinstance(event[1], LedgerEntry)]
        entries = [event for event in self._told.values() if isinstance(event[1], LedgerEntry)]
        events += [event for event in entries if _is_news(event[1])]
        return sorted([*events, *self._turns.values()], key=lambda event: (event[0], _rank(event[1])))

    def _request(self) -> RolloutRequest | None:
        for _, record in self._told.values():
            if isinstance(record, RolloutRequest):
                return record
            if isinstance(record, Trajectory):
                return record.request
        return None

    def _head(self) -> Iterator[str]:
        request = self._request()
        yield f"rollout {self.rollout_id}"
        if request is None:
            yield "  its request is not on the log any more"
            return
        task = request.task
        purpose = f"evaluation round {request.round}" if request.purpose == "eval" else "training"
        yield f"  for {purpose}: sample {request.sample + 1} of {request.group_size} of group {request.group_id}"
        yield f"  task {task.task_id} of {task.dataset}, agent {task.scaffold}, graded by {task.verifier.name}:"
        yield from block(task.instruction, "    ")

    def _shown(self, record: Record, tokens: bool, decode: Decode | None) -> list[str]:
        """As `_tell`; a record whose arrays cannot be read is one line, for the rest of the story stands."""
        try:
            return self._tell(record, tokens, decode)
        except (ValueError, OverflowError) as error:
            what = f"turn {record.index}" if isinstance(record, Turn) else type(record).__name__
            return [f"{what} cannot be shown: {one_line(str(error))}"]

    def _tell(self, record: Record, tokens: bool, decode: Decode | None) -> list[str]:
        match record:
            case RolloutRequest():
                return _requested(record)
            case Turn():
                return self._turn(record, tokens, decode)
            case Trajectory():
                return _ended(record)
            case Reward():
                return _graded(record)
            case Score():
                if record.reason:
                    return [f"not scored ({record.kind}): {record.reason}"]
                return [f"scored by {record.scorer} {record.version}, {plural(record.repeats, 'repeat')}"]
            case PackedBatch():
                return _packed(record, self.rollout_id)
            case TrainStep():
                return _stepped(record, self.rollout_id)
            case LedgerEntry():
                return [f"{record.state} ({record.reason}), says {record.stage}"]
        raise TypeError(f"no words for {type(record).__name__}")

    def _turn(self, turn: Turn, tokens: bool, decode: Decode | None) -> list[str]:
        if turn.side in MARKS:
            return [MARKS[turn.side]]
        new, sampled = ints(turn.prompt_ids), ints(turn.sampled_ids)
        parent = self._turns.get(turn.parent)
        after = f" after {turn.prefix_len} of turn {parent[1].index}" if parent else ""
        prompt = f"prompt {len(new)} new tokens{after} ({turn.cached_tokens} cached)"
        engine = f" by {turn.engine}" if turn.engine else ""
        drawn = f"sampled {len(sampled)} from {versions(turn.spans)}{engine} in {turn.seconds:.2f} s"
        logprob = f"log-prob {sum(floats(turn.logprobs)):.2f}"
        out = [f"turn {turn.index}: {prompt}; {drawn}, {logprob}, {turn.finish_reason}{_remarks(turn)}"]
        if decode is not None:
            out += block(decode(new), "    < ")
        out += block(turn.content, "    > ")
        if turn.tool_calls:
            out += block(turn.tool_calls, "    > calls ")
        return out + (_token_lines(turn, decode) if tokens else [])


def _key(record: Record) -> object:
    """Equal for two deliveries of one event, different for two events."""
    match record:
        case Trajectory():
            return Trajectory, record.attempt, record.outcome, record.life
        case TrainStep():
            return TrainStep, record.lineage, record.step
        case Reward():
            return Reward, record.verifier, record.verifier_version, record.status, record.life
        case LedgerEntry():
            return LedgerEntry, record.state
        case Score():
            return Score, record.kind, record.scorer, record.version, record.life
    return type(record)


def _rank(record: Record) -> tuple[int, int]:
    order = (RolloutRequest, Turn, Trajectory, Reward, Score, LedgerEntry, PackedBatch, TrainStep)
    return order.index(type(record)), record.index if isinstance(record, Turn) else 0


def _is_news(record: Record) -> bool:
    """What packer and trainer say in the ledger, they say with more detail in batches and train.steps."""
    decided = isinstance(record, LedgerEntry) and record.state in ("failed", "cancelled")
    return decided and getattr(record, "stage", "") not in ("packer", "trainer")


def _requested(request: RolloutRequest) -> list[str]:
    s = request.sampling
    limits = f"at most {s.max_turns} turns of {s.max_new_tokens} tokens, {s.max_context} in all"
    return [f"requested: temperature {s.temperature:g}, top-p {s.top_p:g}, {limits}"]


def _remarks(turn: Turn) -> str:
    remarks = [] if turn.trainable else ["not trained"]
    if turn.fork:
        remarks.append(f"forked the conversation: {turn.fork}")
    return "".join(f"; {remark}" for remark in remarks)


def _token_lines(turn: Turn, decode: Decode | None) -> list[str]:
    """The new prompt ids, then each sampled id with its log-prob, and its text if it can be had."""
    ids, logprobs = ints(turn.sampled_ids), floats(turn.logprobs)
    texts = [repr(decode([i])) if decode else "" for i in ids]
    pairs = [f"{i}{text}:{logprob:.3f}" for i, text, logprob in zip(ids, texts, logprobs, strict=True)]
    prompt = [str(i) for i in ints(turn.prompt_ids)]
    return [*_wrapped("prompt ids", prompt, 2 * _TOKENS_A_LINE), *_wrapped("sampled", pairs, _TOKENS_A_LINE)]


def _wrapped(title: str, words: Sequence[str], a_line: int) -> list[str]:
    rows = [" ".join(words[at : at + a_line]) for at in range(0, len(words), a_line)]
    return [f"    {title}:", *(f"      {row}" for row in rows)]


def _ended(record: Trajectory) -> list[str]:
    attempt = f" (attempt {record.attempt})" if record.attempt > 1 else ""
    took = f"{plural(len(record.turns), 'turn')}, {record.seconds:.2f} s, sandbox {record.sandbox_s:.2f} s"
    out = [f"ended{attempt}: {record.outcome}: {OUTCOMES[record.outcome]}; {took}"]
    if record.detail or record.error_class:
        out.append(f"    {one_line(': '.join(part for part in (record.error_class, record.detail) if part), 200)}")
    if record.log:
        out += ["    the agent's log ends:", *block(record.log, "      ", 10)]
    if record.patch:
        out += [f"    patch of {len(record.patch)} bytes:", *block(record.patch.decode(errors="replace"), "      ")]
    elif record.gradable:
        out.append("    it changed nothing")
    return out


def _graded(record: Reward) -> list[str]:
    by = f"by {record.verifier} {record.verifier_version} in {record.seconds:.2f} s"
    if record.status == "failed":
        first = f"could not be graded {by}: {record.error_class}"
    else:
        parts = ", ".join(f"{name} {score:g}" for name, score in sorted(record.components.items()))
        first = f"graded {record.score:g} {by}{f' ({parts})' if parts else ''}"
    return [first, *block(record.evidence, "    ", 20)]


def _packed(record: PackedBatch, rollout_id: str) -> list[str]:
    member = next(m for m in record.members if m.rollout_id == rollout_id)
    rewards = " ".join(f"[{reward_of(m)}]" if m is member else reward_of(m) for m in record.members)
    group = f"group {record.group_id} with rewards {rewards}"
    if member.fate != "packed":
        return [f"left out: {member.fate} ({member.reason}); {group}"]
    rows = f"{plural(len(record.rows), 'row')}, {record.tree_tokens} tree tokens for {record.flat_tokens} flat"
    return [f"packed: {_share(member)}, advantage {_advantage(record, member)}; {group}; {rows}"]


def _share(member: GroupMember) -> str:
    return f"{plural(member.turns, 'turn')}, {member.tokens} sampled tokens, oldest version {member.oldest_version}"


def _advantage(record: PackedBatch, member: GroupMember) -> str:
    """The advantage of the member's turns, which share one."""
    place = [m.rollout_id for m in record.members if m.fate == "packed"].index(member.rollout_id)
    for row in record.rows:
        for owner, advantage in zip(ints(row.member), floats(row.advantage), strict=True):
            if owner == place:
                return f"{advantage:+.3f}"
    return "-"


def _stepped(record: TrainStep, rollout_id: str) -> list[str]:
    where = f"step {record.step} (lineage {record.lineage})"
    if rollout_id in record.stale:
        return [f"refused as too old by {where}"]
    return [f"trained in {where} with {len(record.trained)} rollouts: {_ratios(record.metrics)}"]


def _ratios(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number(metrics[name], 4)}" for name in RATIO_METRICS if name in metrics)


def _fate(fate: Fate) -> str:
    step = f" in step {fate.step}" if fate.step >= 0 else ""
    return f"{fate.state}{step}{f' ({fate.reason})' if fate.reason else ''}"
