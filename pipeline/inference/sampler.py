"""The samplers by name, and their settings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from pipeline.config import execution

Kind = Literal[
    "ancestral",
    "origin",
    "analytic",
    "first_hitting",
    "random",
    "confidence",
    "margin",
    "entropy",
    "threshold",
    "factor",
    "entropy_bound",
    "remdm",
    "path_planning",
    "self_speculative",
]
QuotaKind = Literal["even", "timed", "cosine", "linear"]
_BY_SCORE = ("num_steps", "quotas", "is_tempered", "order_temperature", "takes_eos_last")
_BY_COUNT = ("is_tempered", "takes_eos_last", "look_every")
TAKES: Mapping[Kind, tuple[str, ...]] = {
    "ancestral": ("num_steps", "noise_removal"),
    "origin": ("num_steps",),
    "analytic": ("num_steps",),
    "first_hitting": ("per_pass",),
    "random": ("num_steps", "quotas"),
    "confidence": _BY_SCORE,
    "margin": _BY_SCORE,
    "entropy": _BY_SCORE,
    "threshold": ("tau", *_BY_COUNT),
    "factor": ("factor", *_BY_COUNT),
    "entropy_bound": ("gamma", *_BY_COUNT),
    "remdm": ("num_steps", "remasking", "eta"),
    "path_planning": ("num_steps", "eta", "is_tempered"),
    "self_speculative": ("num_states",),
}
"""The settings that each kind has a use for."""
_RANGES: Mapping[str, tuple[float, float]] = {
    "num_steps": (1, math.inf),
    "per_pass": (1, math.inf),
    "num_states": (1, math.inf),
    "order_temperature": (0.0, math.inf),
    "tau": (0.0, 1.0),
    "factor": (0.0, math.inf),
    "gamma": (0.0, math.inf),
    "eta": (0.0, math.inf),
    "look_every": (1, math.inf),
}


@dataclass(frozen=True)
class SamplerConfig:
    """How positions are chosen; of each window, where a row is filled in windows.  null: the default of the kind.

    ancestral: each mask is revealed with the probability of the posterior (MDLM, arXiv 2406.07524).  origin: the
    same as Dream has it, from t = 1 to 1e-3 (2508.15487).  analytic: with one more pass that draws what is left at
    t = 1e-5 (SEDD, 2310.16834).  first_hitting: one at a time, in random order (2409.02908).  random: quotas, in
    random order.  confidence, margin, entropy: the surest first, by quotas (LLaDA, 2502.09992; Dream, 2508.15487;
    MaskGIT, 2202.04200).  threshold, factor (Fast-dLLM, 2505.22618), entropy_bound (2505.24857): as many as are
    sure enough.  remdm (2503.00307), path_planning (2502.03540): tokens may be taken back.  self_speculative
    (2510.04147): the surest one by one, several in one pass.
    """

    kind: Kind = "ancestral"
    num_steps: int | None = None
    """96 by default."""
    noise_removal: bool | None = None
    """End at t = 1e-5 and fill what is left with the most likely tokens, as MDLM does; false by default."""
    per_pass: int | None = None
    """Tokens of a pass, 1 by default; with more, what is drawn together is drawn as if independent."""
    quotas: QuotaKind | None = None
    """even (LLaDA, the default), timed (Dream), cosine or linear (MaskGIT)."""
    is_tempered: bool | None = None
    """Score the distribution that tokens are drawn from (Dream), and not softmax(logits) (LLaDA, the default)."""
    order_temperature: float | None = None
    """Above 0, positions are drawn by their scores in place of the highest (alg_temp of Dream)."""
    takes_eos_last: bool | None = None
    """A position for which the end of a text was drawn is the least sure (confidence_eos_eot_inf of LLaDA); false by
    default."""
    tau: float | None = None
    """0.9 by default."""
    factor: float | None = None
    """1 by default."""
    gamma: float | None = None
    """Nats, 0.1 by default."""
    remasking: Literal["cap", "rescale", "confidence", "loop"] | None = None
    """cap by default."""
    eta: float | None = None
    """Of remdm: most probable remasking of a step; by default what is published: 0.008 of cap, 0.015 of rescale,
    0.02 of loop, 1 of confidence.  Of path_planning: 1 by default."""
    num_states: int | None = None
    """States verified in a pass, 4 by default."""
    look_every: int | None = execution(None)
    """Passes from one look whether all rows are done to the next, 1 by default.  Each waits for the device; passes that
    no row needed any more are made, and not counted.  No effect on what is drawn."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(get_args(Kind))}")
        given = [field.name for field in fields(self) if field.name != "kind" and getattr(self, field.name) is not None]
        idle = [name for name in given if name not in TAKES[self.kind]]
        if idle:
            raise ValueError(
                f"{idle[0]} is {getattr(self, idle[0])!r}, but kind {self.kind!r} has no use for it; it takes "
                f"{', '.join(TAKES[self.kind])}"
            )
        for name in [name for name in given if name in _RANGES]:
            low, high = _RANGES[name]
            high = 1.0 if (self.kind, name) == ("remdm", "eta") else high
            if not low <= getattr(self, name) <= high:
                allowed = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {allowed}")

    def value(self, name: str) -> Any:
        """A setting, or its default."""
        given = getattr(self, name)
        if given is None and (self.kind, name) == ("remdm", "eta"):
            return _ETA_OF_REMASKING[self.value("remasking")]
        return given if given is not None else _DEFAULTS.get((self.kind, name), _DEFAULTS.get(("", name)))


_DEFAULTS: Mapping[tuple[str, str], Any] = {
    ("", "num_steps"): 96,
    ("", "noise_removal"): False,
    ("", "per_pass"): 1,
    ("", "quotas"): "even",
    ("", "is_tempered"): False,
    ("", "order_temperature"): 0.0,
    ("", "takes_eos_last"): False,
    ("", "tau"): 0.9,
    ("", "factor"): 1.0,
    ("", "gamma"): 0.1,
    ("", "remasking"): "cap",
    ("path_planning", "eta"): 1.0,
    ("", "num_states"): 4,
    ("", "look_every"): 1,
}
_ETA_OF_REMASKING = {"cap": 0.008, "rescale": 0.015, "loop": 0.02, "confidence": 1.0}
