"""Rotary positions: the rotation, the share of a head that turns, and the three ways to stretch."""

import cmath
import dataclasses
import itertools
import math

import pytest
import torch

from dlm_core.models.config import Architecture, RopeScaling
from dlm_core.models.rope import RopeTables, apply_rope, rope_frequencies, rope_tables

ATOL = 1e-12  # float64 rotations of numbers of order 1

LLAMA3 = RopeScaling("llama3", 8.0, original_seq_len=64, low_factor=1.0, high_factor=4.0)
YARN = RopeScaling("yarn", 4.0, original_seq_len=64, low_factor=1.0, high_factor=32.0)
LINEAR = RopeScaling("linear", 4.0)


def _architecture(head_dim: int = 8, **values) -> Architecture:
    return Architecture(d_model=16, num_heads=2, head_dim=head_dim, **values)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("head_dim", "base", "fraction"), [(2, 1e4, 1.0), (8, 50.0, 1.0), (8, 1e4, 0.5), (12, 9.0, 1 / 3)]
)
@pytest.mark.parametrize("positions", [[[0, 1, 2, 3, 4]], [[0, 1, 0, 1, 2], [7, 3, 3, 900, 2]]])
def test_apply_rope_equals_complex_rotation(head_dim, base, fraction, positions):
    a = _architecture(head_dim, rope_base=base, rope_fraction=fraction)
    x, half = _random(2, 3, 5, head_dim), a.rotary_dim // 2
    rotated = apply_rope(x, rope_tables(torch.tensor(positions), a))
    for row in range(2):
        for place in range(5):
            position = positions[row % len(positions)][place]
            for i in range(half):
                pair = x[row, :, place, i] + 1j * x[row, :, place, i + half]
                turned = pair * cmath.exp(1j * position * base ** (-2 * i / a.rotary_dim))
                torch.testing.assert_close(rotated[row, :, place, i], turned.real, rtol=0, atol=ATOL)
                torch.testing.assert_close(rotated[row, :, place, i + half], turned.imag, rtol=0, atol=ATOL)
    assert torch.equal(rotated[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3, YARN])
def test_scores_of_rotated_heads_depend_on_the_distance_alone(scaling):
    a = _architecture(rope_scaling=scaling)
    q, k = (_random(2, 8)[row].expand(1, 1, 9, 8) for row in range(2))
    tables = rope_tables(torch.arange(9)[None], a)
    scores = (apply_rope(q, tables) @ apply_rope(k, tables).transpose(-1, -2))[0, 0]
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=0, atol=ATOL)
    distances = torch.stack([scores[i, 0] for i in range(9)] + [scores[0, j] for j in range(1, 9)])
    assert len(set(distances.round(decimals=6).tolist())) == 17


def test_apply_rope_of_bf16_rotates_in_the_precision_of_the_tables():
    a = _architecture()
    tables = RopeTables(*(table.float() for table in rope_tables(torch.arange(100, 105)[None], a)))
    x = _random(1, 2, 5, 8).bfloat16()
    rotated = apply_rope(x, tables)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rope(x.float(), tables).bfloat16())


@pytest.mark.parametrize(
    ("head_dim", "base", "scaling"),
    [
        *itertools.product(
            [8, 64, 128], [1e4, 5e5], [LINEAR, LLAMA3, YARN, dataclasses.replace(YARN, original_seq_len=4096)]
        ),
        (8, 3.0, YARN),  # frequencies so near each other that the ramp ends behind the last
    ],
)
def test_stretched_frequencies_equal_those_of_transformers(head_dim, base, scaling):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values: dict = {"rope_type": scaling.kind, "rope_theta": base, "factor": scaling.factor}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_seq_len
    if scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low_factor, "high_freq_factor": scaling.high_factor}
    if scaling.kind == "yarn":
        values |= {"beta_slow": scaling.low_factor, "beta_fast": scaling.high_factor}
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=values)
    wanted, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu")
    a = _architecture(head_dim, rope_base=base, rope_scaling=scaling)
    found = rope_frequencies(a)
    torch.testing.assert_close(found, wanted.double(), rtol=1e-5, atol=0)
    cos, sin = rope_tables(torch.zeros(1, 1, dtype=torch.int64), a)
    assert cos[0, 0].tolist() == pytest.approx([factor] * head_dim, rel=1e-12)
    assert sin[0, 0].tolist() == [0.0] * head_dim
    assert factor == pytest.approx(0.1 * math.log(scaling.factor) + 1 if scaling.kind == "yarn" else 1.0)


def test_fast_frequencies_stay_and_slow_ones_are_divided():
    plain = rope_frequencies(_architecture(64, rope_base=1e4))
    for scaling in (LLAMA3, YARN):
        ratio = plain / rope_frequencies(_architecture(64, rope_base=1e4, rope_scaling=scaling))
        assert float(ratio[0]) == pytest.approx(1.0)
        assert float(ratio[-1]) == pytest.approx(scaling.factor)
        assert (ratio.diff() >= -1e-12).all()
    linear = plain / rope_frequencies(_architecture(64, rope_base=1e4, rope_scaling=LINEAR))
    torch.testing.assert_close(linear, torch.full_like(linear, 4.0))
