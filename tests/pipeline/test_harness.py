"""The model of lm-evaluation-harness: likelihoods and rolling likelihoods, beside ``score`` and naive loops."""

import itertools
import json
import logging
import math
import runpy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dlm_core.models.attention import AttentionMask
from pipeline.errors import NumericsError, UserError
from pipeline.harness.addresses import address_of
from pipeline.harness.model import DenoiserLM
from pipeline.harness.pieces import cut_requests, masked_copies, one_copy
from pipeline.inference.likelihood import LikelihoodConfig, Request, score
from pipeline.inference.model import OpenModel, open_model
from tests.support.harness import ARTICLES, asked, questions
from tests.support.model_kinds import KINDS, spoilt
from tests.support.tiny_run import Artifacts

SEQ_LEN = 32
DOCUMENTS = (("ba be bi", [" bo", " bu da", " de di do du fa fe"]), ("ga ", ["ge", "gi"]), ("", ["ba be", " bi"]))


@pytest.fixture
def dlm(saved: dict[str, Path], made: Artifacts) -> Iterator[Any]:
    opened = []

    def build(kind: str = "masked", **settings: Any) -> DenoiserLM:
        given = {"weights": str(saved[kind]), "tokenizer": str(made.tokenizer), "num_masks": 16} | settings
        opened.append(DenoiserLM(**given))
        return opened[-1]

    yield build
    for lm in opened:
        lm.close()


@pytest.fixture
def model(saved: dict[str, Path], made: Artifacts) -> Any:
    return lambda kind: open_model(saved[kind], made.tokenizer, "cpu")


@pytest.mark.parametrize("kind", list(KINDS))
def test_likelihoods_are_those_of_score(dlm: Any, model: Any, kind: str) -> None:
    opened, requests = model(kind), questions(*DOCUMENTS)
    found = dlm(kind, batch_rows=3).loglikelihood(requests, disable_tqdm=True)
    for instance, (nats, is_greedy) in zip(requests, found, strict=True):
        context, choice = instance.args
        ids, given = opened.encode(context + choice), len(opened.encode(context.rstrip()))
        before = ids[0] if kind == "next" and given else None  # nothing but the context stands before an answer
        request = Request(ids[before is not None : given], ids[given:], address_of(instance).number(), (), before)
        (wanted,) = score(opened, [request], LikelihoodConfig(num_masks=16))
        assert (-nats, is_greedy) == (pytest.approx(wanted.nats, rel=1e-5), False)


def test_choices_of_a_document_share_masks_wherever_it_stands(dlm: Any) -> None:
    """Noise is addressed by what is in a document: its number differs where some are left out."""
    long = " " + " ".join("bdfgklmn"[i % 8] + "aeiou"[i % 5] for i in range(14))
    requests = questions(("ba", [long, long, " be"]), ("ba", [long, " be"]))
    first, again, _, other, _ = (nats for nats, _ in dlm().loglikelihood(requests, disable_tqdm=True))
    assert first == again != other
    assert other == pytest.approx(first, rel=0.2)
    turned = dlm().loglikelihood(requests[::-1], disable_tqdm=True)[::-1]
    assert [nats for nats, _ in turned][:2] == [first, again]
    for instance in requests[3:]:
        instance.doc_id = 7
    assert dlm().loglikelihood(requests, disable_tqdm=True)[3][0] == other
    others = [requests[0], requests[3], *questions(("ba", ["be"]), task="b")]
    assert len({address_of(instance).number() for instance in others}) == 3


def test_pieces_of_work_hold_every_request_once_whatever_the_order() -> None:
    requests = [Request(range(i % 7), range(1 + i % 5), mask_id) for i in range(40) for mask_id in (i % 3, i % 3, 5)]
    requests = [Request(tuple(one.context), tuple(one.answer), one.mask_id) for one in requests]
    copies = partial(masked_copies, num_masks=8, block_size=0)
    pieces = cut_requests(requests, copies, 2)
    assert sorted(map(repr, itertools.chain(*pieces))) == sorted({repr(one) for one in requests})
    assert len(pieces) > 3
    assert all(len({len(one.answer) for one in piece}) <= 2 for piece in pieces)
    for turned in (requests[::-1], requests[7:] + requests[:7]):
        assert cut_requests(turned, copies, 2) == pieces
    costs = [sum((len(r.context) + len(r.answer)) * min(8, 2 ** len(r.answer) - 1) for r in piece) for piece in pieces]
    assert costs == sorted(costs, reverse=True)
    assert cut_requests([], copies, 2) == []


