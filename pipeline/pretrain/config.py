"""What is trained, on how much, and how the work is spread."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dlm_core.models.config import Architecture
from pipeline.config import execution
from pipeline.data.mixture import whole_weights
from pipeline.errors import UserError
from pipeline.stage import Stage


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) with linear warm-up, then linear decay towards zero."""

    lr: float = 1e-3
    warmup_steps: int = 50
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices, not to norms."""
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        for name in ("warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")

    def lr_at(self, step: int, num_steps: int) -> float:
        """Learning rate of step 0..num_steps-1: up to ``lr`` over the warm-up, then linearly towards 0."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        decay = (num_steps - step) / max(1, num_steps - self.warmup_steps)
        return self.lr * min(warmup, decay)


@dataclass(frozen=True)
class PretrainConfig:
    """Masked-diffusion pretraining from scratch."""

    architecture: Architecture = field(default_factory=Architecture)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    num_steps: int = 1000
    global_batch_seqs: int = 16
    mixture: dict[str, float] = field(default_factory=dict[str, float])
    """Shares of rows by source, such as {"code": 2, "books": 1}; sources that are not named are left out. Empty: every
    row of every source once an epoch."""
    short_step_share: float = 0.0
    """Share of steps whose rows are cut to a random length; LLaDA takes 0.01."""
    short_step_min: int = 1
    """Shortest of these lengths, in tokens."""
    t_min: float = 1e-3
    """Lowest sampled time; the weight 1/t grows without bound below it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps float32 master weights."""
    init_seed: int = 0
    data_seed: int = 0
    noise_seed: int = 0
    workers: int = execution(2)
    """Data-parallel ranks."""
    zero_stage: Literal[1, 2, 3] = execution(1)
    micro_batch_seqs: int = execution(0)
    """Rows of one forward pass on a rank; 0 takes the rank's whole share. Accumulation follows from it."""
    threads_per_worker: int = execution(1)
    checkpoint_every_steps: int = execution(100)
    keep_checkpoints: int = execution(2)
    max_skipped_steps: int = execution(5)
    """Consecutive steps with a non-finite gradient after which training stops."""
    track: bool = execution(True)
    """Send metrics to Weights & Biases, offline unless logged in; the local log is written always."""

    def __post_init__(self) -> None:
        positive = (
            "num_steps", "global_batch_seqs", "short_step_min", "workers", "threads_per_worker",
            "checkpoint_every_steps", "max_skipped_steps",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("init_seed", "data_seed", "noise_seed"):
            if not 0 <= getattr(self, name) < 1 << 63:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 2**63)")
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
        if not 0.0 < self.t_min < 1.0:
            raise ValueError(f"t_min is {self.t_min}; it must lie between 0 and 1")
        if self.architecture.moe is not None:
            raise ValueError("architecture.moe is given, but training has no router losses yet; leave it out")
        if self.architecture.time_conditioning:
            raise ValueError("architecture.time_conditioning is true, but training gives no time yet; set it to false")
        if self.global_batch_seqs % self.workers:
            raise ValueError(f"global_batch_seqs {self.global_batch_seqs} must be a multiple of workers {self.workers}")
        if self.micro_batch_seqs < 0 or self.rank_batch_seqs % self.rows_per_pass:
            raise ValueError(
                f"micro_batch_seqs {self.micro_batch_seqs} must divide global_batch_seqs / workers = "
                f"{self.rank_batch_seqs}, or be 0"
            )

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


def check_mixture(config: PretrainConfig, upstream: Mapping[str, Any], step: str) -> None:
    """UserError if the mixture names a source that the corpus of the workflow does not have."""
    sources: Mapping[str, Any] = upstream.get("rows.tokens.corpus", {}).get("source", {})
    for name in config.mixture:
        if sources and name not in sources:
            close = difflib.get_close_matches(name, sources, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"{step}.mixture.{name}: {name!r} is no source of the corpus; {hint}allowed here: {', '.join(sources)}"
            )


STAGE = Stage(
    name="pretrain",
    kind="gang",
    config=PretrainConfig,
    module="pipeline.pretrain.run",
    inputs=("rows", "tokenizer"),
    check=check_mixture,
    code_version=3,
)
