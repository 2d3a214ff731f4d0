"""Samples of a model with the path from masks to text."""

from dataclasses import dataclass, field
from typing import Literal

from pipeline.generate.sampler import SamplerConfig
from pipeline.stage import Stage


@dataclass(frozen=True)
class GenerateConfig:
    """Rows drawn from nothing but masks."""

    num_samples: int = 4
    length: int = 0
    """Tokens of a sample, at most the seq_len that the model was trained on; 0 takes that."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    block_size: int = 0
    """Fill rows in windows of this size from left to right.  0: the whole row at once, or the blocks of a model that
    was trained on blocks, which takes no other size."""
    cache: Literal["auto", "none", "prefix", "dual"] = "auto"
    """auto: keys and values of finished blocks are kept for a model of blocks, which changes nothing but the time.
    none: every pass computes the whole row.  prefix, dual: of a model of full attention, keys and values of what lies
    before the window, or around it, are kept for some passes, an approximation (Fast-dLLM, arXiv 2505.22618)."""
    refresh_every: int = 0
    """Passes from one of the whole row to the next, for cache prefix and dual; 0: one at the start of each window."""
    temperature: float = 0.9
    top_k: int | None = None
    top_p: float = 1.0
    noise_seed: int = 0
    num_frames: int = 8
    """Points of the trajectory that are kept, the first all masks and the last the text."""

    def __post_init__(self) -> None:
        for name in ("length", "block_size", "refresh_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; it must be at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or null for all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1], where 1 keeps all tokens")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1.0):
            raise ValueError("top_k and top_p change nothing at temperature 0; leave them out")
        if self.sampler.kind == "self_speculative" and self.temperature != 0:
            raise ValueError(
                f"temperature is {self.temperature}, but the sampler self_speculative takes the most likely tokens; "
                "set it to 0"
            )
        if self.sampler.kind == "self_speculative" and self.cache in ("prefix", "dual"):
            raise ValueError(
                f'cache is "{self.cache}", which holds one state of a row; the sampler self_speculative has several '
                'in a pass: set it to "auto"'
            )
        if self.refresh_every and self.cache not in ("prefix", "dual"):
            raise ValueError(
                f'refresh_every is {self.refresh_every}, but cache is "{self.cache}"; it goes with prefix and dual'
            )
        if self.num_frames < 2:
            raise ValueError(f"num_frames is {self.num_frames}; it must be at least 2")


STAGE = Stage(
    name="generate",
    kind="task",
    config=GenerateConfig,
    module="pipeline.generate.run",
    inputs=("weights", "tokenizer"),
    code_version=4,
)
