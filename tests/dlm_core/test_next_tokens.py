"""Sampling from left to right: the chain rule's own law, and the tokens of a loop that keeps nothing."""

import itertools
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dlm_core.models.attention import AttentionMask
from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.transformer import Denoiser
from dlm_core.noise import Stream, hash_uniform
from dlm_core.samplers.next_tokens import sample_next_tokens
from dlm_core.samplers.proposal import Proposal, draw
from tests.support.sampling import follows

FIRST, MASK, LENGTH = 0, 3, 3
CAUSAL = AttentionMask("causal")


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@cache
def model(mask: int | None = MASK) -> Denoiser:
    """Three tokens and, if it has one, a mask; far from uniform."""
    a = Architecture(d_model=16, num_layers=2, num_heads=2, d_ff=32, init="normal", init_std=0.7)
    made = Denoiser(ModelConfig(a, 4 if mask is not None else 3, mask))
    made.init_weights(1)
    return made.double().eval()


def fill(xt: torch.Tensor, proposal: Proposal | None = None, denoiser: Denoiser | None = None, **options):
    first = torch.full((len(xt),), FIRST)
    settings = {"start": 0, "first_token_ids": first, "mask_token_id": MASK, "noise_seed": 5} | options
    return sample_next_tokens(denoiser or model(), xt, proposal or Proposal(), **settings)


def law(temperature: float = 1.0, prompt: tuple[int, ...] = ()) -> dict[tuple[int, ...], float]:
    """Of all sequences, by products of conditionals."""
    found = {}
    for rest in itertools.product(range(3), repeat=LENGTH - len(prompt)):
        row = (*prompt, *rest)
        logits = model()(torch.tensor([[FIRST, *row[:-1]]]), mask=CAUSAL) / temperature
        steps = logits.softmax(-1)[range(LENGTH), list(row)]
        found[row] = float(steps[len(prompt) :].prod())
    return found


@pytest.mark.parametrize(("temperature", "prompt"), [(1.0, ()), (0.5, ()), (1.0, (2,))])
def test_rows_follow_the_chain_of_conditionals(temperature, prompt):
    xt = torch.full((10_000, LENGTH), MASK)
    xt[:, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
    expected = law(temperature, prompt)
    assert sum(expected.values()) == pytest.approx(1.0)
    filled = fill(xt, Proposal(temperature), start=len(prompt))
    assert follows(filled.x0, expected)
    assert (filled.nfe == LENGTH - len(prompt)).all()
    assert filled.num_passes == LENGTH - len(prompt)
    assert not follows(filled.x0, law(0.7, prompt))


@pytest.mark.parametrize("mask", [MASK, None])
def test_the_cache_changes_no_token(mask):
    """A model without a row for the mask is never shown one."""
    xt = torch.tensor([[1, 2, 0, 2], [0, 0, 1, 1], [2, 1, 0, 0]])
    xt = torch.cat([xt, torch.full((3, 9), MASK)], dim=1)
    ids = torch.tensor([4, 9, 2])
    filled = fill(xt, denoiser=model(mask), start=4, sample_ids=ids, keep_frames=True)
    for row, sample_id in enumerate(ids.tolist()):
        tokens = [FIRST, *xt[row, :4].tolist()]
        for place in range(4, 13):
            logits = model(mask)(torch.tensor([tokens]), mask=CAUSAL)[-1:]
            tokens.append(
                int(draw(Proposal(), logits, hash_uniform(5, Stream.CATEGORICAL, sample_id, place, 0)[None]).x0)
            )
        assert filled.x0[row].tolist() == tokens[1:]
    assert torch.equal(filled.frames[0], xt)
    for number, frame in enumerate(filled.frames):
        assert torch.equal(frame[:, : 4 + number], filled.x0[:, : 4 + number])
        assert (frame[:, 4 + number :] == MASK).all()


def test_a_row_ends_with_its_first_end_and_costs_no_more():
    xt = torch.full((40, 12), MASK)
    ends = fill(xt, Proposal(5.0), eos_token_id=1, keep_frames=True)
    goes_on = fill(xt, Proposal(5.0))
    assert ends.num_passes == int(ends.nfe.max()) == len(ends.is_busy)
    for row in range(40):
        tokens = goes_on.x0[row].tolist()
        end = tokens.index(1) + 1 if 1 in tokens else 12
        assert ends.x0[row].tolist() == tokens[:end] + [1] * (12 - end)
        assert ends.nfe[row] == end
        assert sum(bool(busy[row]) for busy in ends.is_busy) == end
    assert len(ends.nfe.unique()) > 2


def test_no_pass_is_made_once_all_rows_have_ended():
    filled = fill(
        torch.full((5, 12), MASK),
        eos_token_id=2,
        change=lambda logits, places: torch.eye(3, 4)[2] * logits.new_full((5, 1), 1e4),
    )
    assert filled.num_passes == 1
    assert filled.x0.unique().tolist() == [2]


class _Reads(TorchDispatchMode):
    """Counts the numbers that the host reads: on a device it would wait for each."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_looks_once_a_pass_whether_all_have_ended():
    """Of an end that never comes, less what it reads without one."""
    found = []
    for eos in (None, 1):
        with _Reads() as reads:
            filled = fill(torch.full((3, 8), MASK), Proposal(suppressed=(1,)), eos_token_id=eos)
        assert filled.num_passes == 8
        found.append(reads.count)
    assert found[1] - found[0] == 8


def test_passes_are_heard_of_and_logits_changed_by_place():
    heard, asked = [], []

    def change(logits, places):
        asked.append(places.tolist())
        return logits

    filled = fill(torch.full((2, 3), MASK), on_pass=lambda n, rows: heard.append((n, rows.clone())), change=change)
    assert [n for n, _ in heard] == [1, 2, 3]
    assert torch.equal(heard[-1][1], filled.x0)
    assert asked == [[0, 3], [1, 4], [2, 5]]


def test_rows_that_are_full_cost_nothing():
    xt = torch.tensor([[0, 1, 2]])
    filled = fill(xt, start=3)
    assert (filled.num_passes, filled.nfe.tolist(), filled.x0.tolist()) == (0, [0], xt.tolist())


@pytest.mark.parametrize(
    ("row", "start"), [([MASK, 1, MASK], 1), ([1, MASK, 1], 1), ([1, 1, MASK], 1), ([1, 1, 1], 4), ([1, 1, 1], -1)]
)
def test_rows_that_are_no_prompt_with_masks_behind_it_are_refused(row, start):
    with pytest.raises(ValueError, match=rf"a row is filled from position {start} on"):
        fill(torch.tensor([row]), start=start)


def test_logits_that_give_no_distribution_raise():
    with pytest.raises(ValueError, match="hold nan or inf"):
        fill(torch.full((1, 2), MASK), change=lambda logits, places: logits * float("nan"))