def test_pieces_of_requests_of_one_row_are_small_and_their_batches_full() -> None:
    """Enough of them for several workers; of more rows so many that the last batch hardly counts."""
    requests = [Request(tuple(range(n % 5)), (9, 10, 11), n) for n in range(150)]
    for copies in (one_copy, partial(masked_copies, num_masks=64, block_size=1)):
        assert sorted(len(piece) for piece in cut_requests(requests, copies, 32)) == [22, 64, 64]
    of_bounds = cut_requests(requests, partial(masked_copies, num_masks=64, block_size=0), 32)  # 7 rows of each
    assert sorted(len(piece) for piece in of_bounds) == [22, 32, 32, 32, 32]
    of_many = cut_requests(requests, lambda _: 62, 32)
    assert sorted(len(piece) for piece in of_many) == [6, *[9] * 16]


def test_pieces_count_the_copies_that_there_are() -> None:
    short, long = (Request((5,), tuple(range(9, 9 + size)), 0) for size in (3, 20))
    assert [masked_copies(one, 64, 0) for one in (short, long)] == [7, 64]
    assert [masked_copies(one, 64, 4) for one in (short, long)] == [7, 15]


@pytest.mark.parametrize("kind", ["next", "masked"])
def test_batches_of_one_row_a_request_are_full(dlm: Any, model: Any, kind: str) -> None:
    """Likelihoods of next tokens, and the first round of greedy answers: pieces of few requests would cut them."""
    requests, rows = questions(("ba be bi", [f" {c}a {c}e {c}i {c}o {c}u {c}a" for c in "bdfgklmnp"])), list[int]()
    handle = model(kind).denoiser.embedding.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    try:
        dlm(kind, num_masks=64, batch_rows=4, device="cpu").loglikelihood(requests, disable_tqdm=True)
        num_scored = len(rows)
        assert kind == "masked" or rows == [4, 4, 1]
        lm = dlm(kind, num_masks=64, batch_rows=4, device="cpu", is_greedy=True)
        lm.loglikelihood(requests, disable_tqdm=True)
    finally:
        handle.remove()
    assert rows[2 * num_scored :][:3] == [4, 4, 1]


@pytest.mark.parametrize("kind", ["masked", "next"])
def test_order_and_company_change_no_digit(dlm: Any, kind: str) -> None:
    requests = questions(*DOCUMENTS)
    lm = dlm(kind, batch_rows=2)
    found = lm.loglikelihood(requests, disable_tqdm=True)
    assert lm.loglikelihood([*requests[::-1], requests[0]], disable_tqdm=True) == [*found[::-1], found[0]]


def test_a_request_without_a_document_is_addressed_by_its_context(dlm: Any) -> None:
    (instance,) = asked("loglikelihood", [("ba be", " bi bo bu da de di do")])
    instance.task_name = None
    assert dlm().loglikelihood([instance], disable_tqdm=True) == dlm().loglikelihood([instance], disable_tqdm=True)
    assert address_of(instance).document == "ba be"


def naive_windows(opened: OpenModel, ids: list[int]) -> float:
    """As the harness's own models have it: every token once, each given as many before it as a row has room for."""
    eos, total = opened.vocabulary.special.eos_token_id, 0.0
    for window in get_rolling_token_windows(ids, eos, SEQ_LEN, 1):
        context, wanted = make_disjoint_window(window)
        seen = torch.tensor([[*context, *wanted[:-1]]])
        log_probs = opened.denoiser(seen, mask=AttentionMask("causal")).log_softmax(-1)[-len(wanted) :]
        total += float(log_probs[range(len(wanted)), wanted].double().sum())
    return total


