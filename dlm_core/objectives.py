"""Training objectives: which tokens are predicted, what each one weighs, and the sums that come out.

Every objective of masked diffusion is a weighted sum of cross-entropies at masked positions,

    loss = sum_{masked l} weight_l * -log p(x0_l | xt),

and differs only in its weight.  So: corrupt (corruption.py), ``masked_targets`` with a ``Weighting``, the head
(cross_entropy.py) for the chosen tokens alone, ``loss_output`` for sums and counts.  Nothing here takes a mean: the
caller divides by the *global* number of tokens, since a local mean makes the gradient depend on how a batch is split.

What lives here: weights and losses.  What must not: drawing, estimators for evaluation (likelihood.py).

Shapes: B rows, L seq_len, M predicted tokens, V vocab_size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.blocks import num_blocks, per_token
from dlm_core.cross_entropy import HeadLoss, compute_dtype
from dlm_core.schedules import Schedule

NUM_T_BINS = 4
"""Statistics are kept for this many equal bins of t."""


@dataclass(frozen=True)
class Corrupted:
    """A noised batch, all on one device (the host's, in training): clean tokens, noised ones, each one's time.

    Raises ValueError unless all have the shape of x0, and t lies in [0, 1].
    """

    x0: Int[Tensor, "B L"]
    xt: Int[Tensor, "B L"]
    t: Float[Tensor, "B L"]
    """Time of each token: constant over a row, a block or a document."""
    is_text: Bool[Tensor, "B L"]
    """Positions that hold text, prompt included: no padding."""
    maskable: Bool[Tensor, "B L"]
    """Text that could have been masked: no prompt.  These are the tokens of the bound."""
    mask_token_id: int
    importance: Float[Tensor, "B L"] | None = None
    """1 / density of t where it was not drawn uniformly (variance.py); multiplies every weight."""

    def __post_init__(self) -> None:
        outside = ~((self.t >= 0) & (self.t <= 1))  # catches nan too
        if outside.any():
            raise ValueError(f"t is {float(self.t[outside][0])}; it must lie in [0, 1]")
        for name in ("xt", "t", "is_text", "maskable", "importance"):
            value = getattr(self, name)
            if value is not None and value.shape != self.x0.shape:
                raise ValueError(
                    f"{name} has the shape {tuple(value.shape)}, x0 {tuple(self.x0.shape)}; each token needs its own: "
                    "expand what a row or a block shares (per_token in blocks.py)"
                )

    @property
    def is_masked(self) -> Bool[Tensor, "B L"]:
        """Positions to be predicted."""
        return (self.xt == self.mask_token_id) & self.maskable


# Weights


class Weighting(ABC):
    """Weight of the cross-entropy of every token; a subclass is final.

    It gives ``_token_weight(batch)`` [B, L], of which only the masked positions matter, and says so if it is a bound.
    """

    @property
    def is_bound(self) -> bool:
        """Whether the expected loss bounds -log p(x0) from above, for the sampling that the class names."""
        return False

    def token_weight(self, batch: Corrupted) -> Float[Tensor, "B L"]:
        """Weights >= 0, of which only those of masked tokens matter; in the dtype of batch.t, 1 / time.

        Raises ValueError if one of a masked token is negative or not finite.
        """
        weight = self._token_weight(batch)
        bad = batch.is_masked & ~((weight >= 0) & (weight < torch.inf))  # catches nan too
        if bad.any():
            raise ValueError(
                f"{self} weighs a masked token with {float(weight[bad][0])} at t = {float(batch.t[bad][0])}; "
                "a weight must be finite and not negative"
            )
        return weight

    @abstractmethod
    def _token_weight(self, batch: Corrupted) -> Float[Tensor, "B L"]: ...


def _is_whole(schedule: Schedule) -> bool:
    return schedule.mask_prob(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [0.0, 1.0]


@dataclass(frozen=True)
class Nelbo(Weighting):
    """-dalpha_t / (1 - alpha_t): the continuous-time NELBO, 1 / t for the linear schedule.

    MDLM (arXiv 2406.07524) eq. 10-11; with a time for each block and a denoiser that sees [xt ; x0], BD3-LM
    (2503.09573).  With the linear schedule t is the mask probability itself: the lambda-form of RADD (2406.03736).  A
    bound for t uniform on [0, 1] and a schedule from alpha 1 to 0; a truncated integral, as of a clipped schedule,
    bounds nothing.  For t uniform on [t_min, 1] it is the mean over that interval: good to train on and to watch;
    ``continuous_bound`` in likelihood.py adds what is missing, and is what to report.
    """

    schedule: Schedule

    @property
    def is_bound(self) -> bool:
        """True if the schedule masks nothing at t = 0 and everything at t = 1."""
        return _is_whole(self.schedule)

    def _token_weight(self, batch: Corrupted) -> Float[Tensor, "B L"]:
        return self.schedule.nelbo_weight(batch.t)


@dataclass(frozen=True)
class DiscreteTime(Weighting):
    """T (alpha_s - alpha_t) / (1 - alpha_t) with s = t - 1 / T: the diffusion term of the bound with T steps.

    MDLM (arXiv 2406.07524) eq. 8.  A bound for t uniform on {1/T, ..., 1} and a schedule from alpha 1 to 0; otherwise
    add ``prior_loss`` and the reconstruction, which is the cross-entropy at t = 0 with weight 1.  Raises ValueError for
    less than one step, and for a t that is not on the grid.
    """

    schedule: Schedule
    num_timesteps: int

    @property
    def is_bound(self) -> bool:
        """True if the schedule masks nothing at t = 0 and everything at t = 1."""
        return _is_whole(self.schedule)

    def __post_init__(self) -> None:
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps is {self.num_timesteps}; it must be at least 1")

    def _token_weight(self, batch: Corrupted) -> Float[Tensor, "B L"]:
        index = torch.round(batch.t * self.num_timesteps)
        rounding = min(1e-6, 0.1 / self.num_timesteps)  # t may have been a float32
        off_grid = (index < 1) | ((index / self.num_timesteps - batch.t).abs() > rounding)
        if off_grid.any():
            raise ValueError(
                f"t is {float(batch.t[off_grid][0])}, which is no multiple of 1/{self.num_timesteps} above 0"
            )
        return self.schedule.discrete_weight(index.double(), self.num_timesteps).to(batch.t.dtype)


@dataclass(frozen=True)
class ExactCount(Weighting):
    """n / k, with k of a row's n maskable tokens masked.

    The k-form of RADD (arXiv 2406.03736) and LLaDA (2502.09992) eq. 14: a bound for k uniform on {1..n} and every
    subset of k equally likely (``mask_exact_count``), the mean over all orders of the any-order autoregressive loss.
    For uniform predictions it gives the bound on every draw.  With a block_size, n and k are those of each block.
    On rows masked token by token at one probability it is the weighting by the realised fraction (MegaDLMs), which
    falls short of the bound by the rows that drew no mask: n / (n + 1) of it for the linear schedule and uniform t.
    Where nothing is masked it is 0.  Raises ValueError if block_size doesn't divide the row.
    """

    block_size: int | None = None

    @property
    def is_bound(self) -> bool:
        """True."""
        return True

    def _token_weight(self, batch: Corrupted) -> Float[Tensor, "B L"]:
        num_rows, seq_len = batch.x0.shape
        block_size = seq_len if self.block_size is None else self.block_size
        blocks = (num_rows, num_blocks(seq_len, block_size), block_size)
        total = batch.maskable.view(blocks).sum(dim=-1)
        count = batch.is_masked.view(blocks).sum(dim=-1)
        weight = torch.where(count > 0, total.to(batch.t.dtype) / count, 0.0)
        return per_token(weight, seq_len)


@dataclass(frozen=True)
class InverseMaskProb(Weighting):
    """1 / (1 - alpha_t): what BD3-LM (arXiv 2503.09573) trains clipped schedules with.  Not a bound.

    It is the NELBO weight divided by -dalpha_t, so it equals it for the linear schedule alone.  The released code
    weighs with 1 when the lower end of the interval is above 1/2; this doesn't.  Raises ValueError where mask_prob is
    0.
    """

    schedule: Schedule

    def _token_weight(self, batch: Corrupted) -> Float[Tensor, "B L"]:
        mask_prob = self.schedule.mask_prob(batch.t)
        if (mask_prob <= 0).any():
            raise ValueError(f"1 / mask_prob diverges where nothing is masked (t = 0 for {self.schedule}); take t > 0")
        return 1.0 / mask_prob


@dataclass(frozen=True)
class Uniform(Weighting):
    """1: the MaskGIT loss (arXiv 2202.04200).  Not a bound for t uniform on [0, 1]."""

    def _token_weight(self, batch: Corrupted) -> Float[Tensor, "B L"]:
        return torch.ones_like(batch.t)


@dataclass(frozen=True)
class OneMinusT(Weighting):
    """1 - t: the "linear" reweighting in the code of Dream (arXiv 2508.15487).  Not a bound."""

    def _token_weight(self, batch: Corrupted) -> Float[Tensor, "B L"]:
        return 1.0 - batch.t


@dataclass(frozen=True)
class Snr(Weighting):
    """SNR / |dSNR/dt| = alpha_t (1 - alpha_t) / -dalpha_t,  SNR = alpha_t / (1 - alpha_t).  Not a bound.

    A weight from Gaussian diffusion (SNR: VDM, arXiv 2107.00630) that tutorials carry over; no masked diffusion model
    was trained with it.  Raises ValueError where dalpha_t = 0.
    """

    schedule: Schedule

    def _token_weight(self, batch: Corrupted) -> Float[Tensor, "B L"]:
        alpha_t, dalpha_t = self.schedule.alpha(batch.t), self.schedule.dalpha(batch.t)
        if (dalpha_t == 0).any():
            raise ValueError(
                f"the SNR weight is undefined at t = {float(batch.t[dalpha_t == 0][0])}, where dalpha_t is 0"
            )
        return alpha_t * (1.0 - alpha_t) / -dalpha_t


@dataclass(frozen=True)
class MinSnr(Weighting):
    """min(SNR, gamma), for Gaussian diffusion arXiv 2303.09556.  Not a bound.  Raises ValueError unless gamma > 0."""

    schedule: Schedule
    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not self.gamma > 0.0:
            raise ValueError(f"gamma is {self.gamma}; it must be above 0")

    def _token_weight(self, batch: Corrupted) -> Float[Tensor, "B L"]:
        mask_prob = self.schedule.mask_prob(batch.t)
        return ((1.0 - mask_prob) / mask_prob).clamp(max=self.gamma)


@dataclass(frozen=True)
class Cart(Weighting):
    """Context-adaptive reweighting:  weight_n = 1/2 sum over clean i != n of p (1 - p)^(|n - i| - 1).  Not a bound.

    Dream (arXiv 2508.15487) eq. 4-5: a masked token weighs more the nearer its clean neighbours are; at most 1.
    Padding is no context here, unlike in the released code.  p = 1 leaves the two direct neighbours.  Raises
    ValueError unless 0 < p <= 1.
    """

    p: float

    def __post_init__(self) -> None:
        if not 0.0 < self.p <= 1.0:
            raise ValueError(f"p is {self.p}; it must lie in (0, 1]")

    def _token_weight(self, batch: Corrupted) -> Float[Tensor, "B L"]:
        clean = (batch.is_text & (batch.xt != batch.mask_token_id)).to(batch.t.dtype)
        place = torch.arange(clean.shape[1], device=clean.device, dtype=clean.dtype)
        distance = (place[:, None] - place).abs()
        geometric = torch.where(distance > 0, self.p * (1.0 - self.p) ** (distance - 1).clamp(min=0), 0.0)
        return 0.5 * clean @ geometric


# What is predicted


@dataclass(frozen=True)
class Targets:
    """The tokens that the denoiser is asked for, flat, and what each weighs."""

    select: Int[Tensor, " M"]
    """Flat position in [B, L] whose hidden state predicts the token."""
    targets: Int[Tensor, " M"]
    weight: Float[Tensor, " M"]
    """Of the training objective."""
    nelbo_weight: Float[Tensor, " M"] | None
    """Of the bound that is watched beside it, if one was asked for."""
    t: Float[Tensor, " M"]
    num_tokens: Int[Tensor, ""]
    """Tokens of the bound, masked or not: its denominator."""


def masked_targets(
    batch: Corrupted, weighting: Weighting, bound: Weighting | None = None, *, target_offset: Literal[0, 1] = 0
) -> Targets:
    """The masked tokens of a batch with the weights of an objective, and of a bound to watch beside it.

    target_offset 1: token l is predicted at position l - 1, as in the autoregressive model that Dream (arXiv
    2508.15487) and DiffuLLaMA (2410.17891) start from; token 0 is then nobody's target and no token of the bound,
    which is one on -log p of the others given token 0 if that stays clean (``maskable_positions`` with keep_first).
    Raises ValueError for a ``bound`` that is not one, if a masked position's clean token is the mask, if xt changes a
    token into another than the mask, for a negative importance, or a target_offset other than 0 and 1.
    """
    if target_offset not in (0, 1):
        raise ValueError(f"target_offset is {target_offset}; it must be 0, or 1 for a shifted model")
    if bound is not None and not bound.is_bound:
        raise ValueError(
            f"{bound} is not a bound, so it can't be shown as one; use Nelbo or DiscreteTime with a schedule that "
            "masks from nothing to everything, ExactCount for exact counts, or none"
        )
    scored = batch.maskable.clone()
    scored[:, :target_offset] = False
    places = (batch.is_masked & scored).flatten().nonzero().squeeze(1)
    targets = batch.x0.flatten()[places]
    if (targets == batch.mask_token_id).any():
        raise ValueError(f"a masked position holds the mask token {batch.mask_token_id} in x0 too: no target")
    changed = (batch.xt != batch.x0) & (batch.xt != batch.mask_token_id)
    if changed.any():
        row, place = changed.nonzero()[0].tolist()
        raise ValueError(
            f"xt[{row}, {place}] is {int(batch.xt[row, place])}, neither x0's {int(batch.x0[row, place])} nor the mask "
            f"token {batch.mask_token_id}; these objectives are for masked text"
        )
    importance = 1.0 if batch.importance is None else batch.importance
    if batch.importance is not None and not (batch.importance >= 0).all():
        raise ValueError("importance is negative or nan somewhere; 1 / density of t is neither")
    return Targets(
        select=places - target_offset,
        targets=targets,
        weight=(weighting.token_weight(batch) * importance).flatten()[places],
        nelbo_weight=None if bound is None else (bound.token_weight(batch) * importance).flatten()[places],
        t=batch.t.flatten()[places],
        num_tokens=scored.sum(),
    )


def next_token_targets(x0: Int[Tensor, "B L"], valid: Bool[Tensor, "B L"]) -> Targets:
    """Autoregressive targets: every valid token after a valid one, predicted at the position before it, weight 1.

    The sum is the exact negative log-likelihood given the first token, no bound; there is no time, so t is nan.
    """
    scored = torch.zeros_like(valid)
    scored[:, 1:] = valid[:, 1:] & valid[:, :-1]
    places = scored.flatten().nonzero().squeeze(1)
    ones = torch.ones(len(places), dtype=torch.float64, device=x0.device)
    return Targets(places - 1, x0.flatten()[places], ones, ones, torch.full_like(ones, torch.nan), scored.sum())


# What comes out


def t_bins(t: Float[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    """The bin that statistics of a time t in [0, 1] go to:  floor(t * NUM_T_BINS), the last one for t = 1."""
    return (t * NUM_T_BINS).long().clamp(max=NUM_T_BINS - 1)


@dataclass(frozen=True)
class LossOutput:
    """Sums and counts over the tokens of a micro batch; nats."""

    loss_sum: Float[Tensor, ""]
    """The training objective, differentiable."""
    nelbo_sum: Float[Tensor, ""] | None
    """The integrand of the bound at the sampled times, whatever the objective (no gradient): to watch, while training.

    Its mean bounds -log p only for times as ``Nelbo`` says; what to report is in likelihood.py."""
    num_tokens: Int[Tensor, ""]
    """Tokens of the bound, masked or not: its denominator."""
    num_masked: Int[Tensor, ""]
    bin_loss_sum: Float[Tensor, " bins"]
    """Unweighted cross-entropy of masked tokens, by bin of t (no gradient)."""
    bin_num_masked: Int[Tensor, " bins"]


def loss_output(head: HeadLoss, targets: Targets) -> LossOutput:
    """Sums and counts from what the head returned for these targets.

    A batch without a masked token gives 0, with a gradient of 0; without a valid token also num_tokens = 0, which the
    caller must not divide by.  Tokens without a time (``next_token_targets``) are in no bin.
    """
    cross_entropy, of_bound = head.cross_entropy, targets.nelbo_weight
    device = cross_entropy.device
    # Indices and counts where t lies, on the host: on a GPU each would wait for it
    timed = (~targets.t.isnan()).nonzero().squeeze(1)
    bins = t_bins(targets.t[timed])
    bin_loss_sum = torch.zeros(NUM_T_BINS, dtype=cross_entropy.dtype, device=device)
    bin_loss_sum.index_add_(0, bins.to(device), cross_entropy[timed.to(device)])
    return LossOutput(
        loss_sum=head.loss_sum,
        nelbo_sum=None if of_bound is None else (of_bound.to(device, cross_entropy.dtype) * cross_entropy).sum(),
        num_tokens=targets.num_tokens,
        num_masked=torch.tensor(len(targets.targets), device=device),
        bin_loss_sum=bin_loss_sum,
        bin_num_masked=torch.bincount(bins, minlength=NUM_T_BINS).to(device),
    )


# Other terms


def prior_loss(alpha_1: Float[Tensor, ""], num_real_tokens: int) -> Float[Tensor, ""]:
    """Prior term of the bound, nats a token:  KL(q(x_1 | x0) || p(x_1)) = alpha_1 log(num_real_tokens).

    For a schedule that ends with alpha_1 > 0 and the prior that leaves a token unmasked equally often, uniform over the
    real tokens; 0 for alpha_1 = 0, as in MDLM (arXiv 2406.07524).  Raises ValueError without a real token, or for an
    alpha_1 outside [0, 1].
    """
    if not 0.0 <= float(alpha_1) <= 1.0:
        raise ValueError(f"alpha_1 is {float(alpha_1)}; it must lie in [0, 1]")
    if num_real_tokens < 1:
        raise ValueError(f"num_real_tokens is {num_real_tokens}; it must be at least 1")
    return alpha_1 * torch.log(torch.tensor(num_real_tokens, dtype=alpha_1.dtype))


def log_ratio(alpha_t: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """log(alpha_t / (1 - alpha_t)), the log of the signal-to-noise ratio: the factor of RADD (arXiv 2406.03736).

    Raises ValueError where nothing or everything is masked, where it is infinite.
    """
    outside = ~((alpha_t > 0) & (alpha_t < 1))  # catches nan too
    if outside.any():
        raise ValueError(f"alpha_t is {float(alpha_t[outside][0])}; the score of a mask is finite only between 0 and 1")
    return torch.log(alpha_t) - torch.log1p(-alpha_t)


def log_concrete_score(log_probs: Float[Tensor, "M V"], alpha_t: Float[Tensor, " M"]) -> Float[Tensor, "M V"]:
    """Log of the concrete score at a masked position:  log(alpha_t / (1 - alpha_t)) + log p(x0 = v | xt).

    The ratio p_t(xt with v at the position) / p_t(xt): RADD (arXiv 2406.03736) theorem 1.  Raises ValueError unless
    0 < alpha_t < 1.
    """
    return log_ratio(alpha_t)[:, None] + log_probs


def score_entropy(
    log_score: Float[Tensor, "M V"],
    targets: Int[Tensor, " M"],
    alpha_t: Float[Tensor, " M"],
    dalpha_t: Float[Tensor, " M"],
) -> Float[Tensor, " M"]:
    """Denoising score entropy of masked positions, an integrand over t like weight * cross-entropy; nats / time.

    -dalpha_t / alpha_t * (sum_v score_v  -  r log score_target  +  r (log r - 1)),  r = alpha_t / (1 - alpha_t).
    SEDD (arXiv 2310.16834), absorbing kernel.  For the score of a normalised denoiser it equals
    nelbo_weight * cross-entropy; an unnormalised score pays for the mass that its sum has too much or too little.
    Raises ValueError unless 0 < alpha_t < 1.
    """
    log_r = log_ratio(alpha_t)
    ratio = log_r.exp()
    score_sum = log_score.logsumexp(dim=1).exp()
    at_target = log_score.gather(1, targets[:, None]).squeeze(1)
    return -dalpha_t / alpha_t * (score_sum - ratio * at_target + ratio * (log_r - 1.0))


@dataclass(frozen=True)
class ConfidenceLoss:
    """The auxiliary loss of confidence-aware parallel decoding, as sum and count.  Not a bound."""

    entropy_sum: Float[Tensor, ""]
    """Entropy of the prediction, summed over the masked tokens whose argmax is right; nats, differentiable."""
    num_correct: Int[Tensor, ""]


def confidence_loss(logits: Float[Tensor, "M V"], targets: Int[Tensor, " M"]) -> ConfidenceLoss:
    """Entropy where the denoiser is already right: lowering it lets a sampler commit more tokens a step.

    CAP of LLaDA2.0 (arXiv 2512.15745), added to the loss as lambda * entropy_sum / max(num_correct, 1), both global.
    In float32 (float64 for float64 logits); ids of logit -inf add nothing.
    """
    logits = logits.to(compute_dtype(logits.dtype))
    is_correct = logits.argmax(dim=1) == targets
    right = logits[is_correct]
    finite = right.masked_fill(right == -torch.inf, 0.0)  # 0 * -inf would be nan
    entropy = right.logsumexp(dim=1) - (right.softmax(dim=1) * finite).sum(dim=1)
    return ConfidenceLoss(entropy.sum(), is_correct.sum())
