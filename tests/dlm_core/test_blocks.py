"""Rows cut into blocks: counts, lengths and values laid over tokens, against division by hand."""

import pytest
import torch

from dlm_core.blocks import block_length, num_blocks, per_token

DIVISORS = [(seq_len, part) for seq_len in (1, 6, 7, 12) for part in range(1, seq_len + 1) if seq_len % part == 0]


@pytest.mark.parametrize(("seq_len", "block_size"), DIVISORS)
def test_num_blocks_and_block_length_of_a_divisor_undo_each_other(seq_len, block_size):
    count = num_blocks(seq_len, block_size)
    assert count * block_size == seq_len
    assert block_length(count, seq_len) == block_size


@pytest.mark.parametrize("block_size", [-4, -1, 0, 5, 8, 13, 24])
def test_num_blocks_of_no_divisor_raises(block_size):
    with pytest.raises(ValueError, match=rf"block_size is {block_size}; .* 12 tokens"):
        num_blocks(12, block_size)


@pytest.mark.parametrize("seq_len", [0, -4])
def test_num_blocks_of_an_empty_row_raises(seq_len):
    with pytest.raises(ValueError, match=f"row of {seq_len} tokens"):
        num_blocks(seq_len, 2)


@pytest.mark.parametrize("num_groups", [-4, -1, 0, 5, 8, 13, 24])
def test_block_length_of_no_divisor_raises(num_groups):
    with pytest.raises(ValueError, match=rf"^{num_groups} blocks .* 12 tokens"):
        block_length(num_groups, 12)


@pytest.mark.parametrize(("seq_len", "num_groups"), DIVISORS)
def test_per_token_gives_every_token_the_value_of_its_block(seq_len, num_groups):
    values = torch.arange(3 * num_groups, dtype=torch.float64).view(3, num_groups)
    laid = per_token(values, seq_len)
    assert laid.dtype == values.dtype
    size = seq_len // num_groups
    assert laid.tolist() == [[float(row[place // size]) for place in range(seq_len)] for row in values]


def test_per_token_of_other_blocks_than_a_divisor_raises():
    with pytest.raises(ValueError, match=r"^5 blocks .* 12 tokens"):
        per_token(torch.zeros(2, 5), 12)