def test_rolling_likelihoods_of_next_tokens_are_those_of_the_windows_of_the_harness(dlm: Any, model: Any) -> None:
    opened, texts = model("next"), [*ARTICLES, "ba be", ""]
    requests = [asked("loglikelihood_rolling", [(text,)], doc_id=i)[0] for i, text in enumerate(texts)]
    assert len(opened.encode(ARTICLES[0])) > 2 * SEQ_LEN
    found = dlm("next").loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx([naive_windows(opened, opened.encode(text)) for text in texts], rel=1e-5)


@pytest.mark.parametrize("kind", ["masked", "shifted", "blocks"])
def test_rolling_bounds_are_of_rows_that_hold_every_token_once(dlm: Any, model: Any, kind: str) -> None:
    opened, lm = model(kind), dlm(kind)
    (instance,) = asked("loglikelihood_rolling", [(ARTICLES[0],)])
    ids, size = opened.encode(ARTICLES[0]), SEQ_LEN - (kind == "shifted")
    starts = range(0, len(ids), size)
    rows = [
        Request(
            ids[max(0, start - (kind == "shifted")) : start],
            ids[start : start + size],
            address_of(instance).number(start),
        )
        for start in starts
    ]
    scores = [score(opened, [row], LikelihoodConfig(num_masks=16))[0] for row in rows]
    assert sum(len(row.answer) for row in rows) == len(ids)
    found = lm.loglikelihood_rolling([instance], disable_tqdm=True)
    assert found == pytest.approx([-math.fsum(one.nats for one in scores)], rel=1e-5)
    told = lm.get_model_info()["accounts"]["loglikelihood_rolling"]["task"]
    assert told["nats_mc_se"] == pytest.approx(math.fsum(one.mc_se**2 for one in scores) ** 0.5, rel=1e-4)
    assert told["nats"] == -found[0]
    assert (told["num_requests"], told["num_cut_tokens"]) == (1, 0)
    assert told["num_passes"] == sum(one.num_passes for one in scores)


def test_a_context_that_is_cut_is_counted_and_told(dlm: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "details.jsonl").write_text("of another run\n")
    lm = dlm(details=str(tmp_path / "details.jsonl"))
    long = " ".join(["ba be bi"] * 20)
    with caplog.at_level(logging.WARNING):
        (whole, _), (short, _) = lm.loglikelihood(questions((long, [" bo", " bu"])), disable_tqdm=True)
    assert "task task: 2 of 2 contexts are longer than the rows of 32 tokens" in caplog.text
    told = lm.get_model_info()["accounts"]["loglikelihood"]["task"]
    assert told["num_cut_requests"] == 2
    assert told["num_cut_tokens"] > 20
    lines = [json.loads(line) for line in (tmp_path / "details.jsonl").read_text().splitlines()]
    assert [(line["doc_id"], line["idx"], line["nats"]) for line in lines] == [(0, 0, -whole), (0, 1, -short)]
    assert sum(line["num_cut"] for line in lines) == told["num_cut_tokens"]
    lm.loglikelihood(questions((long, [" bo", " bi"])), disable_tqdm=True)
    assert len((tmp_path / "details.jsonl").read_text().splitlines()) == 4, "of all that one model was asked"


@pytest.mark.parametrize(
    ("choice", "words"),
    [(" ba" * 40, r"document 3: the answer ' ba ba.*tokens; the model takes from 1 to 32"), ("", "has 0 tokens")],
)
def test_an_answer_without_tokens_or_room_is_refused_by_task_and_document(dlm: Any, choice: str, words: str) -> None:
    instances = asked("loglikelihood", [("ba", choice), ("ba", " be")], doc_id=3)
    with pytest.raises(UserError, match=f"task task, {words}" if "document" in words else words):
        dlm().loglikelihood(instances, disable_tqdm=True)


