"""Who may attend to whom: one predicate a mask family, the single source of truth for every backend.

A predicate maps (batch row b, head h, query position q, key position k), integer tensors that broadcast, to True where
the query may attend to the key: the signature of FlexAttention's ``mask_mod``.  ``dense_mask`` tabulates one.

What lives here: predicates.  What must not: attention itself, which positions are noised (corruption.py).

In the drawings rows are queries, columns are keys, ``#`` may attend and ``.`` may not.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dlm_core.blocks import num_blocks
from dlm_core.noise import Stream, hash_event, hash_words

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(b, h, q, k), integer tensors that broadcast -> True where q may attend to k."""


def full() -> Predicate:
    """Everything: masked diffusion (MDLM, arXiv 2406.07524; LLaDA, 2502.09992; Dream, 2508.15487)."""
    return lambda b, h, q, k: (q >= 0) & (k >= 0)


def causal() -> Predicate:
    """Keys up to the query itself: autoregressive models (Transformer, arXiv 1706.03762, section 3.2.3).

    ::

        # . . .
        # # . .
        # # # .
        # # # #
    """
    return lambda b, h, q, k: q >= k


def annealed(ratio: float, noise_seed: int, step: int) -> Predicate:
    """Causal OR Bernoulli(ratio), one draw an entry and a step, shared by the batch and the heads.

    DiffuLLaMA (arXiv 2410.17891), attention mask annealing: ratio 0 is causal, ratio 1 is full; ``anneal_ratio`` in
    ar_init.py gives it for a step.  The draw is addressed by (noise_seed, stream, step, q, k).  Raises ValueError for
    a ratio outside [0, 1].
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"the annealing ratio is {ratio}; it must lie in [0, 1]")
    prob, address = torch.tensor(ratio, dtype=torch.float64), hash_words(noise_seed, Stream.ATTENTION, step)
    return lambda b, h, q, k: (q >= k) | hash_event(prob, address, q, k)


def same_document(doc_ids: Int[Tensor, "B L"]) -> Predicate:
    """Only within a document of a packed row (LLaDA2.0, arXiv 2512.15745, eq. 4).

    ::

        # # . .      documents 0 0 1 1
        # # . .
        . . # #
        . . # #
    """
    return lambda b, h, q, k: doc_ids[b, q] == doc_ids[b, k]


def block_causal(block_size: int) -> Predicate:
    """Every key of the query's own block and of earlier ones (M_BC of BD3-LM, arXiv 2503.09573).

    ::

        # # . .      block_size 2
        # # . .
        # # # #
        # # # #

    Raises ValueError for a block_size below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
    return lambda b, h, q, k: q // block_size >= k // block_size


def block_diffusion(seq_len: int, block_size: int) -> Predicate:
    """The mask of one training pass over [xt ; x0], length 2 seq_len, the noisy half first.

    A noisy query sees its own noisy block and the clean tokens of earlier blocks; a clean query sees clean tokens of
    its own and earlier blocks; no clean query sees a noisy key.  BD3-LM (arXiv 2503.09573),
    M_BD | M_OBC | M_BC; seq_len^2 + seq_len block_size entries are True.

    ::

        # # . . | . . . .      seq_len 4, block_size 2
        # # . . | . . . .
        . . # # | # # . .
        . . # # | # # . .
        --------+--------
        . . . . | # # . .
        . . . . | # # . .
        . . . . | # # # #
        . . . . | # # # #

    Raises ValueError unless block_size divides seq_len.
    """
    num_blocks(seq_len, block_size)
    return lambda b, h, q, k: _block_diffusion(q, k, seq_len, block_size)


def _block_diffusion(q: Tensor, k: Tensor, seq_len: int, block_size: int) -> Tensor:
    q_clean, k_clean = q >= seq_len, k >= seq_len
    q_block, k_block = (q % seq_len) // block_size, (k % seq_len) // block_size
    own_noisy = ~q_clean & ~k_clean & (q_block == k_block)
    earlier_clean = ~q_clean & k_clean & (q_block > k_block)
    clean_causal = q_clean & k_clean & (q_block >= k_block)
    return own_noisy | earlier_clean | clean_causal


def on_both_halves(predicate: Predicate, seq_len: int) -> Predicate:
    """A predicate of [L, L] carried to [xt ; x0]: both halves keep their positions 0..seq_len - 1."""
    return lambda b, h, q, k: predicate(b, h, q % seq_len, k % seq_len)


def both(first: Predicate, second: Predicate) -> Predicate:
    """True where both are.

    block_diffusion and on_both_halves(same_document) make the mask of packed rows: LLaDA2.0 (arXiv 2512.15745) eq. 3.
    """
    return lambda b, h, q, k: first(b, h, q, k) & second(b, h, q, k)


def dense_mask(
    predicate: Predicate, num_rows: int, length: int, device: str | torch.device = "cpu"
) -> Bool[Tensor, "B q k"]:
    """The predicate at every (query, key) of every row (head 0), for backends that take a mask as a tensor."""
    b = torch.arange(num_rows, device=device)[:, None, None]
    q = torch.arange(length, device=device)[:, None]
    k = torch.arange(length, device=device)
    return predicate(b, torch.zeros_like(b), q, k).expand(num_rows, length, length)
