"""Ancestral sampling of masked diffusion: walk t from 1 to 0 and draw from the posterior q(xs | xt, x0)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.cross_entropy import Denoise, exclude_token
from dlm_core.kernels import reveal_prob
from dlm_core.noise import Stream, hash_uniform
from dlm_core.schedules import LinearSchedule


@dataclass(frozen=True)
class Sampled:
    """What a sampler returns."""

    x0: Int[Tensor, "B L"]
    nfe: int
    """Forward passes of the denoiser."""
    trajectory: list[Int[Tensor, "B L"]]
    """The sequences at the recorded steps, from all masks to the text."""


def categorical(logits: Float[Tensor, "M V"], u: Float[Tensor, " M"], temperature: float) -> Int[Tensor, " M"]:
    """Draw one id a row by inverting the cumulative distribution at u, in float64.

    float32 Gumbel noise truncates the tails and lowers the temperature (arXiv 2409.02908); temperature 0 takes
    the most likely id.  Raises ValueError for logits that give no distribution: nan, inf, or -inf everywhere.
    """
    if not logits.amax(dim=-1).isfinite().all():
        raise ValueError("the denoiser's logits hold nan or inf, or are -inf for every id; no id can be drawn")
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    targets = (u * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(1)


def sample_ancestral(
    denoise: Denoise,
    xt: Int[Tensor, "B L"],
    *,
    mask_token_id: int,
    num_steps: int,
    noise_seed: int,
    temperature: float = 1.0,
    sample_ids: Int[Tensor, " B"] | None = None,
    record_steps: frozenset[int] = frozenset(),
) -> Sampled:
    """Fill the masks of xt in ``num_steps`` steps.

    From t to s < t a masked token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t) and drawn
    from p(x0 | xt); the others stay (MDLM, arXiv 2406.07524, eq. 6).  Tokens given in xt are never changed.
    The last step has s = 0 and leaves no mask.  A step that reveals nothing costs no forward pass.
    ``sample_ids`` address the noise of the rows, 0.. by default.  Raises ValueError for a setting out of range.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 or more, and finite")
    if not record_steps <= set(range(num_steps + 1)):
        raise ValueError(f"record_steps are {sorted(record_steps)}; they must lie in 0..{num_steps}")
    schedule = LinearSchedule()
    times = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    alphas = schedule.alpha(times)
    xt = xt.clone(memory_format=torch.contiguous_format)
    rows = (torch.arange(xt.shape[0]) if sample_ids is None else sample_ids.cpu())[:, None]
    positions = torch.arange(xt.shape[1])[None, :]
    trajectory, nfe = ([xt.clone()] if 0 in record_steps else []), 0
    for step in range(num_steps):
        prob = reveal_prob(alphas[step + 1], alphas[step])
        reveal = hash_uniform(noise_seed, Stream.REVEAL, step, rows, positions)
        chosen: Bool[Tensor, "B L"] = reveal.to(xt.device) < prob
        select = (chosen & (xt == mask_token_id)).flatten().nonzero().squeeze(1)
        if len(select):
            u = hash_uniform(noise_seed, Stream.CATEGORICAL, step, rows, positions).to(xt.device).flatten()[select]
            logits = exclude_token(denoise(xt, select), mask_token_id)
            xt.view(-1)[select] = categorical(logits, u, temperature)
            nfe += 1
        if step + 1 in record_steps:
            trajectory.append(xt.clone())
    return Sampled(xt, nfe, trajectory)
