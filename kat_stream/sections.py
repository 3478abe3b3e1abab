"""The settings of a run: one section a part of the system, every key with its default, documented under itself.

Invariant: what may be wrong with one key alone is in its type (kat_stream.ranges); what must agree with other keys is
checked in config.py. No I/O, nothing heavy: the command line imports this.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Literal

import msgspec

from kat_stream.ranges import Context, Count, CountOrNone, Partitions, Port, Positive, PositiveOrZero, Share, Url
from kat_stream.rl.settings import (
    Aggregation,
    ClipBand,
    Denominator,
    DistillationConfig,
    Divergence,
    Level,
    MaskName,
    PenaltyConfig,
    RatioConfig,
)
from topics.catalogue import GROUP_PARTITIONS


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section."""


class RunSection(Section, frozen=True, kw_only=True):
    name: str = ""
    """Name of the run; empty: made from the date and the seed."""
    directory: str = "runs"
    """Parent of the run's folder."""
    seed: int = 0
    steps: CountOrNone = 40
    """Optimizer steps to make."""


class SecuritySection(Section, frozen=True, kw_only=True):
    """Passwords are not among these: they come from `password_file` or from KAT_KAFKA_PASSWORD."""

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    mechanism: Literal["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"] = "SCRAM-SHA-512"
    username: str = ""
    """Empty: KAT_KAFKA_USERNAME, so that each service may have its own."""
    password_file: str = ""
    ca_file: str = ""
    """PEM of the authority that signed the brokers' certificates; empty: the system's."""
    cert_file: str = ""
    """PEM of this client's own certificate, where brokers ask for one."""
    key_file: str = ""


class LogSection(Section, frozen=True, kw_only=True):
    url: str = "memory:"
    """`memory:` (one process) or `kafka:host:port[,host:port]` (one process a service)."""
    partitions: Partitions = GROUP_PARTITIONS
    """Of each topic that is partitioned by group: so many workers of a stage share it at most. Chosen before the first
    run on a broker; another number is refused afterwards."""
    security: SecuritySection = SecuritySection()
    dead_letters_most: CountOrNone = 20
    """A stage stops once more than so many messages of the window are dead letters, ..."""
    dead_letters_share: Share = 0.5
    """... and more than this share of all that it handled in it."""
    dead_letters_window_s: Positive = 60.0
    static_member: bool = False
    """A service that comes back under its `--member` name keeps its partitions. Only where the platform guarantees one
    live holder of a name (a StatefulSet's pod): two of one name take the partitions from each other for ever."""


class BlobsSection(Section, frozen=True, kw_only=True):
    url: str = ""
    """Where values too large for the log lie: `file:DIRECTORY` or `s3://BUCKET/PREFIX`; empty: the run's own folder."""
    limit_bytes: CountOrNone = 900_000
    """Values over this go there; a broker takes 1 MiB by default."""


class PolicySection(Section, frozen=True, kw_only=True):
    model: str = "demo"
    """Hugging Face directory of the policy to start from, or `demo` for the small one that ships with the package."""
    name: str = "policy"


class DataSection(Section, frozen=True, kw_only=True):
    train: str = "mend:train?count=4000&seed=0"
    held_out: str = "mend:held-out?count=240&seed=0"
    scaffold: str = "shell"
    """The agent that works on the tasks."""


class SamplerSection(Section, frozen=True, kw_only=True):
    scaffold: dict[str, float] = {}
    """Agents and their weights, as in {codex = 1, shell = 3}: the members of each group are shared out among them, and
    compared with those of their own agent. Empty: all run under data.scaffold."""
    group_size: Count = 8
    groups_per_step: Count = 8
    staleness: CountOrNone = 2
    """Policy versions that may be made between the sampling of a rollout and its training."""
    temperature: PositiveOrZero = 1.0
    """A run that trains takes 1, or 0 (greedy): the learner scores at 1. `kat-stream eval` takes any."""
    max_new_tokens: Count = 40
    max_turns: Count = 6
    max_context: Context = 1024
    rollout_timeout_s: Positive = 900.0
    """From the request to the agent's end, waiting included. A task's own limit should be well below."""
    eval_before: bool = True
    eval_after: bool = True
    eval_every: CountOrNone = 0
    """Optimizer steps between evaluations while training goes on; 0: none."""
    eval_tasks: Count = 48
    """Tasks of an evaluation while training goes on; before and after all held-out tasks are used."""


