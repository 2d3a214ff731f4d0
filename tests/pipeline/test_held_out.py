"""What is asked of held-out rows: one document at a time where a model learned so, padding never, in few strata."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from dlm_core import cross_entropy
from dlm_core.models.attention import AttentionMask
from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.transformer import Denoiser
from pipeline.data.special_tokens import SpecialTokens
from pipeline.held_out import HeldOutRows, Question, Questions
from pipeline.scoring import Likelihood, Scoring
from tests.support.head_case import Products

SEQ_LEN, LENGTHS = 16, (9, 14, 3, 20, 11)  # 57 tokens: the last of four rows has nine
ARCHITECTURE = Architecture(d_model=16, num_layers=2, num_heads=2, d_ff=32, init_std=0.5)
KINDS: list[tuple[Likelihood, int, int]] = [
    ("masked_nelbo", 0, 0),
    ("masked_nelbo", 0, 1),
    ("block_nelbo", 4, 0),
    ("autoregressive_nll", 0, 0),
]


@dataclass(frozen=True)
class Stream:
    """Some tokens with the boundaries of their documents."""

    tokens: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def doc_starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(LENGTHS)])

    @property
    def doc_lengths(self) -> np.ndarray:
        return np.array(LENGTHS)

    def __getitem__(self, places: slice) -> np.ndarray:
        return self.tokens[places]


SPECIAL = SpecialTokens(vocab_size=24, mask_token_id=23, pad_token_id=22, eos_token_id=21)
TOKENS = np.random.default_rng(0).integers(0, 20, sum(LENGTHS))


@pytest.fixture(scope="module")
def model() -> Denoiser:
    """Weights so large that context shows."""
    made = Denoiser(ModelConfig(ARCHITECTURE, SPECIAL.vocab_size, SPECIAL.mask_token_id))
    made.init_weights(0)
    return made.eval()


def asked(
    kind: tuple[Likelihood, int, int], tokens: np.ndarray, within: bool, special: SpecialTokens = SPECIAL
) -> tuple[HeldOutRows, Question]:
    """One replicate of all rows."""
    rows: Any = HeldOutRows(Stream(tokens), SEQ_LEN)  # pyright: ignore[reportArgumentType]
    likelihood, block_size, offset = kind
    questions = Questions(rows, range(rows.num_rows), Scoring(likelihood, block_size, 7, offset, within), special)
    return rows, questions.ask(range(rows.num_rows), 0)


def losses(question: Question, model: Denoiser) -> torch.Tensor:
    with torch.inference_mode():
        return question.cross_entropy(model)


def documents_of(question: Question, rows: HeldOutRows, offset: int) -> torch.Tensor:
    return torch.from_numpy(rows.doc_ids(range(rows.num_rows))).flatten()[question.select + offset]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_within_documents_other_documents_do_not_matter(
    kind: tuple[Likelihood, int, int], changed: int, model: Denoiser
) -> None:
    others = TOKENS.copy()
    here = slice(sum(LENGTHS[:changed]), sum(LENGTHS[: changed + 1]))
    others[here] = (others[here] + 5) % 20
    moved = []
    for within in (True, False):
        rows, first = asked(kind, TOKENS, within)
        _, second = asked(kind, others, within)
        assert torch.equal(first.select, second.select)
        # a shifted model's first token of a document is asked for at the last place of the one before
        elsewhere = documents_of(first, rows, kind[2]) != changed
        seen_from = documents_of(first, rows, 0) if kind[0] != "autoregressive_nll" else documents_before(first, rows)
        untouched = elsewhere & (seen_from != changed)
        assert untouched.any()
        moved.append(float((losses(first, model) - losses(second, model))[untouched].abs().max()))
    assert moved[0] < 1e-6
    assert moved[1] > 1e-3 or changed == len(LENGTHS) - 1  # little of the last lies before others


def documents_before(question: Question, rows: HeldOutRows) -> torch.Tensor:
    return torch.from_numpy(rows.doc_ids(range(rows.num_rows), shift=1)).flatten()[question.select]


def test_within_documents_a_row_is_scored_as_its_documents_one_by_one(model: Denoiser) -> None:
    rows, question = asked(("masked_nelbo", 0, 0), TOKENS, True)
    found = losses(question, model)
    wanted = torch.full_like(found, torch.nan)
    places = torch.stack([question.select // SEQ_LEN, question.select % SEQ_LEN], dim=1).tolist()
    doc_ids = rows.doc_ids(range(rows.num_rows))
    for number, (row, place) in enumerate(places):
        own = np.flatnonzero(doc_ids[row] == doc_ids[row, place])
        alone = question.xt[row, own][None]
        with torch.inference_mode():
            logits = model(alone, torch.tensor([place - own[0]]), mask=AttentionMask("full"))
        wanted[number] = -logits.double().log_softmax(-1)[0, question.targets[number]] * question.weight[number]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("within", [False, True])
def test_every_token_costs_its_log_softmax_and_the_logits_of_a_chunk_alone_are_held(
    kind: tuple[Likelihood, int, int], within: bool, model: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 0)  # a chunk has at least 16 rows
    _, question = asked(kind, TOKENS, within)
    with Products() as products:
        found = losses(question, model)
    assert len(question.select) > 16, "a weak test"
    assert max(products.rows_of_logits(SPECIAL.vocab_size)) == 16
    with torch.inference_mode():
        logits = model(question.xt, x0=question.x0, mask=question.mask)
    log_probs = logits.double().log_softmax(dim=-1)[question.select, question.targets]
    torch.testing.assert_close(found, -log_probs * question.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("within", [False, True])
def test_padding_of_the_last_row_is_not_seen(kind: tuple[Likelihood, int, int], within: bool, model: Denoiser) -> None:
    (_, first), (_, second) = (asked(kind, TOKENS, within, replace(SPECIAL, pad_token_id=number)) for number in (22, 3))
    assert not torch.equal(first.xt, second.xt) or kind[0] == "autoregressive_nll"
    assert torch.equal(losses(first, model), losses(second, model))


def test_counts_of_masks_are_in_strata_over_the_chosen_rows_alone() -> None:
    rows: Any = HeldOutRows(Stream(TOKENS), SEQ_LEN)  # pyright: ignore[reportArgumentType]
    scoring, chosen = Scoring("masked_nelbo", 0, 7), [0, 2]
    for replicate in range(20):
        xt = Questions(rows, chosen, scoring, SPECIAL).ask(chosen, replicate).xt
        few, many = sorted((xt == SPECIAL.mask_token_id).sum(dim=1).tolist())
        assert 1 <= few <= SEQ_LEN // 2 < many <= SEQ_LEN


def test_a_row_is_asked_the_same_however_rows_are_batched() -> None:
    rows: Any = HeldOutRows(Stream(TOKENS), SEQ_LEN)  # pyright: ignore[reportArgumentType]
    questions = Questions(rows, range(rows.num_rows), Scoring("block_nelbo", 4, 7), SPECIAL)
    whole = questions.ask(range(rows.num_rows), 3).xt
    parts = [questions.ask([index], 3).xt for index in range(rows.num_rows)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("offset", [0, 1])
def test_tokens_asked_of_documents_are_those_that_a_full_question_selects(offset: int) -> None:
    rows: Any = HeldOutRows(Stream(TOKENS), SEQ_LEN)  # pyright: ignore[reportArgumentType]
    given = [place for place in range(len(TOKENS)) if place % SEQ_LEN < offset]
    doc_ids = rows.doc_ids(range(rows.num_rows)).flatten()[: len(TOKENS)]
    wanted = np.bincount(np.delete(doc_ids, given), minlength=len(LENGTHS))
    assert rows.asked_of_documents(offset).tolist() == wanted.tolist()
