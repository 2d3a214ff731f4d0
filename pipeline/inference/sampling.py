"""How text is drawn from a model, whichever asks for it: the sampler, its windows, and what tokens may be drawn."""

import math
from dataclasses import dataclass, field
from typing import Literal

from pipeline.config import execution
from pipeline.inference.sampler import SamplerConfig


@dataclass(frozen=True)
class SamplingConfig:
    """How masks are filled."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Of a model of masked diffusion; one of next tokens goes from left to right."""
    block_size: int = 0
    """Fill rows in windows of this size from left to right, the first of which begins with the first mask.  0: the
    whole row at once, or the blocks of a model that was trained on blocks, which takes no other size."""
    cache: Literal["auto", "none", "prefix", "dual"] = "auto"
    """auto: keys and values of finished blocks are kept for a model of blocks, which changes nothing but the time.
    none: every pass computes the whole row.  prefix, dual: of a model of full attention, keys and values of what lies
    before the window, or around it, are kept for some passes, an approximation (Fast-dLLM, arXiv 2505.22618)."""
    refresh_every: int = 0
    """Passes from one of the whole row to the next, for cache prefix and dual; 0: one at the start of each window."""
    temperature: float = 0.9
    top_k: int | None = None
    top_p: float = 1.0
    guidance: float = 0.0
    """w of classifier-free guidance, logits c + w (c - u) with u from the row with its prompt masked (LLaDA, arXiv
    2502.09992); two forward passes for one.  0: none."""
    suppressed: tuple[int, ...] = ()
    """Ids of tokens that are never drawn."""
    suppresses_eos: bool = False
    """The end of a text is never drawn (logits_eos_inf of LLaDA)."""
    ends_at_eos: bool = False
    """A row ends with the first end of a text that is drawn: what follows is filled with it, and windows behind it make
    no pass."""
    noise_seed: int = 0
    batch_rows: int = execution(16)
    """Rows that go through the model together; no effect on what is drawn."""

    def __post_init__(self) -> None:
        for name in ("block_size", "refresh_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.batch_rows < 1:
            raise ValueError(f"batch_rows is {self.batch_rows}; it must be at least 1")
        self._check_tokens()
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
        if self.sampler.kind == "remdm" and self.refresh_every > 1:
            raise ValueError(
                f"refresh_every is {self.refresh_every}, but the sampler remdm changes rows between their passes; take "
                "0 or 1"
            )
        if self.guidance and self.cache in ("prefix", "dual"):
            raise ValueError(
                f'guidance is {self.guidance}, but cache is "{self.cache}", which holds no rows without their prompt; '
                'set one of them to 0 or "auto"'
            )

    def _check_tokens(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or null for all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1], where 1 keeps all tokens")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1.0):
            raise ValueError("top_k and top_p change nothing at temperature 0; leave them out")
        if not 0.0 <= self.guidance < math.inf:
            raise ValueError(f"guidance is {self.guidance}; it must be 0 or more, and finite")
        if any(token_id < 0 for token_id in self.suppressed):
            raise ValueError(f"suppressed has the id {min(self.suppressed)}; ids begin at 0")
        if self.suppresses_eos and self.ends_at_eos:
            raise ValueError("ends_at_eos is true, but suppresses_eos lets no end be drawn; leave one out")
        if self.suppresses_eos and self.sampler.takes_eos_last:
            raise ValueError("sampler.takes_eos_last is true, but suppresses_eos lets no end be drawn; leave one out")