class RolloutSection(Section, frozen=True, kw_only=True):
    sandbox: str = "bwrap"
    allow_unsafe: bool = False
    """Permit a sandbox without isolation."""
    in_flight: Count = 16
    """Rollouts at once in one worker."""
    attempts: Count = 3
    """Tries of one rollout when our side fails."""


class VerifierSection(Section, frozen=True, kw_only=True):
    in_flight: Count = 4


class TeacherSection(Section, frozen=True, kw_only=True):
    """One expert to distil from, served by an engine of its own."""

    name: str
    url: Url
    model: str
    """Hugging Face directory with its tokenizer: its token ids must be the policy's."""
    scores: dict[str, float]
    """Family, written "DATASET/SCAFFOLD" -> its measured score there; the best teacher of a family is the one asked."""


class ScorerSection(Section, frozen=True, kw_only=True):
    """Scores finished trajectories again: repeated prefills (MCLA), and teachers for distillation."""

    enabled: bool = False
    repeats: CountOrNone = 8
    """Prefills of each trajectory by the engines that sampled it, whose average is pi_old of the ratio; 0: none."""
    reduce: Literal["logprob_mean", "logmeanexp"] = "logprob_mean"
    """How repeats are averaged: mean of log-probs (report) | log of the mean probability."""
    bypass_cache: bool = False
    """Each repeat computes the whole path anew, instead of sharing what precedes the first sampled token."""
    missing: Literal["rollout", "filter"] = "rollout"
    """A rollout that got no score: train on the log-probs of its sampling, or leave it out and count it."""
    wait_s: PositiveOrZero = 30.0
    """How long a group that is otherwise complete waits for its scores."""
    in_flight: Count = 4
    """Trajectories at once."""
    call_timeout_s: Positive = 60.0
    """Of one prefill."""
    teachers: tuple[TeacherSection, ...] = ()
    """The first one wins ties; families that none was measured on are trained by RL alone."""


