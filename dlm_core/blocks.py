"""How a row of tokens is cut into blocks of equal length."""

from jaxtyping import Float
from torch import Tensor


def num_blocks(seq_len: int, block_size: int) -> int:
    """Blocks in a row.  Raises ValueError unless both are at least 1 and block_size divides seq_len."""
    if block_size < 1 or seq_len < 1 or seq_len % block_size:
        raise ValueError(f"block_size is {block_size}; it must divide the row of {seq_len} tokens")
    return seq_len // block_size


def block_length(num_groups: int, seq_len: int) -> int:
    """Tokens of each of ``num_groups`` blocks.  Raises ValueError unless they divide seq_len."""
    if num_groups < 1 or seq_len % num_groups:
        raise ValueError(f"{num_groups} blocks don't divide a row of {seq_len} tokens; choose a block_size that does")
    return seq_len // num_groups


def per_token(values: Float[Tensor, "B K"], seq_len: int) -> Float[Tensor, "B L"]:
    """Repeat the value of each of a row's K blocks for the L / K tokens of the block.

    Raises ValueError if K doesn't divide L.
    """
    return values.repeat_interleave(block_length(values.shape[1], seq_len), dim=1)
