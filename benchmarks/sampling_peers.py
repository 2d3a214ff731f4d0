"""Sampling in the manner of the public scripts of LLaDA and of MDLM, written anew: what a reader would use without us.

Every step has the logits of every row and position, and draws for all of them from the whole vocabulary.  Precision is
theirs: LLaDA's noise and softmax are float64, MDLM's noise is float32.  Each returns the rows and the number of forward
passes.  Two things are added, for the same law as ours: LLaDA's mask token has no probability, and MDLM may be given
rows with a prompt.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Model = Callable[[Tensor], Tensor]
"""xt [B, L] -> logits [B, L, V], which are the caller's to change."""

MDLM_T_END = 1e-5


# LLaDA (arXiv 2502.09992), generate.py


def llada(
    model: Model,
    xt: Tensor,
    *,
    start: int,
    num_steps: int,
    block_size: int,
    temperature: float,
    remasking: Literal["low_confidence", "random"],
    mask_token_id: int,
) -> tuple[Tensor, int]:
    """Fill what follows ``start``, block by block, the surest or any positions of the block first."""
    x, num_passes = xt.clone(), 0
    num_blocks = (x.shape[1] - start) // block_size
    for left in range(start, x.shape[1], block_size):
        right = left + block_size
        quotas = _even_quotas(x[:, left:right] == mask_token_id, num_steps // num_blocks)
        for step in range(quotas.shape[1]):
            is_masked = x == mask_token_id
            logits = model(x)
            num_passes += 1
            logits[:, :, mask_token_id] = -torch.inf
            x0 = _with_gumbel_noise(logits, temperature).argmax(dim=-1)
            if remasking == "low_confidence":
                probs = logits.double().softmax(dim=-1)
                sureness = probs.gather(-1, x0.unsqueeze(-1)).squeeze(-1)
            else:
                sureness = torch.rand(x0.shape, device=x0.device)
            sureness[:, right:] = -torch.inf
            x0 = torch.where(is_masked, x0, x)
            sureness = torch.where(is_masked, sureness, -torch.inf)
            is_taken = torch.zeros_like(is_masked)
            for row in range(len(x)):
                surest = torch.topk(sureness[row], k=int(quotas[row, step].item())).indices
                is_taken[row, surest] = True
            x[is_taken] = x0[is_taken]
    return x, num_passes


def _even_quotas(is_masked: Tensor, num_steps: int) -> Tensor:
    num_masks = is_masked.sum(dim=1, keepdim=True)
    quotas = (num_masks // num_steps).repeat(1, num_steps)
    for row in range(len(is_masked)):
        quotas[row, : int(num_masks[row].item()) % num_steps] += 1
    return quotas


def _with_gumbel_noise(logits: Tensor, temperature: float) -> Tensor:
    """Whose argmax is a draw from softmax(logits / temperature); a multiple of exp(logits + temperature * Gumbel)."""
    if temperature == 0:
        return logits
    logits = logits.double()
    noise = torch.rand_like(logits)
    return logits.exp() / (-torch.log(noise)) ** temperature


# MDLM (arXiv 2406.07524), the samplers ddpm and ddpm_cache with removal of noise


def mdlm(model: Model, xt: Tensor, *, num_steps: int, mask_token_id: int, keeps_prediction: bool) -> tuple[Tensor, int]:
    """Steps of the posterior from t = 1 to 1e-5, then the most likely tokens for what is left.

    ``keeps_prediction`` (ddpm_cache) makes no pass where the step before changed no token of any row.
    """
    x, num_passes, kept = xt, 0, None
    times = torch.linspace(1.0, MDLM_T_END, num_steps + 1, device=x.device)
    dt = (1.0 - MDLM_T_END) / num_steps
    for t in times[:-1]:
        if kept is None:
            kept = _subs(model(x), x, mask_token_id).exp()
            num_passes += 1
        q = kept * dt  # mask_prob of t less that of t - dt
        q[:, :, mask_token_id] = t - dt
        drawn = _categorical(q)
        following = torch.where(x == mask_token_id, drawn, x)
        if not keeps_prediction or not torch.equal(following, x):
            kept = None
        x = following
    return _subs(model(x), x, mask_token_id).argmax(dim=-1), num_passes + 1


def _subs(logits: Tensor, xt: Tensor, mask_token_id: int) -> Tensor:
    """Log-probabilities: none for the mask token, and what is no mask stays as it is."""
    logits[:, :, mask_token_id] = -torch.inf
    log_probs = logits - logits.logsumexp(dim=-1, keepdim=True)
    is_token = xt != mask_token_id
    log_probs[is_token] = -torch.inf
    log_probs[is_token, xt[is_token]] = 0.0
    return log_probs


def _categorical(weights: Tensor) -> Tensor:
    """A draw from weights that need not add up to 1, in their precision."""
    noise = 1e-10 - (torch.rand_like(weights) + 1e-10).log()
    return (weights / noise).argmax(dim=-1)