class GatewaySection(Section, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: Port = 0
    """Port for agents; 0: chosen at start."""
    control_port: Port = 0
    """Port for workers; agents never reach it."""
    more: tuple[tuple[Port, Port], ...] = ()
    """port and control_port of further gateways, one process each (Kafka only); 0: chosen at start."""
    tools: str = "auto"
    """How the policy writes tool calls: auto (as its chat template shows) | none | hermes | qwen3-coder | llama3 |
    deepseek | glm | kimi."""


class EngineSection(Section, frozen=True, kw_only=True):
    urls: tuple[Url, ...] = ()
    """Running SGLang servers; empty: the embedded CPU engine is started."""
    host: str = "127.0.0.1"
    port: Port = 0
    max_total_tokens: Count = 65536
    max_running: Count = 64
    threads: Count = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the embedded engine's weights, keys and values; the learner's are float32."""
    record_routing: bool = False
    """Record which experts each token was routed to (mixtures of experts; SGLang: --enable-return-routed-experts)."""
    update_mode: Literal["abort", "retract", "in_place"] = "retract"
    """How running requests live through a weight update: retract (exact) | in_place (keeps old KV) | abort."""


class MegatronSection(Section, frozen=True, kw_only=True):
    tensor_parallel: Count = 1
    """Ranks that share every matrix."""
    expert_parallel: Count = 1
    """Ranks that share the experts of a mixture; not with tensor_parallel."""


class TrainerSection(Section, frozen=True, kw_only=True):
    learner: Literal["torch", "megatron"] = "torch"
    """megatron: the same step on Megatron-Core (extra `megatron`), divided over `ranks` as its section says."""
    megatron: MegatronSection = MegatronSection()
    learning_rate: PositiveOrZero = 1e-3
    warmup_steps: CountOrNone = 5
    weight_decay: PositiveOrZero = 0.0
    grad_clip: Positive = 1.0
    loss: str = "turn_ratio"
    """See: kat-stream losses list."""
    level: Level = "turn"
    """Unit of the ratio: token | turn | sequence."""
    length_exponent: float = 0.0
    """p of the turn ratio's |T|^-p: 0 (report) | 0.5 | 1 (geometric)."""
    clip_low: float = 0.3
    clip_high: float = 0.3
    clip_band: ClipBand = "constant"
    """constant | sqrt_length: bounds of a turn of T tokens to the power sqrt(T), as noise grows."""
    dual_clip: float = 5.0
    denominator: Denominator = "rollout"
    """pi_old of the ratio: rollout (the behaviour log-probs) | train (the learner's own before the step)."""
    mask: MaskName = "icepop"
    """Tokens on which learner and engine disagree: icepop | truncated | token | unit | none."""
    mask_low: float = 0.5
    mask_high: float = 5.0
    """Band of pi_train / pi_rollout; `unit` wants a narrow one, such as 0.999 .. 1.002."""
    advantage: Literal["group_mean", "group_std", "leave_one_out"] = "group_mean"
    """Baseline of a rollout's reward, over the group's rollouts with the same scaffold."""
    aggregation: Aggregation = "trajectory"
    """trajectory (turns of a trajectory share its weight) | global (every unit of the ratio weighs the same)."""
    distillation_coefficient: float = 0.0
    distillation_clip: float = 5.0
    """Largest |log pi_teacher - log pi| that counts, in nats."""
    kl_coefficient: float = 0.0
    """Of the KL to the policy that the run started from."""
    kl_estimator: Divergence = "k3"
    entropy_coefficient: float = 0.0
    attention: Literal["auto", "segments", "padded", "dense", "flex", "flash"] = "segments"
    """How trees attend: auto (the cheapest of the next three by a measured cost model), flex and flash on GPUs."""
    ranks: Count = 1
    """Processes that share a step, each with its own copy of the model: trees are dealt to them by predicted cost."""
    sharding: Literal["none", "full"] = "none"
    """none: every rank holds the whole model; full: a share of weights, gradients and optimizer state (FSDP2)."""
    updates: Count = 1
    """Optimizer steps that the groups of a step are shared out to, a tree in one of them. With denominator = train the
    ratio divides by the learner's log-probs from before the first (apart from the mask's, which are the engine's)."""
    routing_replay: bool = False
    """Route every token to the experts that the engine recorded; gates stay the learner's. Needs record_routing."""
    micro_batch_tokens: Count = 8192
    """Unique tokens run at once; a larger tree runs in parts, with the same gradient."""
    threads: Count = 1
    checkpoint_every: Count = 5
    keep_checkpoints: Count = 2
    keep_weights: Count = 4
    """Policy versions whose weights stay on disk, those of earlier lives of the trainer among them."""
    step_timeout_s: Positive = 600.0
    """Wait for a group of one step before the trainer says what it is waiting for and looks whether the run goes on:
    it stops if nothing of it did for sampler.rollout_timeout_s and 15 minutes. Ranks may take so long for a step."""

    def ratio(self) -> RatioConfig:
        """The ratio's part; `ConfigError` if it is meaningless."""
        return RatioConfig(**{field.name: getattr(self, field.name) for field in fields(RatioConfig)})

    def distillation(self) -> DistillationConfig:
        return DistillationConfig(coefficient=self.distillation_coefficient, clip=self.distillation_clip)

    def penalty(self) -> PenaltyConfig:
        return PenaltyConfig(**{field.name: getattr(self, field.name) for field in fields(PenaltyConfig)})


class SftSection(Section, frozen=True, kw_only=True):
    data: str = ""
    """JSON lines of conversations: {"messages": [...], "tools": [...]}."""
    out: str = ""
    """Hugging Face directory to write."""
    epochs: Count = 1
    batch: Count = 16
    """Conversations a step."""
    learning_rate: PositiveOrZero = 1e-5
    warmup_steps: CountOrNone = 10


class ArchiverSection(Section, frozen=True, kw_only=True):
    flush_s: Positive = 5.0


class MetricsSection(Section, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: Port = 0
    """/metrics of the process; 0: chosen at start."""


class Config(Section, frozen=True, kw_only=True):
    run: RunSection = RunSection()
    log: LogSection = LogSection()
    blobs: BlobsSection = BlobsSection()
    policy: PolicySection = PolicySection()
    data: DataSection = DataSection()
    sampler: SamplerSection = SamplerSection()
    rollout: RolloutSection = RolloutSection()
    verifier: VerifierSection = VerifierSection()
    scorer: ScorerSection = ScorerSection()
    gateway: GatewaySection = GatewaySection()
    engine: EngineSection = EngineSection()
    trainer: TrainerSection = TrainerSection()
    sft: SftSection = SftSection()
    archiver: ArchiverSection = ArchiverSection()
    metrics: MetricsSection = MetricsSection()
