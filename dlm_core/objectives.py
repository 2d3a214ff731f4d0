"""Training objectives.  Each returns sums and counts, never a local mean.

The caller divides by the *global* number of valid tokens: a mean taken here would make the gradient depend
on how the batch is split over workers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

NUM_T_BINS = 4
"""Statistics are kept for this many equal bins of t."""


@dataclass(frozen=True)
class LossOutput:
    """Sums over the tokens of a micro batch; nats."""

    loss_sum: Float[Tensor, ""]
    """Weighted loss summed over tokens: the NELBO of the rows (differentiable)."""
    num_tokens: Int[Tensor, ""]
    """Valid tokens, masked or not: the denominator of the bound."""
    num_masked: Int[Tensor, ""]
    bin_loss_sum: Float[Tensor, " bins"]
    """Unweighted cross-entropy of masked tokens, by bin of t (no gradient)."""
    bin_num_masked: Int[Tensor, " bins"]


def masked_nelbo(
    masked_logits: Float[Tensor, "M V"],
    masked_targets: Int[Tensor, " M"],
    masked_rows: Int[Tensor, " M"],
    t: Float[Tensor, " B"],
    weight: Float[Tensor, " B"],
    loss_mask: Bool[Tensor, "B L"],
) -> LossOutput:
    """Continuous-time NELBO of masked diffusion:  sum_b weight_b * sum_{masked l} -log p(x0_l | xt).

    MDLM (arXiv 2406.07524) eq. 10-11, with weight = nelbo_weight(alpha_t, dalpha_t) (1/t for the linear
    schedule).  It takes logits of the masked positions alone, since unmasked ones are copied by the SUBS
    parameterisation and add nothing; ``masked_rows`` says which row of the batch each belongs to.  The
    cross-entropy is taken in float32.  No masked position gives a loss of 0 that still has a gradient path.
    """
    cross_entropy = F.cross_entropy(masked_logits.float(), masked_targets, reduction="none")
    loss_sum = (weight.float()[masked_rows] * cross_entropy).sum()
    with torch.no_grad():
        bins = (t[masked_rows] * NUM_T_BINS).long().clamp(max=NUM_T_BINS - 1)
        bin_loss_sum = torch.zeros(NUM_T_BINS, device=t.device)
        bin_loss_sum.index_add_(0, bins, cross_entropy.detach())
        bin_num_masked = torch.bincount(bins, minlength=NUM_T_BINS)
    return LossOutput(
        loss_sum=loss_sum,
        num_tokens=loss_mask.sum(),
        num_masked=torch.tensor(masked_targets.numel(), device=t.device),
        bin_loss_sum=bin_loss_sum,
        bin_num_masked=bin_num_masked,
    )
