"""Sampling of a next-token model: from left to right, one token a pass, with keys and values kept.  Exact.

The same draws, addressed in the same way, as those of masked diffusion: a model of either kind gives a row the same
tokens in any batch.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from dlm_core.cross_entropy import exclude_token
from dlm_core.models.attention import AttentionMask
from dlm_core.models.transformer import Denoiser
from dlm_core.noise import Stream
from dlm_core.samplers.loop import Canvas, Change, OnPass, Sampled
from dlm_core.samplers.padding import Padding
from dlm_core.samplers.proposal import Proposal, draw


def sample_next_tokens(
    model: Denoiser,
    xt: Int[Tensor, "B L"],
    proposal: Proposal,
    *,
    start: int,
    first_token_ids: Int[Tensor, " B"],
    mask_token_id: int,
    noise_seed: int,
    sample_ids: Int[Tensor, " B"] | None = None,
    before: Int[Tensor, " B"] | None = None,
    eos_token_id: int | None = None,
    change: Change | None = None,
    on_pass: OnPass | None = None,
    keep_frames: bool = False,
) -> Sampled:
    """Fill xt from position ``start`` on, all of which is masked: L - start passes, the first of the whole prompt.

    ``first_token_ids`` stand before the rows, so that their first tokens are predicted too.  Rows of unlike lengths end
    together: ``before`` is the number of tokens of padding before each, of which it sees nothing.  With
    ``eos_token_id`` a row ends with it: what follows is filled with it, at no cost, and the host looks after each pass
    whether all have ended.  Raises ValueError for a mask before start, a token behind it, and logits that give no
    distribution.
    """
    num_rows, seq_len = xt.shape
    is_mask = xt == mask_token_id
    if not 0 <= start <= seq_len or is_mask[:, :start].any() or not is_mask[:, start:].all():
        raise ValueError(f"a row is filled from position {start} on; it must hold no mask before and masks alone there")
    ids = torch.arange(num_rows) if sample_ids is None else sample_ids.cpu()
    shift = torch.zeros(num_rows, dtype=torch.int64) if before is None else before
    canvas = Canvas(xt, mask_token_id, noise_seed, ids, first_position=-shift)
    padding = None if before is None else Padding.around(before, seq_len + 1 - before, seq_len + 1, xt.device)
    nfe = torch.zeros(num_rows, dtype=torch.int64, device=xt.device)
    is_usable = torch.ones((), dtype=torch.bool, device=xt.device)
    has_ended = torch.zeros(num_rows, dtype=torch.bool, device=xt.device)
    frames = [canvas.xt.clone()] if keep_frames else []
    is_busy: list[Tensor] = []
    first = first_token_ids[:, None]
    seen = torch.cat([first, xt[:, :start]], dim=1).scatter(1, shift.to(xt.device)[:, None], first)
    cache, places, causal = model.make_cache(num_rows, seq_len), canvas.rows * seq_len, AttentionMask("causal")
    for position in range(start, seq_len):
        last = (canvas.rows + 1) * seen.shape[1] - 1
        past = cache.length
        how = {"mask": causal} if padding is None else padding.seen(causal, past, past + seen.shape[1])
        logits = model(seen, last, cache=cache, **how)
        assert isinstance(logits, Tensor)
        cache.advance(seen.shape[1])
        if mask_token_id < logits.shape[1]:  # a model that is never shown a mask may lack it
            logits = exclude_token(logits, mask_token_id)
        logits = logits if change is None else change(logits, places + position)
        found = draw(proposal, logits, canvas.draws(places + position, 0, Stream.CATEGORICAL))
        is_usable &= found.is_usable.all()
        drawn = found.x0
        if eos_token_id is not None:
            drawn = torch.where(has_ended, eos_token_id, drawn)
        canvas.xt[:, position] = drawn
        nfe += ~has_ended
        is_busy.append(~has_ended)
        is_done = False
        if eos_token_id is not None:
            has_ended = has_ended | (drawn == eos_token_id)
            is_done = bool(has_ended.all())  # waits for the device
            if is_done:
                canvas.xt[:, position:] = eos_token_id
        if keep_frames:
            frames.append(canvas.xt.clone())
        if on_pass is not None:
            on_pass(len(is_busy), canvas.xt)
        if is_done:
            break
        seen = drawn[:, None]
    if not is_usable:
        raise ValueError(
            "the denoiser's logits hold nan or inf, or are -inf for every id that is not suppressed; no id can be drawn"
        )
    return Sampled(canvas.xt, nfe, len(is_busy), frames, is_busy if keep_frames else [])
