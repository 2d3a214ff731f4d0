"""Rows of unlike lengths in one batch: each is what it is alone, token for token and pass for pass."""

import pytest
import torch

from dlm_core.models.attention import AttentionMask
from dlm_core.models.transformer import FULL
from dlm_core.samplers.blocks import sample_blocks
from dlm_core.samplers.confident import Confident, EntropyBound
from dlm_core.samplers.contexts import Context, DualCache, ExactCache, PrefixCache, Whole
from dlm_core.samplers.guidance import Guided
from dlm_core.samplers.loop import Rule, Sampled
from dlm_core.samplers.next_tokens import sample_next_tokens
from dlm_core.samplers.padding import Padding, whole_rows
from dlm_core.samplers.planned import Ancestral, FirstHitting, RandomOrder
from dlm_core.samplers.proposal import Proposal
from dlm_core.samplers.quotas import EvenQuotas, TimedQuotas
from dlm_core.samplers.remask import PathPlanning, ReMDM
from dlm_core.samplers.speculative import SelfSpeculative
from tests.support.sampling import tiny_model

BLOCK, TAIL = 8, 16
MASK = tiny_model().config.mask_token_id
BLOCKS = AttentionMask("block_causal", block_size=BLOCK)
RULES = [
    Ancestral(12),
    FirstHitting(),
    RandomOrder(EvenQuotas(5)),
    Confident("probability", TimedQuotas(6)),
    Confident("entropy", EntropyBound(0.5)),
    ReMDM(12, 0.2),
    ReMDM(12, 1.0, "confidence"),
    PathPlanning(6),
    SelfSpeculative(3),
]
NAMES = ["ancestral", "first hitting", "random", "quotas", "entropy bound", "remdm", "remdm by confidence"]
NAMES += ["path planning", "self-speculative"]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def context_of(kind: str, padding: Padding | None) -> Context:
    """Every kind of context, of a model with and without a shift."""
    name, _, shift = kind.partition(" ")
    model, offset = tiny_model(), int(shift == "shifted")
    match name:
        case "whole":
            return Whole(whole_rows(model, FULL, padding, offset), padding)
        case "guided":
            return Guided(whole_rows(model, FULL, padding, offset), 1.5, MASK, offset, padding)
        case "blocks":
            return Whole(whole_rows(model, BLOCKS, padding), padding)
        case "exact":
            return ExactCache(model, BLOCK, padding)
        case "prefix":
            return PrefixCache(model, 0, offset, padding)
        case _:
            return DualCache(model, 0, offset, padding)


KINDS = ["whole", "whole shifted", "guided", "guided shifted", "blocks", "exact"]
KINDS += ["prefix", "prefix shifted", "dual", "dual shifted"]


def rows_of(prompts: list[int], tails: list[int]) -> list[torch.Tensor]:
    """Prompts of these lengths, and masks among a few tokens behind them."""
    generator, rows = torch.Generator().manual_seed(1), []
    for prompt, tail in zip(prompts, tails, strict=True):
        row = torch.randint(MASK, (prompt + tail,), generator=generator)
        row[prompt:] = torch.where(torch.arange(tail) % 7 == 5, row[prompt:], MASK)
        rows.append(row)
    return rows


def fill(rows: list[torch.Tensor], starts: list[int], kind: str, rule: Rule, **options) -> tuple[Sampled, list[int]]:
    """Rows whose first windows begin at their starts, together; and where each then begins."""
    before = [max(starts) - start for start in starts]
    width = max(place + len(row) for place, row in zip(before, rows, strict=True))
    xt = torch.zeros(len(rows), width, dtype=torch.int64)
    for place, (first, row) in enumerate(zip(before, rows, strict=True)):
        xt[place, first : first + len(row)] = row
    lengths = torch.tensor([len(row) for row in rows])
    padding = Padding.around(torch.tensor(before), lengths, width, torch.device("cpu")) if len(rows) > 1 else None
    settings = {"block_size": BLOCK, "start": max(starts), "mask_token_id": MASK, "noise_seed": 3} | options
    proposal = Proposal(0.0 if isinstance(rule, SelfSpeculative) else 1.0)
    return sample_blocks(context_of(kind, padding), xt, rule, proposal, **settings), before


