"""What is trained, on how much, and how the work is spread."""

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from dlm_core.models.config import Architecture
from pipeline.config import execution, ordered
from pipeline.data.mixture import whole_weights
from pipeline.errors import UserError
from pipeline.pretrain.adaptation import AdaptationConfig
from pipeline.pretrain.averaging import AverageConfig
from pipeline.pretrain.given import check_planned_architecture
from pipeline.pretrain.objective import ObjectiveConfig, RouterLossConfig, fractions_within, has_count_within
from pipeline.pretrain.optimizer_config import OptimizerConfig
from pipeline.pretrain.phases import Phase, Span, first_step_of_kind, spans
from pipeline.pretrain.watchdog import WatchdogLimits
from pipeline.scoring import MIN_REPLICATES
from pipeline.stage import Stage


@dataclass(frozen=True)
class ValidationConfig:
    """How held-out text is scored while training goes on: the input ``tokens`` has it."""

    every_steps: int = 0
    """0: never."""
    num_rows: int = 64
    """Rows scored, spread over the held-out text."""
    num_replicates: int = MIN_REPLICATES
    """Independent drawings of masks, from whose spread the standard error comes."""
    noise_seed: int = 1_000

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"every_steps is {self.every_steps}; it must be at least 1, or 0 for never")
        if self.num_rows < 1:
            raise ValueError(f"num_rows is {self.num_rows}; it must be at least 1")
        if self.num_replicates < MIN_REPLICATES:
            raise ValueError(
                f"num_replicates is {self.num_replicates}; a standard error needs at least {MIN_REPLICATES}"
            )
        if not 0 <= self.noise_seed < 1 << 63:
            raise ValueError(f"noise_seed is {self.noise_seed}; it must lie in [0, 2**63)")
        for name in ("num_rows", "num_replicates", "noise_seed"):
            default = self.__dataclass_fields__[name].default
            if not self.every_steps and getattr(self, name) != default:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but every_steps is 0: nothing is validated. Set every_steps "
                    "too, or leave both out"
                )


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining from scratch or from given weights: one architecture, one objective, one or several phases."""

    architecture: Architecture = field(default_factory=Architecture)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    router_loss: RouterLossConfig = field(default_factory=RouterLossConfig)
    """Of an architecture with experts; without, it has no effect and must be left as it is."""
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    """How a next-token model, given as the input ``init``, is eased into diffusion."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    phases: dict[str, Phase] = ordered()
    """In order; empty: one phase."""
    num_steps: int = 1000
    global_batch_seqs: int = 16
    mixture: dict[str, float] = field(default_factory=dict[str, float])
    """Shares of rows by source, such as {"code": 2, "books": 1}; sources that are not named are left out. Empty: every
    row of every source once an epoch."""
    short_step_share: float = 0.0
    """Share of steps whose rows are cut to a random length; LLaDA takes 0.01."""
    short_step_min: int = 1
    """Shortest of these lengths, in tokens."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    spike_sigmas: float = 0.0
    """Steps whose loss or gradient norm lies this many standard deviations above the mean of the last updates are
    skipped; OLMo takes 6. 0 skips none."""
    spike_window_steps: int = 128
    """Updates of which that mean is taken."""
    average: AverageConfig = field(default_factory=AverageConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps float32 master weights."""
    init_seed: int = 0
    data_seed: int = 0
    noise_seed: int = 0
    workers: int = execution(2)
    """Data-parallel ranks."""
    min_workers: int = execution(0)
    """Fewest ranks to go on with where nodes are lost, of the numbers that the global batch divides among; 0 waits for
    room for all ``workers``."""
    requires_gpus: bool = execution(False)
    """Train on GPUs alone: a cluster without any yet is waited for; otherwise the first start takes what there is."""
    zero_stage: Literal[0, 1, 2, 3] = execution(1)
    ep_size: int = execution(0)
    """Workers that share the experts of a layer through DeepSpeed's AutoEP; 0: every worker holds all experts."""
    offload_optimizer: bool = execution(False)
    """Keep the optimizer's state in host memory and update there."""
    activation_checkpointing: bool = execution(False)
    """Compute the activations of every layer again in the backward pass instead of keeping them."""
    compile: bool = execution(False)
    """Compile the layers with torch.compile."""
    micro_batch_seqs: int = execution(0)
    """Rows of one forward pass on a rank; 0 takes the rank's whole share. Accumulation follows from it."""
    threads_per_worker: int = execution(1)
    checkpoint_every_steps: int = execution(100)
    keep_checkpoints: int = execution(2)
    max_failed_saves: int = execution(3)
    """Checkpoints in a row that may fail until training stops."""
    accept_changed_identity: bool = execution(False)
    """Continue a checkpoint although what is trained has changed meanwhile; checkpoints record what and when.  Of the
    stage run alone: a workflow gives what has changed a place of its own."""
    max_skipped_steps: int = execution(5)
    """Consecutive steps, skipped for a non-finite loss or gradient or as spikes, after which training stops."""
    replica_check_every_steps: int = execution(500)
    """Steps between comparisons of the weights that ranks hold alike; 0 compares never."""
    watchdog: WatchdogLimits = execution(WatchdogLimits())
    log_norms_every_steps: int = execution(50)
    """Steps between two measurements of the weights' norm and of the memory; 0 for none."""
    peak_tflops_per_worker: float = execution(0.0)
    """What a worker can do at most, in 10^12 operations a second, to tell the model FLOPs utilisation (MFU) against;
    0 takes that of a known GPU, and tells none elsewhere."""
    track: bool = execution(True)
    """Send metrics to Weights & Biases, offline unless logged in; the local log is written always."""

    def __post_init__(self) -> None:
        positive = (
            "num_steps", "global_batch_seqs", "short_step_min", "workers", "threads_per_worker",
            "checkpoint_every_steps", "max_skipped_steps", "max_failed_saves",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("init_seed", "data_seed", "noise_seed"):
            if not 0 <= getattr(self, name) < 1 << 63:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 2**63)")
        for name in ("log_norms_every_steps", "peak_tflops_per_worker"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number that is not negative")
        for name in ("spike_sigmas", "replica_check_every_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.spike_window_steps < 4:
            raise ValueError(f"spike_window_steps is {self.spike_window_steps}; it must be at least 4")
        if self.keep_checkpoints < 2:
            raise ValueError(
                f"keep_checkpoints is {self.keep_checkpoints}; at least 2, since the newest may turn out damaged"
            )
        if self.mixture:
            whole_weights(self.mixture)
        if not 0.0 <= self.short_step_share <= 1.0:
            raise ValueError(f"short_step_share is {self.short_step_share}; it must lie in [0, 1]")
        if self.short_step_min > 1 and not self.short_step_share:
            raise ValueError(
                f"short_step_min is {self.short_step_min}, but short_step_share is 0: no step is short. Set "
                "short_step_share too, or leave both out"
            )
        self.optimizer.check_fits(self.architecture)
        if self.architecture.time_conditioning:
            raise ValueError("architecture.time_conditioning is true, but training gives no time yet; set it to false")
        if self.global_batch_seqs % self.workers:
            raise ValueError(f"global_batch_seqs {self.global_batch_seqs} must be a multiple of workers {self.workers}")
        if not 0 <= self.min_workers <= self.workers:
            raise ValueError(f"min_workers is {self.min_workers}; it must lie between 0 and workers {self.workers}")
        if self.micro_batch_seqs < 0 or self.rank_batch_seqs % self.rows_per_pass:
            raise ValueError(
                f"micro_batch_seqs {self.micro_batch_seqs} must divide global_batch_seqs / workers = "
                f"{self.rank_batch_seqs}, or be 0"
            )
        self._check_objective()
        self._check_experts()
        self._check_average()

    def _check_objective(self) -> None:
        o, a = self.objective, self.adaptation
        if a != AdaptationConfig() and o.kind == "autoregressive":
            raise ValueError("adaptation is set, but objective.kind is autoregressive: nothing is masked; leave it out")
        if a.anneal_steps and any(span.block_size for span in self.spans):
            raise ValueError(
                f"adaptation.anneal_steps is {a.anneal_steps} with denoising blocks, whose attention has no annealed "
                "form; let the block size grow instead (phases.NAME.block_size), or leave it out"
            )
        for span in self.spans:
            if span.block_size and (o.kind == "autoregressive" or o.target_offset or o.weighting == "cart"):
                raise ValueError(
                    f"phase {span.name} has block_size {span.block_size}, which this objective has no blocks for; "
                    "leave it out"
                )
            if not has_count_within(span.block_size, fractions_within(o.mask_rates, o.t_min)):
                raise ValueError(
                    f"objective.mask_rates are {o.mask_rates[0]}, {o.mask_rates[1]}, but no number of masks of the "
                    f"{span.block_size} tokens of a block in phase {span.name} is such a fraction of them; widen them, "
                    "or take larger blocks"
                )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer is true with zero_stage 0, which keeps all state where the model is")
        if self.objective.search_mask_rates and not any(span.block_size for span in self.spans):
            raise ValueError("objective.search_mask_rates is true, but no phase has blocks; set a block_size")
        if self.objective.search_mask_rates and not self.validation.every_steps:
            raise ValueError(
                "objective.search_mask_rates is true, but nothing is validated; set validation.every_steps"
            )
        if self.objective.search_mask_rates and not self._searches_in_time(self.validation.every_steps):
            most = next(
                filter(self._searches_in_time, range(min(self.validation.every_steps, self.num_steps), 0, -1)), 0
            )
            raise ValueError(
                f"validation.every_steps is {self.validation.every_steps}, so that no validation is followed by a step "
                "on blocks of the same size: objective.search_mask_rates would find rates that nothing is trained "
                f"with, in {self.num_steps} steps. "
                + (f"Lower validation.every_steps, as to {most}" if most else "Raise num_steps")
            )

    def _searches_in_time(self, every: int) -> bool:
        for block_size, alike in groupby(self.spans, key=lambda span: span.block_size):
            spans_alike = list(alike)
            last_in_time = (spans_alike[-1].stop_step - 1) // every * every
            if block_size and last_in_time > spans_alike[0].first_step:
                return True
        return False

    def _check_average(self) -> None:
        if self.average.keep == "best" and not self.validation.every_steps:
            raise ValueError('average.keep is "best", but nothing is validated; set validation.every_steps')
        if self.average.keep == "best":
            self._check_best()
        if self.average.keep == "last":
            first_step = first_step_of_kind(self.spans, self.num_steps - 1)
            every, count = self.average.every_steps, self.average.count
            alike = self.num_steps // every - first_step // every
            if alike < count:
                raise ValueError(
                    f"average.count is {count}, but only {alike} step(s) are multiples of average.every_steps {every} "
                    f"on the rows and blocks that the training ends with (its last {self.num_steps - first_step} "
                    "steps); lower one of them, or make the last phase longer"
                )

    def _check_best(self) -> None:
        if self.optimizer.ema_decay:
            raise ValueError(
                'average.keep is "best" with an optimizer.ema_decay: validation scores the running average, the mean '
                "would be of the weights. Set optimizer.ema_decay=0, or leave average out"
            )
        first_step = first_step_of_kind(self.spans, self.num_steps - 1)
        every = self.validation.every_steps
        validated = {*range(every, self.num_steps + 1, every), self.num_steps}
        alike = sum(step > first_step for step in validated)
        if alike < self.average.count:
            raise ValueError(
                f"average.count is {self.average.count}, but only {alike} validation(s) are of the rows and blocks "
                f"that the training ends with (its last {self.num_steps - first_step} steps); lower "
                "validation.every_steps, or make the last phase longer"
            )

    def _check_experts(self) -> None:
        moe, losses = self.architecture.moe, self.router_loss
        if moe is None:
            if losses != RouterLossConfig():
                raise ValueError("router_loss is set, but the architecture has no experts; leave it out")
            if self.ep_size:
                raise ValueError(f"ep_size is {self.ep_size}, but the architecture has no experts; leave it out")
            return
        if losses.bias_rate and not moe.selection_bias:
            raise ValueError(
                f"router_loss.bias_rate is {losses.bias_rate}, but the routers have no bias to move; leave it out, or "
                "set architecture.moe.selection_bias to true"
            )
        if self.rows_per_pass % losses.group_seqs:
            raise ValueError(
                f"router_loss.group_seqs is {losses.group_seqs}; it must divide the {self.rows_per_pass} rows of a "
                "forward pass (micro_batch_seqs)"
            )
        if self.ep_size < 0 or (self.ep_size and (moe.num_experts % self.ep_size or self.workers % self.ep_size)):
            raise ValueError(
                f"ep_size is {self.ep_size}; it must divide moe.num_experts {moe.num_experts} and workers "
                f"{self.workers}, or be 0"
            )
        if self.ep_size and self.zero_stage == 0:
            raise ValueError("ep_size is given with zero_stage 0; AutoEP needs zero_stage 1, 2 or 3")

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The phases with their steps and values."""
        base = self.architecture.rope_base
        return spans(self.phases, self.num_steps, self.objective.block_size, base, self.mixture)

    def span_at(self, step: int) -> Span:
        """The phase of a step."""
        return next(span for span in self.spans if step < span.stop_step)

    @property
    def rank_batch_seqs(self) -> int:
        """Rows of the global batch that one rank trains on."""
        return self.global_batch_seqs // self.workers

    @property
    def rows_per_pass(self) -> int:
        """Rows of one forward pass."""
        return self.micro_batch_seqs or self.rank_batch_seqs

    @property
    def grad_accum_steps(self) -> int:
        """Forward passes of a rank in one optimizer step."""
        return self.rank_batch_seqs // self.rows_per_pass


def check_validation(config: PretrainConfig, inputs: Collection[str], step: str) -> None:
    """UserError if text is to be scored and the input that has it was not given."""
    if config.validation.every_steps and "tokens" not in inputs:
        raise UserError(
            f"{step}.validation.every_steps is {config.validation.every_steps}, but the stage was not given the input "
            "tokens, which has the held-out text; give it, or set validation.every_steps=0"
        )


def check_init(config: PretrainConfig, inputs: Collection[str], step: str) -> None:
    """UserError for a seed of weights that are given."""
    if "init" in inputs and config.init_seed:
        raise UserError(
            f"{step}.init_seed is {config.init_seed}, but the weights come from the input init: nothing is drawn. "
            "Leave it out"
        )


def check_lengths(config: PretrainConfig, packed_len: int, step: str) -> None:
    """UserError if rows of ``packed_len`` tokens can't be cut into the pieces, blocks or short rows of every phase."""
    for span in config.spans:
        seq_len = span.seq_len or packed_len
        for name, value, whole in (("seq_len", seq_len, packed_len), ("block_size", span.block_size or 1, seq_len)):
            if whole % value:
                raise UserError(
                    f"{name} is {value} in phase {span.name} of {step}; it must divide rows of {whole} tokens"
                )
        if config.short_step_share and config.short_step_min >= seq_len:
            raise UserError(
                f"{step}.short_step_min is {config.short_step_min}, but rows have {seq_len} tokens: no step would be "
                f"shorter. Lower it, or set {step}.short_step_share=0"
            )


def check_upstream(config: PretrainConfig, upstream: Mapping[str, Any], step: str) -> None:
    """UserError for what the inputs can't give, and for an override that no workflow asks for."""
    if config.accept_changed_identity:
        raise UserError(
            f"{step}.accept_changed_identity is true, which has no effect in a workflow: another identity is another "
            "artifact there, with checkpoints of its own. Leave it out, or run the stage alone: python -m "
            "pipeline.pretrain"
        )
    check_validation(config, upstream, step)
    check_init(config, upstream, step)
    check_planned_architecture(config.architecture, upstream, step)
    check_lengths(config, upstream["rows"]["seq_len"], step)
    sources: Mapping[str, Any] = upstream.get("rows.tokens.corpus", {}).get("source", {})
    held_out = {name for name, source in sources.items() if source.get("held_out_fraction") == 1.0}
    places = {"mixture": config.mixture}
    places |= {f"phases.{name}.mixture": phase.mixture or {} for name, phase in config.phases.items()}
    for place, mixture in places.items():
        for name in mixture:
            if name in held_out:
                raise UserError(
                    f"{step}.{place}.{name}: corpus.source.{name}.held_out_fraction is 1, so there is nothing of it to "
                    "train on; lower it, or leave the source out of the mixture"
                )
            if sources and name not in sources:
                close = difflib.get_close_matches(name, sources, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise UserError(
                    f"{step}.{place}.{name}: {name!r} is no source of the corpus; {hint}allowed here: "
                    f"{', '.join(sources)}"
                )


def advice(config: PretrainConfig) -> list[str]:
    """What is allowed in a training and hardly ever meant."""
    warmup_steps, anneal_steps = config.optimizer.lr_schedule.warmup_steps, config.adaptation.anneal_steps
    given: list[str] = []
    if warmup_steps >= config.num_steps:
        given.append(
            f"optimizer.lr_schedule.warmup_steps is {warmup_steps}, and num_steps {config.num_steps}: the learning "
            "rate never reaches its peak"
        )
    if anneal_steps > config.num_steps:
        given.append(
            f"adaptation.anneal_steps is {anneal_steps}, and num_steps {config.num_steps}: attention never opens "
            "fully, as it is in evaluation and in samples"
        )
    return given


STAGE = Stage(
    name="pretrain",
    kind="gang",
    config=PretrainConfig,
    module="pipeline.pretrain.run",
    inputs=("rows", "tokenizer"),
    optional_inputs=("tokens", "init"),
    check=check_upstream,
    advice=advice,
    code_version=6,
)
