"""The outer loop: a row is filled window by window from left to right, each by the one loop of all samplers.

LLaDA (arXiv 2502.09992) calls it semi-autoregressive; BD3-LM (2503.09573) is made for it.  With windows as long as the
row it is the one loop.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dlm_core.samplers.contexts import Context
from dlm_core.samplers.loop import Change, OnPass, Rule, Sampled, sample
from dlm_core.samplers.proposal import Proposal


def sample_blocks(
    context: Context,
    xt: Int[Tensor, "B L"],
    rule: Rule,
    proposal: Proposal,
    *,
    block_size: int,
    mask_token_id: int,
    noise_seed: int,
    start: int = 0,
    sample_ids: Int[Tensor, " B"] | None = None,
    eos_token_id: int | None = None,
    change: Change | None = None,
    on_pass: OnPass | None = None,
    keep_frames: bool = False,
) -> Sampled:
    """Fill the masks of xt behind ``start`` in windows of block_size, with the rule anew in each (arXiv 2502.09992).

    With ``eos_token_id`` a row ends with the first window that has drawn it: what follows the end is filled with it,
    and once all rows have ended no further pass is made.  A row counts passes up to its last window with a mask or its
    end, whatever others need.  ``on_pass`` hears of the passes that fill, not of those that take in what is filled.
    Rows of unlike lengths lie in xt as the ``padding`` of the context says.
    Raises ValueError unless block_size divides what follows start, for a mask before it, and for a rule that the
    context refuses.
    """
    seq_len = xt.shape[1]
    if block_size < 1 or not 0 <= start <= seq_len or (seq_len - start) % block_size:
        raise ValueError(
            f"block_size is {block_size}; it must divide the {seq_len - start} tokens behind the first {start} of a row"
        )
    context.check(rule)
    xt = xt.clone(memory_format=torch.contiguous_format)
    is_mask = xt == mask_token_id
    if is_mask[:, :start].any():
        raise ValueError(f"a mask stands before position {start}, where nothing is filled")
    behind = torch.where(is_mask.cpu(), torch.arange(1, seq_len + 1), 0).sort(dim=1).values[:, -1:].sum(dim=1)
    stop, ends = max(behind.tolist(), default=0), behind.to(xt.device)  # behind the last mask
    is_over = ends == 0
    num_passes = context.begin(xt, start) if stop else 0
    before = torch.zeros(len(xt), dtype=torch.int64) if context.padding is None else context.padding.before
    nfe = torch.where(is_over | (before == start).to(xt.device), 0, num_passes)
    frames = [xt.clone()] if keep_frames else []
    is_busy: list[Tensor] = []
    for left in range(start, stop, block_size):
        right = left + block_size
        done = sample(
            context.window(xt, left, right),
            xt[:, left:right],
            rule,
            proposal,
            mask_token_id=mask_token_id,
            noise_seed=noise_seed,
            sample_ids=sample_ids,
            first_position=left - before,
            keeps_rows=context.keeps_rows,
            change=None if change is None else _in_row(change, left, block_size, seq_len),
            on_pass=None if on_pass is None else _of_row(on_pass, xt, left, right, num_passes),
            keep_frames=keep_frames,
        )
        frames += [torch.cat([xt[:, :left], frame, xt[:, right:]], dim=1) for frame in done.frames[1:]]
        is_busy += [busy & ~is_over for busy in done.is_busy]
        xt[:, left:right] = done.x0
        num_passes += done.num_passes
        nfe += torch.where(is_over, 0, done.nfe * context.branches)
        is_over |= ends <= right
        if eos_token_id is not None:
            is_over |= _end(xt, is_mask, left, right, eos_token_id)
            if keep_frames:
                frames[-1] = xt.clone()
            if is_over.all():
                break
        if right < stop:
            taken = context.finish(xt, left, right)
            num_passes += taken
            nfe += torch.where(is_over, 0, taken)
    return Sampled(xt, nfe, num_passes, frames, is_busy)


def _in_row(change: Change, left: int, width: int, seq_len: int) -> Change:
    """A change of logits that is told places of the rows, for a loop that knows those of the window."""
    return lambda logits, places: change(logits, places // width * seq_len + places % width + left)


def _of_row(on_pass: OnPass, xt: Int[Tensor, "B L"], left: int, right: int, passed: int) -> OnPass:
    """The same for one that looks at whole rows, and counts all passes."""

    def look(number: int, window: Tensor) -> None:
        on_pass(passed + number, torch.cat([xt[:, :left], window, xt[:, right:]], dim=1))

    return look


def _end(
    xt: Int[Tensor, "B L"],
    is_mask: Bool[Tensor, "B L"],
    left: int,
    right: int,
    eos_token_id: int,
) -> Bool[Tensor, " B"]:
    """Write ends behind the first drawn one of each row; which rows end in this window."""
    is_end = torch.zeros_like(is_mask)
    is_end[:, left:right] = (xt[:, left:right] == eos_token_id) & is_mask[:, left:right]
    is_behind = (is_end.cumsum(dim=1) > 0) & is_mask
    xt.masked_fill_(is_behind, eos_token_id)
    return is_end.any(dim=1)