def check(rows: list[torch.Tensor], starts: list[int], kind: str, rule: Rule, **options) -> None:
    """Each row together with the others and alone."""
    ids = torch.tensor([7, 3, 11])
    together, before = fill(rows, starts, kind, rule, sample_ids=ids, **options)
    for place, (row, start, first) in enumerate(zip(rows, starts, before, strict=True)):
        if "block_size" in options:
            options["block_size"] = len(row) - start
        alone, _ = fill([row], [start], kind, rule, sample_ids=ids[place : place + 1], **options)
        assert together.x0[place, first : first + len(row)].tolist() == alone.x0[0].tolist()
        assert together.nfe[place] == alone.nfe[0]
        assert (alone.x0 != MASK).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_rows_with_padding_before_them_are_what_they_are_alone(rule, kind):
    if rule.adds_rows and kind.split()[0] in ("exact", "prefix", "dual"):
        with pytest.raises(ValueError, match="adds rows to a pass"):
            fill(rows_of([8], [TAIL]), [8], kind, rule)
        return
    prompts = [8, 24, 0] if kind in ("blocks", "exact") else [3, 12, 7]
    check(rows_of(prompts, [TAIL] * 3), prompts, kind, rule, eos_token_id=5)


@pytest.mark.parametrize("kind", ["whole", "whole shifted", "guided", "guided shifted"])
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_rows_of_one_window_with_padding_behind_them_are_what_they_are_alone(rule, kind):
    rows = rows_of([3, 12, 7], [16, 5, 23])
    check(rows, [1, 1, 1], kind, rule, block_size=max(map(len, rows)) - 1)


def test_padding_is_never_read():
    """Whatever stands there: the tokens of a row, and its passes, are the same."""
    rows, starts = rows_of([3, 12, 7], [TAIL] * 3), [3, 12, 7]
    padding = Padding.around(torch.tensor([9, 0, 5]), torch.tensor([19, 28, 23]), 28, torch.device("cpu"))
    found = []
    for token in (1, 9):
        xt = torch.full((3, 28), token)
        for place, row in enumerate(rows):
            xt[place, 28 - len(row) :] = row
        settings = {"block_size": BLOCK, "start": max(starts), "mask_token_id": MASK, "noise_seed": 3}
        found.append(sample_blocks(context_of("whole", padding), xt, FirstHitting(), Proposal(), **settings).x0)
    assert all(torch.equal(a[28 - len(row) :], b[28 - len(row) :]) for a, b, row in zip(*found, rows, strict=True))


def test_next_tokens_behind_prompts_of_unlike_lengths_are_what_they_are_alone():
    prompts, ids = [3, 12, 0], torch.tensor([7, 3, 11])
    rows = rows_of(prompts, [0, 0, 0])
    before = 12 - torch.tensor(prompts)
    xt = torch.full((3, 12 + TAIL), MASK)
    for place, row in enumerate(rows):
        xt[place, :12] = torch.cat([torch.zeros(12 - len(row), dtype=torch.int64), row])
    settings = {"mask_token_id": MASK, "noise_seed": 3, "eos_token_id": 5}
    first = torch.tensor([4, 6, 8])
    options = {"start": 12, "sample_ids": ids, "before": before, "first_token_ids": first}
    together = sample_next_tokens(tiny_model(), xt, Proposal(), **options, **settings)
    for place, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        one = torch.cat([row, torch.full((TAIL,), MASK)])[None]
        own = {"start": prompt, "sample_ids": ids[place : place + 1], "first_token_ids": first[place : place + 1]}
        alone = sample_next_tokens(tiny_model(), one, Proposal(), **own, **settings)
        assert together.x0[place, 12 - prompt :].tolist() == alone.x0[0].tolist()
        assert together.nfe[place] == alone.nfe[0]
