"""Caches of keys and values: approximate ones against a naive model of both states at once, rows alone and together."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch

from dlm_core.models.attention import AttentionMask, plan_attention
from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.transformer import Denoiser
from dlm_core.samplers.blocks import sample_blocks
from dlm_core.samplers.confident import Confident, Threshold
from dlm_core.samplers.contexts import Context, DualCache, ExactCache, PrefixCache
from dlm_core.samplers.loop import Pass, Predict
from dlm_core.samplers.planned import Ancestral, FirstHitting, RandomOrder
from dlm_core.samplers.proposal import Proposal
from dlm_core.samplers.quotas import EvenQuotas, ScheduleQuotas, TimedQuotas
from dlm_core.samplers.remask import PathPlanning, ReMDM
from tests.support.sampling import follows, tiny_model

BLOCK, START, SEQ_LEN = 8, 8, 24
MASK = tiny_model().config.mask_token_id


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def _rows(num_rows: int = 3) -> torch.Tensor:
    """A prompt and masks."""
    xt = torch.randint(MASK, (num_rows, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    xt[:, START:] = MASK
    return xt


def _fill(context, rule, xt, ids=None, **options):
    settings = {"block_size": BLOCK, "mask_token_id": MASK, "noise_seed": 3, "start": START, "sample_ids": ids}
    return sample_blocks(context, xt, rule, Proposal(), **(settings | options))


# What approximate caches compute


@dataclass
class _Naive(Context):
    """The row as it was at the last whole pass, beside the row as it is; the first sees itself alone.

    What a pass computes sees the old row but where it stands itself, and itself.  No cache, no positions in a window.
    """

    refresh_every: int
    offset: int
    reaches_end: bool
    keeps_rows: bool = True
    logits: list[torch.Tensor] = field(default_factory=list)

    def begin(self, xt: torch.Tensor, start: int) -> int:
        return 0

    def finish(self, xt: torch.Tensor, start: int, stop: int) -> int:
        return 0

    def window(self, xt: torch.Tensor, start: int, stop: int) -> Predict:
        num_passes, old = 0, xt

        def predict(window: torch.Tensor, select: torch.Tensor, which: Pass) -> torch.Tensor:
            nonlocal num_passes, old
            row = torch.cat([xt[:, :start], window, xt[:, stop:]], dim=1)
            if num_passes == 0 or (self.refresh_every and num_passes % self.refresh_every == 0):
                old = row
            num_passes += 1
            part = slice(start - self.offset, SEQ_LEN if self.reaches_end else stop)
            sees = torch.zeros(2 * SEQ_LEN, 2 * SEQ_LEN, dtype=torch.bool)
            sees[:SEQ_LEN, :SEQ_LEN] = True
            sees[SEQ_LEN:, :SEQ_LEN] = True
            sees[SEQ_LEN:, part] = False
            sees[SEQ_LEN:, SEQ_LEN:][:, part] = True
            plan = plan_attention(AttentionMask(), len(row), 2 * SEQ_LEN, device="cpu", backend="dense")
            logits = tiny_model()(
                torch.cat([old, row], dim=1),
                mask=replace(plan, tables=(sees[None],)),
                positions=torch.arange(SEQ_LEN).repeat(2).expand(len(row), -1),
            ).view(len(row), 2 * SEQ_LEN, -1)
            at = SEQ_LEN + start + select % BLOCK - self.offset
            self.logits.append(logits[select // BLOCK, at])
            return self.logits[-1]

        return predict


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("refresh_every", [0, 2, 3])
@pytest.mark.parametrize("kind", [PrefixCache, DualCache])
def test_an_approximate_cache_computes_what_the_naive_one_does(kind, refresh_every, offset):
    heard: list[torch.Tensor] = []
    cached = _fill(
        kind(tiny_model(), refresh_every, offset), FirstHitting(), _rows(),
        change=lambda logits, places: heard.append(logits) or logits,
    )  # fmt: skip
    naive = _Naive(refresh_every, offset, kind.reaches_end)
    expected = _fill(naive, FirstHitting(), _rows())
    assert len(heard) == len(naive.logits) == SEQ_LEN - START
    for ours, theirs in zip(heard, naive.logits, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert torch.equal(cached.x0, expected.x0)


# Rows of unlike pace


def _ragged() -> torch.Tensor:
    """Two of three rows have tokens given, in several windows."""
    xt = _rows()
    xt[::2, 10:14], xt[0, 17:23], xt[2, 16:] = 3, 5, 7
    return xt


RAGGED = [
    Ancestral(6, t_end=0.2, denoises_at_end="draw"),
    RandomOrder(ScheduleQuotas(6)),
    Confident("probability", EvenQuotas(6)),
    Confident("probability", TimedQuotas(6)),
    Confident("probability", ScheduleQuotas(6)),
    Confident("probability", Threshold(0.5)),
    PathPlanning(6),
]


@pytest.mark.parametrize(("kind", "refresh_every"), [(PrefixCache, 2), (DualCache, 0), (DualCache, 2), (DualCache, 3)])
@pytest.mark.parametrize("rule", RAGGED, ids=repr)
def test_a_row_does_not_depend_on_when_others_need_a_pass(kind, rule, refresh_every):
    ids = torch.arange(3)
    together = _fill(kind(tiny_model(), refresh_every), rule, _ragged(), ids)
    for row in range(3):
        alone = _fill(kind(tiny_model(), refresh_every), rule, _ragged()[row : row + 1], ids[row : row + 1])
        assert torch.equal(alone.x0[0], together.x0[row])
        assert int(alone.nfe) == int(together.nfe[row])


def test_a_pass_at_the_end_computes_the_whole_row():
    """It comes when the other rows are done: what is kept may be older than it would be for the row alone."""
    widths, model = [], tiny_model()
    handle = model.embedding.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    try:
        filled = _fill(DualCache(model), RAGGED[0], _rows(1), block_size=SEQ_LEN - START)
    finally:
        handle.remove()
    assert len(widths) == filled.num_passes > 2
    assert [width == SEQ_LEN for width in widths] == [True, *[False] * (len(widths) - 2), True]


@pytest.mark.parametrize("refresh_every", [0, 1])
def test_rows_that_change_between_their_passes_are_the_same_in_any_batch_where_they_may(refresh_every):
    ids, rule = torch.arange(3), ReMDM(16, 0.3)
    together = _fill(DualCache(tiny_model(), refresh_every), rule, _ragged(), ids)
    for row in range(3):
        alone = _fill(DualCache(tiny_model(), refresh_every), rule, _ragged()[row : row + 1], ids[row : row + 1])
        assert torch.equal(alone.x0[0], together.x0[row])
    with pytest.raises(ValueError, match=r"refresh_every is 2, but rows of ReMDM.* depend on when others renew"):
        _fill(DualCache(tiny_model(), refresh_every=2), rule, _ragged())


# What exact caches cost


def test_a_pass_a_block_takes_in_what_something_is_to_be_filled_behind():
    none, first = _rows(3), _rows(3)
    none[:, START:] = 1
    first[:, START + BLOCK :] = 2
    cases = [(none, START, 0), (first, START, BLOCK + 1), (_rows(3), START, 2 * BLOCK + 2)]
    cases.append((torch.full((3, SEQ_LEN), MASK), 0, SEQ_LEN + 3 - 1))
    for xt, start, passes in cases:
        filled = _fill(ExactCache(tiny_model(), BLOCK), FirstHitting(), xt, start=start)
        assert filled.num_passes == passes
        assert filled.nfe.tolist() == [passes] * 3


@pytest.mark.parametrize("rule", [FirstHitting(), Ancestral(4, t_end=0.1, denoises_at_end="draw")], ids=repr)
def test_a_row_counts_what_it_needs_alone(rule):
    xt = _rows(4)
    xt[0, START:], xt[1, START + BLOCK :], xt[2, START : START + BLOCK] = 1, 2, 3
    ids = torch.arange(4)
    for eos in (None, 5):
        together = _fill(ExactCache(tiny_model(), BLOCK), rule, xt, ids, eos_token_id=eos)
        alone = [
            _fill(ExactCache(tiny_model(), BLOCK), rule, xt[i : i + 1], ids[i : i + 1], eos_token_id=eos)
            for i in range(4)
        ]
        assert together.nfe.tolist() == [int(one.nfe) for one in alone]
        assert torch.equal(together.x0, torch.cat([one.x0 for one in alone]))
        assert together.nfe[0] == 0


@pytest.mark.parametrize(("ends_at", "nfe"), [([3, 12, None], [8, 17, 26]), ([3, 12], [8, 17]), ([3, 7], [8, 8])])
def test_a_row_that_has_ended_needs_no_pass_of_an_exact_cache(ends_at, nfe):
    """Neither those of the windows behind its end nor those that take them in, nor what takes in its last one."""
    eos = 5

    def change(logits, places):
        is_end = torch.tensor([ends_at[place // SEQ_LEN] == place % SEQ_LEN for place in places.tolist()])
        return torch.where((torch.arange(logits.shape[1]) == eos) == is_end[:, None], logits, -torch.inf)

    xt = torch.full((len(ends_at), SEQ_LEN), MASK)
    filled = _fill(ExactCache(tiny_model(), BLOCK), FirstHitting(), xt, start=0, eos_token_id=eos, change=change)
    assert filled.nfe.tolist() == nfe
    assert filled.num_passes == max(nfe)
    for row, end in zip(filled.x0.tolist(), ends_at, strict=True):
        assert [place for place, token in enumerate(row) if token == eos] == list(range(end or SEQ_LEN, SEQ_LEN))


# What rows follow behind an exact cache


@cache
def _of_blocks() -> Denoiser:
    """Three tokens and a mask; far from uniform."""
    a = Architecture(d_model=16, num_layers=2, num_heads=2, d_ff=32, init="normal", init_std=0.7)
    model = Denoiser(ModelConfig(a, 4, 3))
    model.init_weights(1)
    return model.double().eval()


@cache
def _probs(row: tuple[int, ...]) -> list[list[float]]:
    logits = _of_blocks()(torch.tensor([row]), mask=AttentionMask("block_causal", block_size=2))
    return logits[:, :3].softmax(dim=1).tolist()


def _law(prompt: tuple[int, ...], orders: list[list[tuple[int, ...]]]) -> dict[tuple[int, ...], float]:
    """Of rows of 4 tokens in blocks of 2: each order is as likely, and what is drawn together is independent."""
    law = {prompt: 1.0}
    for start in range(len(prompt), 4, 2):
        after: Counter[tuple[int, ...]] = Counter()
        for clean, prob in law.items():
            for order, pair in itertools.product(orders, itertools.product(range(3), repeat=2)):
                block, p = [3, 3], prob / len(orders)
                for together in order:
                    probs = _probs((*clean, *block))
                    p *= math.prod(probs[start + place][pair[place]] for place in together)
                    for place in together:
                        block[place] = pair[place]
                after[*clean, *pair] += p
        law = dict(after)
    return law


ONE_BY_ONE, AT_ONCE = [[(0,), (1,)], [(1,), (0,)]], [[(0, 1)]]


@pytest.mark.parametrize("prompt", [(), (2, 0)])
@pytest.mark.parametrize(
    ("rule", "orders", "others"), [(FirstHitting(), ONE_BY_ONE, AT_ONCE), (Ancestral(1), AT_ONCE, ONE_BY_ONE)]
)
def test_windows_behind_an_exact_cache_follow_the_law_of_all_rows(rule, orders, others, prompt):
    xt = torch.tensor([[*prompt, *[3] * (4 - len(prompt))]]).expand(10_000, -1)
    options = {"block_size": 2, "mask_token_id": 3, "start": len(prompt)}
    filled = _fill(ExactCache(_of_blocks(), 2), rule, xt, **options)
    law = _law(prompt, orders)
    assert sum(law.values()) == pytest.approx(1.0)
    assert follows(filled.x0, law)
    assert not follows(filled.x0, _law(prompt, others))
