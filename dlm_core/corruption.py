"""The forward process of a batch: sampled times, then noised tokens.

Every draw is addressed by (noise_seed, stream, step, sample id, position); times by (noise_seed, stream, step, place).

What lives here: q(xt | x0) as draws.  What must not: the hash (noise.py), probabilities of tokens (kernels.py).

Shapes: B rows, L seq_len, K groups of equal length in a row: 1 where a row has one time, L / block_size blocks where
each block has its own (blocks.py).
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.blocks import block_length, per_token
from dlm_core.kernels import Kernel
from dlm_core.noise import Stream, hash_event, hash_integer, hash_uniform, hash_words, stratified_uniform


def sample_times(
    noise_seed: int, step: int, num_places: int, t_min: float, *, shared_offset: bool = True
) -> Float[Tensor, " n"]:
    """Times t in [t_min, 1) for every place of the *global* batch, one a stratum:  t_min + (1 - t_min) * u.

    A place is a row; or a block, with num_places = rows * blocks and ``.view(rows, blocks)``, as in BD3-LM (arXiv
    2503.09573); or a document, indexed by the global number of each token's document.  Raises ValueError
    unless 0 <= t_min < 1.
    """
    if not 0.0 <= t_min < 1.0:
        raise ValueError(f"t_min is {t_min}; it must lie in [0, 1)")
    return t_min + (1.0 - t_min) * stratified_uniform(noise_seed, step, num_places, shared_offset=shared_offset)


def check_tokens(x0: Int[Tensor, "B L"], vocab_size: int, mask_token_id: int) -> None:
    """Raise ValueError if the mask id lies outside the vocabulary or in x0, or if a token does (the first is named)."""
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"mask_token_id is {mask_token_id}; the vocabulary has the ids 0..{vocab_size - 1}")
    _check_inside(x0, vocab_size)
    _check_clean(x0, mask_token_id)


def _check_inside(x0: Tensor, vocab_size: int) -> None:
    outside = (x0 < 0) | (x0 >= vocab_size)
    if outside.any():
        row, place = outside.nonzero()[0].tolist()
        raise ValueError(f"x0[{row}, {place}] is {int(x0[row, place])}; the vocabulary has the ids 0..{vocab_size - 1}")


def _check_clean(x0: Tensor, mask_token_id: int) -> None:
    if mask_token_id < 0:
        raise ValueError(f"mask_token_id is {mask_token_id}; ids begin at 0")
    found = x0 == mask_token_id
    if found.any():
        row, place = found.nonzero()[0].tolist()
        raise ValueError(
            f"x0[{row}, {place}] is the mask token {mask_token_id}; clean text must not hold it. "
            "Choose another mask_token_id, or give that position another id"
        )


def maskable_positions(
    valid: Bool[Tensor, "B L"], prompt_lengths: Int[Tensor, " B"] | None = None, *, keep_first: bool = False
) -> Bool[Tensor, "B L"]:
    """Positions that may be noised: the valid ones (no padding), after the prompt, and not the first if it is kept.

    keep_first: the ignore_bos of BD3-LM (arXiv 2503.09573), and what target_offset 1 needs, where nothing predicts
    position 0.  Raises ValueError for a prompt longer than the row.
    """
    num_rows, seq_len = valid.shape
    if prompt_lengths is None:
        prompt_lengths = torch.zeros(num_rows, dtype=torch.int64, device=valid.device)
    if ((prompt_lengths < 0) | (prompt_lengths > seq_len)).any():
        raise ValueError(f"prompt_lengths are {prompt_lengths.tolist()}; each must lie in 0..{seq_len}")
    first = prompt_lengths.clamp(min=int(keep_first))
    return valid & (torch.arange(seq_len, device=valid.device) >= first[:, None])


def _check_probability(prob: Tensor) -> None:
    outside = ~((prob >= 0) & (prob <= 1))  # catches nan too
    if outside.any():
        raise ValueError(f"a mask probability is {float(prob[outside][0])}; it must lie in [0, 1]")


def _check_rows(num_rows: int, sample_ids: Tensor, **columns: Tensor | None) -> None:
    if len(sample_ids) != num_rows:
        raise ValueError(f"there are {len(sample_ids)} sample_ids for {num_rows} rows; wanted one each")
    for name, value in columns.items():
        if value is not None and (value.ndim != 2 or len(value) != num_rows):
            raise ValueError(
                f"{name} has the shape {tuple(value.shape)}; wanted two axes, {num_rows} rows by groups or tokens: "
                "what a row shares has the shape [rows, 1]"
            )


def noise_positions(
    noise_prob: Float[Tensor, "B K"],
    sample_ids: Int[Tensor, " B"],
    seq_len: int,
    *,
    noise_seed: int,
    step: int,
    maskable: Bool[Tensor, "B L"] | None = None,
) -> Bool[Tensor, "B L"]:
    """Which tokens the forward process noises: each by itself, with the probability of its group.

    The device is that of sample_ids.  The same addresses decide for every kernel and every grouping.  Raises ValueError
    for a probability outside [0, 1], if K doesn't divide L, or for another number of rows.
    """
    _check_rows(len(sample_ids), sample_ids, mask_prob=noise_prob, maskable=maskable)
    _check_probability(noise_prob)
    positions = torch.arange(seq_len, device=sample_ids.device)
    address = hash_words(noise_seed, Stream.MASK, step, sample_ids)
    chosen = hash_event(per_token(noise_prob, seq_len), address[:, None], positions)
    return chosen if maskable is None else chosen & maskable


def mask_tokens(
    x0: Int[Tensor, "B L"],
    mask_prob: Float[Tensor, "B K"],
    sample_ids: Int[Tensor, " B"],
    *,
    noise_seed: int,
    step: int,
    mask_token_id: int,
    maskable: Bool[Tensor, "B L"] | None = None,
) -> Int[Tensor, "B L"]:
    """Draw xt ~ q(xt | x0) of the absorbing kernel: each token masked with the mask_prob of its group.

    LLaDA (arXiv 2502.09992) algorithm 1; with a time a block, BD3-LM (2503.09573).  Positions where ``maskable`` is
    False stay as they are.  Raises ValueError if x0 holds the mask token or K doesn't divide L.
    """
    _check_clean(x0, mask_token_id)
    _check_rows(len(x0), sample_ids)
    is_masked = noise_positions(
        mask_prob, sample_ids.to(x0.device), x0.shape[1], noise_seed=noise_seed, step=step, maskable=maskable
    )
    return torch.where(is_masked, mask_token_id, x0)


def corrupt_tokens(
    x0: Int[Tensor, "B L"],
    noise_prob: Float[Tensor, "B K"],
    sample_ids: Int[Tensor, " B"],
    kernel: Kernel,
    *,
    noise_seed: int,
    step: int,
    maskable: Bool[Tensor, "B L"] | None = None,
) -> Int[Tensor, "B L"]:
    """Draw xt ~ q(xt | x0) of any kernel: each token noised with the noise_prob 1 - alpha_t of its group.

    A noised token is drawn anew from the kernel's stationary distribution: the mask with ``mask_share``, else a real
    token, each equally likely.  With the absorbing kernel it equals ``mask_tokens``.  D3PM (arXiv 2107.03006) eq. 3.
    Raises ValueError for tokens outside the vocabulary or equal to the mask, or if K doesn't divide L.
    """
    mask_token_id = kernel.mask_token_id
    if mask_token_id is None:
        _check_inside(x0, kernel.vocab_size)
    else:
        check_tokens(x0, kernel.vocab_size, mask_token_id)
    _check_rows(len(x0), sample_ids)
    sample_ids = sample_ids.to(x0.device)
    noised = noise_positions(noise_prob, sample_ids, x0.shape[1], noise_seed=noise_seed, step=step, maskable=maskable)
    address = hash_words(noise_seed, Stream.REPLACEMENT, step, sample_ids)[:, None]
    positions = torch.arange(x0.shape[1], device=x0.device)
    drawn = hash_integer(kernel.num_real_tokens, address, positions, 0)
    if mask_token_id is not None:
        drawn = drawn + (drawn >= mask_token_id)  # real tokens are numbered past the mask
        to_mask = hash_event(torch.tensor(kernel.mask_share, dtype=torch.float64), address, positions, 1)
        drawn = torch.where(to_mask, mask_token_id, drawn)
    return torch.where(noised, drawn.to(x0.dtype), x0)


def exact_count_positions(
    num_masked: Int[Tensor, "B K"],
    sample_ids: Int[Tensor, " B"],
    maskable: Bool[Tensor, "B L"],
    *,
    noise_seed: int,
    step: int,
) -> Bool[Tensor, "B L"]:
    """Exactly ``num_masked`` of the maskable positions of each group, every subset of the group equally likely.

    The device is that of maskable.  Raises ValueError if K doesn't divide L, or more positions are asked for than may
    be masked.
    """
    num_rows, seq_len = maskable.shape
    _check_rows(num_rows, sample_ids, num_masked=num_masked)
    grouped = (num_rows, num_masked.shape[1], block_length(num_masked.shape[1], seq_len))
    num_masked, available = num_masked.to(maskable.device), maskable.view(grouped).sum(dim=-1)
    if ((num_masked < 0) | (num_masked > available)).any():
        raise ValueError(
            f"num_masked is {num_masked.tolist()}, but {available.tolist()} positions may be masked; ask for no more"
        )
    positions = torch.arange(seq_len, device=maskable.device)
    address = hash_words(noise_seed, Stream.EXACT_MASK, step, sample_ids.to(maskable.device))
    last = torch.iinfo(torch.int64).max
    hashes = hash_words(address[:, None], positions).masked_fill(~maskable, last).view(grouped)
    rank = hashes.argsort(dim=-1, stable=True).argsort(dim=-1)
    return (rank < num_masked[..., None]).view(num_rows, seq_len) & maskable


def mask_exact_count(
    x0: Int[Tensor, "B L"],
    num_masked: Int[Tensor, "B K"],
    sample_ids: Int[Tensor, " B"],
    *,
    noise_seed: int,
    step: int,
    mask_token_id: int,
    maskable: Bool[Tensor, "B L"],
) -> Int[Tensor, "B L"]:
    """Mask exactly ``num_masked`` maskable positions of each group: the k-form.

    RADD (arXiv 2406.03736) k-DCE, LLaDA (2502.09992) algorithm 3.  Raises ValueError if x0 holds the mask token, and as
    ``exact_count_positions`` does.
    """
    _check_clean(x0, mask_token_id)
    is_masked = exact_count_positions(num_masked, sample_ids, maskable, noise_seed=noise_seed, step=step)
    return torch.where(is_masked, mask_token_id, x0)


def mask_within(
    x0: Int[Tensor, "B L"],
    mask_prob: Float[Tensor, "B K"],
    sample_ids: Int[Tensor, " B"],
    *,
    low: float,
    high: float,
    noise_seed: int,
    step: int,
    mask_token_id: int,
    maskable: Bool[Tensor, "B L"],
) -> Int[Tensor, "B L"]:
    """Draw masks given that every group's masked *fraction* lies in [low, high].

    The resampling of BD3-LM (arXiv 2503.09573) redraws a block until its fraction is inside; the law of the result is
    a binomial count, truncated, with every subset of that count equally likely, and so it is drawn here in one go.  A
    bound of 0 or 1 binds nothing.  Raises ValueError unless 0 <= low <= high <= 1, where no count of a group has such
    a fraction, and where mask_prob never gives one.
    """
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"the masked fraction is to lie in [{low}, {high}]; wanted 0 <= low <= high <= 1")
    _check_rows(len(x0), sample_ids, mask_prob=mask_prob, maskable=maskable)
    _check_probability(mask_prob)
    num_rows, num_groups = mask_prob.shape
    if num_rows == 0:
        return x0.clone()
    sizes = maskable.view(num_rows, num_groups, block_length(num_groups, x0.shape[1])).sum(dim=-1).cpu()
    num_masked = _truncated_binomial(
        sizes, mask_prob.cpu().double(), low, high, _group_uniforms(noise_seed, step, sample_ids.cpu(), num_groups)
    )
    return mask_exact_count(
        x0, num_masked, sample_ids, noise_seed=noise_seed, step=step, mask_token_id=mask_token_id, maskable=maskable
    )


def _group_uniforms(noise_seed: int, step: int, sample_ids: Tensor, num_groups: int) -> Tensor:
    return hash_uniform(hash_words(noise_seed, Stream.WITHIN, step, sample_ids)[:, None], torch.arange(num_groups))


def _truncated_binomial(
    sizes: Int[Tensor, "B K"], prob: Float[Tensor, "B K"], low: float, high: float, u: Float[Tensor, "B K"]
) -> Int[Tensor, "B K"]:
    """Binomial(size, prob) given low <= count / size <= high, by inverting its distribution function at u."""
    count = torch.arange(int(sizes.max()) + 1, dtype=torch.float64)
    n, p = sizes[..., None].double(), prob[..., None]
    fraction = count / n.clamp(min=1)
    inside = (count <= n) & (((low <= fraction) & (fraction <= high)) | (n == 0))
    empty = ~inside.any(dim=-1)
    if empty.any():
        raise ValueError(
            f"no count of {int(sizes[empty][0])} tokens has a masked fraction in [{low}, {high}]; widen the interval"
        )
    log_mass = torch.special.xlogy(count, p) + torch.special.xlogy(n - count, 1 - p)
    log_mass = log_mass - torch.lgamma(count + 1) - torch.lgamma(n - count + 1)
    log_mass = torch.where(inside, log_mass, -torch.inf)
    highest = log_mass.amax(dim=-1, keepdim=True)
    if (highest == -torch.inf).any():
        bad = float(prob[highest[..., 0] == -torch.inf][0])
        raise ValueError(f"mask_prob {bad} never masks a fraction in [{low}, {high}]; it must lie inside")
    mass = (log_mass - highest).exp()  # relative to the likeliest count, so that far tails don't underflow
    total = mass.sum(dim=-1)
    # the last of equal sums is taken with side="right", so that a count of mass 0 is never drawn
    drawn = torch.searchsorted(mass.cumsum(dim=-1), (u * total)[..., None], right=True).squeeze(-1)
    return torch.minimum(drawn, torch.where(mass > 0, count, -math.inf).amax(dim=-1).to(torch.int64))


def complement_mask(
    x0: Int[Tensor, "B L"], xt: Int[Tensor, "B L"], mask_token_id: int, maskable: Bool[Tensor, "B L"]
) -> Int[Tensor, "B L"]:
    """Mask exactly the maskable tokens that xt shows, and show those it masks: the complementary mask of LLaDA2.0.

    Both together predict every maskable token once (arXiv 2512.15745, supervised fine-tuning).
    """
    return torch.where(maskable & (xt != mask_token_id), mask_token_id, x0)