@pytest.mark.parametrize("kind", ["masked", "shifted"])
def test_guidance_without_a_context_is_refused_by_task_and_document(dlm: Any, kind: str) -> None:
    lm, words = dlm(kind, guidance=0.5), r"guidance is 0\.5, but no context stands before the answer"
    with pytest.raises(UserError, match=rf"task task, document 2: {words}"):
        lm.loglikelihood(questions(*DOCUMENTS), disable_tqdm=True)
    for text in ARTICLES:
        (instance,) = asked("loglikelihood_rolling", [(text,)], doc_id=5, task="wiki")
        with pytest.raises(UserError, match=rf"task wiki, document 5: {words}"):
            lm.loglikelihood_rolling([instance], disable_tqdm=True)
    assert lm.get_model_info()["accounts"] == {}
    lm.loglikelihood(questions(*DOCUMENTS[:2]), disable_tqdm=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_that_costs_no_number_is_named(
    dlm: Any, model: Any, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = spoilt(model(kind), "q")
    monkeypatch.setattr("pipeline.inference.workers.open_model", lambda *_: broken)
    lm = dlm(kind, details=str(tmp_path / "details.jsonl"))
    with pytest.raises(NumericsError, match=r"^task task, document 1: a token costs nan nats"):
        lm.loglikelihood(questions(("ba", [" be", " bi"]), ("ba q", [" be", " bi"])), disable_tqdm=True)
    texts = [asked("loglikelihood_rolling", [(text,)], doc_id=i)[0] for i, text in enumerate(("ba", "be q bi bo"))]
    with pytest.raises(NumericsError, match=r"^task task, document 1: a token costs nan nats"):
        lm.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ((tmp_path / "details.jsonl").read_text(), lm.get_model_info()["accounts"]) == ("", {})


@pytest.mark.parametrize(("error", "code"), [(UserError("as set"), 2), (NumericsError("as trained"), 3)])
def test_the_command_ends_in_one_line(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_harness() -> None:
        raise error

    monkeypatch.setattr("pipeline.harness.command.run_harness", run_harness)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("pipeline.harness", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().err) == (code, f"error: {error}\n")


def test_a_task_of_single_answers_is_refused_unless_greedy_decoding_is_decided_on(dlm: Any) -> None:
    requests = questions(("ba be", [" bi"]), ("ga", [" ge"]), task="lambada")
    with pytest.raises(UserError, match=r"task lambada has one answer for a document.*Set is_greedy=true"):
        dlm().loglikelihood(requests, disable_tqdm=True)
    likelihoods = [nats for nats, _ in dlm(is_greedy=False).loglikelihood(requests, disable_tqdm=True)]
    assert [nats for nats, _ in dlm(is_greedy=True).loglikelihood(requests, disable_tqdm=True)] == likelihoods


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("next", {"guidance": 0.5}, r"guidance is 0\.5, but the model predicts the next token"),
        ("blocks", {"guidance": 0.5}, r"guidance is 0\.5, but the model is of blocks"),
        ("next", {"sampler": "random"}, "sampler is 'random', but the model predicts the next token"),
        ("blocks", {"block_size": 8}, "block_size is 8, but the model was trained on blocks of 4"),
        ("blocks", {"cache": "dual"}, 'cache is "dual", an approximation for models of full attention'),
        ("masked", {"suppressed": (5, 300)}, r"suppressed has the id 300; the model has the ids 0\.\.299"),
        ("blocks", {"is_greedy": True}, "is_greedy is true, but the model is of blocks"),
        ("masked", {"is_greedy": True, "guidance": 1.0}, r"is_greedy is true, but guidance is 1\.0"),
        ("masked", {"length": 32}, "length is 32, which leaves no room for a prompt in rows of 32; set length=16"),
        ("masked", {"device": "cuda:9"}, 'device is "cuda:9", which this machine lacks; it must be one of auto, cpu'),
        ("masked", {"details": "/nowhere/details.jsonl"}, "details is /nowhere/details.jsonl, which cannot be written"),
    ],
)
def test_what_a_model_has_no_use_for_is_refused_before_anything_is_asked(
    dlm: Any, kind: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        dlm(kind, **settings)


def test_a_template_of_chats_is_refused(dlm: Any) -> None:
    lm = dlm()
    assert lm.chat_template(False) is None
    for ask in (lambda: lm.chat_template(True), lambda: lm.apply_chat_template([]), lambda: lm.tokenizer_name):
        with pytest.raises(UserError, match="a chat template is asked for, but the model dlm has none"):
            ask()
