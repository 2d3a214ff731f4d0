"""What is learned: masked diffusion of rows or of blocks, or next tokens, and how its noise is drawn and weighed."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["diffusion", "autoregressive"]
ScheduleName = Literal["linear", "cosine", "cosine_sqr", "square", "sqrt", "log"]
WeightingName = Literal["nelbo", "inverse_mask_prob", "uniform", "one_minus_t", "cart"]
Masking = Literal["independent", "exact_count"]

ALL_RATES = (0.0, 1.0)


@dataclass(frozen=True)
class ObjectiveConfig:
    """A training objective of dlm_core/objectives.py, by name.

    Raises ValueError for a value out of range, and for one that the others make idle.
    """

    kind: Kind = "diffusion"
    block_size: int = 0
    """Tokens of a denoising block (BD3-LM, arXiv 2503.09573), which divides the rows; 0: whole rows (MDLM, LLaDA)."""
    schedule: ScheduleName = "linear"
    weighting: WeightingName = "nelbo"
    """Of the masked cross-entropies; only "nelbo" is a bound, which is logged beside any other where there is one."""
    cart_p: float = 0.0
    """For "cart" (Dream, arXiv 2508.15487): share of the direct neighbours; 0 where another weighting is used."""
    masking: Masking = "independent"
    """exact_count: a row's or block's number of masks is uniform on 1..n, in strata; the bound of least variance."""
    t_min: float = 1e-3
    """Lowest sampled time; the weight 1/t grows without bound below it."""
    mask_rates: tuple[float, float] = ALL_RATES
    """Mask probabilities trained on (BD3-LM's clipped schedules); narrower than (0, 1) with "inverse_mask_prob"."""
    search_mask_rates: bool = False
    """Choose mask_rates anew at every validation: the interval whose losses of blocks vary least."""
    target_offset: Literal[0, 1] = 0
    """1: position l - 1 predicts token l, as in the autoregressive model that Dream starts from."""
    within_documents: bool = False
    """Tokens attend within their document alone; otherwise to all of the row, as in MDLM, LLaDA and DiffuLLaMA."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("kind", Kind), ("schedule", ScheduleName), ("weighting", WeightingName), ("masking", Masking),
        ):  # fmt: skip
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(kind))}")
        if self.block_size < 0:
            raise ValueError(f"block_size is {self.block_size}; it must be at least 1, or 0 for whole rows")
        if not 0.0 < self.t_min < 1.0:
            raise ValueError(f"t_min is {self.t_min}; it must lie between 0 and 1")
        if self.target_offset not in (0, 1):
            raise ValueError(f"target_offset is {self.target_offset}; it must be 0, or 1 for a shifted model")
        if self.kind == "autoregressive":
            self._refuse_beside("kind autoregressive", keep=("kind", "within_documents"))
        if (self.weighting == "cart") != (self.cart_p > 0.0) or self.cart_p > 1.0:
            raise ValueError(
                f'cart_p is {self.cart_p}; it must lie in (0, 1] with weighting "cart", and be 0 with another'
            )
        if self.masking == "exact_count":
            self._refuse_beside(
                "masking exact_count", keep=("kind", "block_size", "masking", "within_documents", "target_offset")
            )
        if self.block_size and self.target_offset:
            raise ValueError(
                "target_offset is 1 with a block_size: the position before a block is not in it, so a shifted model "
                "of blocks is not defined; set one of them to 0"
            )
        if self.block_size and self.weighting == "cart":
            raise ValueError('weighting is "cart" with a block_size; it weighs by the neighbours in a whole row')
        self._check_mask_rates()

    def _check_mask_rates(self) -> None:
        low, high = self.mask_rates
        if not 0.0 <= low <= high <= 1.0 or high == 0.0:
            raise ValueError(
                f"mask_rates are {low}, {high}; wanted 0 <= lowest <= highest <= 1, and some rate above 0: nothing "
                "would be masked"
            )
        is_clipped = (low, high) != ALL_RATES or self.search_mask_rates
        if is_clipped and (self.schedule != "linear" or self.weighting != "inverse_mask_prob"):
            raise ValueError(
                "mask_rates narrower than (0, 1), and their search, are defined for schedule linear and weighting "
                f"inverse_mask_prob; found {self.schedule} and {self.weighting}"
            )

    def _refuse_beside(self, reason: str, keep: tuple[str, ...]) -> None:
        """ValueError for a field that differs from its default though it has no effect."""
        for name, field in self.__dataclass_fields__.items():
            if name not in keep and getattr(self, name) != field.default:
                raise ValueError(f"{name} is {getattr(self, name)}, which {reason} ignores; leave it out")


def fractions_within(mask_rates: tuple[float, float], t_min: float) -> tuple[float, float]:
    """Bounds of the masked fraction of a group; t_min as the lowest rate bounds none (``clip_candidates``)."""
    low, high = mask_rates
    return 0.0 if low == t_min else low, high


def has_count_within(size: int, fractions: tuple[float, float]) -> bool:
    """Whether some number of masks of so many tokens is such a fraction of them; of none, none is."""
    low, high = fractions
    near = math.ceil(low * size)  # the fewest that are enough, but for a rounding
    counts = range(max(0, near - 1), min(size, near + 1) + 1)
    return size == 0 or any(low <= count / size <= high for count in counts)


@dataclass(frozen=True)
class RouterLossConfig:
    """What the routers of a mixture of experts are trained with, beside the objective (dlm_core/router_losses.py).

    Summed over layers:  balance * mean over groups of the balance loss  +  z * mean over tokens of the z-loss.
    """

    balance: float = 0.01
    z: float = 0.001
    group_seqs: int = 1
    """Rows over which experts are balanced: a group; the rows of every forward pass are whole groups."""
    bias_rate: float = 0.0
    """By which every update moves an expert's selection bias towards an even load, without a gradient (Wang et al.,
    arXiv 2408.15664, algorithm 1); 0 leaves the biases as they are: zero, from scratch."""

    def __post_init__(self) -> None:
        for name in ("balance", "z", "bias_rate"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number, not negative")
        if self.group_seqs < 1:
            raise ValueError(f"group_seqs is {self.group_seqs}; it must be at least 1")
