"""Classifier-free guidance of a denoiser."""

import torch
from jaxtyping import Float
from torch import Tensor


def guided_logits(
    conditional: Float[Tensor, "M V"], unconditional: Float[Tensor, "M V"], w: float
) -> Float[Tensor, "M V"]:
    """unconditional + (w + 1) (conditional - unconditional), computed as c + w (c - u):  w = 0 changes nothing.

    The form of LLaDA (arXiv 2502.09992) and SMDM (2410.18514), where ``unconditional`` comes from the same sequence
    with its prompt masked; the samples follow p_c^(1 + w) / p_u^w.  Tutorials write u + w (c - u): their w is this
    one + 1.  An id that either side excludes (logit -inf) is excluded.
    """
    excluded = (conditional == -torch.inf) | (unconditional == -torch.inf)
    return (conditional + w * (conditional - unconditional)).masked_fill(excluded, -torch.inf)
