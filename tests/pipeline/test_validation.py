"""Validation in training gives what evaluation of the exported weights gives, on any number of ranks."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dlm_core import cross_entropy
from dlm_core.models.config import ModelConfig, MoE
from dlm_core.models.transformer import Denoiser
from pipeline.artifact import load_manifest
from pipeline.data.shards import TokenStream
from pipeline.data.vocabulary import load_vocabulary
from pipeline.evaluate.config import STAGE as EVALUATE
from pipeline.evaluate.config import EvaluateConfig
from pipeline.held_out import HeldOutRows, open_held_out
from pipeline.pretrain.averaging import AverageConfig
from pipeline.pretrain.config import STAGE as PRETRAIN
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.loop import Progress, validate
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.pretrain.phases import Phase
from pipeline.pretrain.validation import Validator
from tests.support.head_case import Products
from tests.support.tiny_run import TINY, Artifacts, convert, metrics, run_gang, start_gang, tiny

ALL_ROWS = ValidationConfig(every_steps=4, num_rows=10**6)
EXPERTS = replace(TINY.architecture, d_ff=None, moe=MoE(4, 2, 16))
CHUNK_ROWS = 32
"""As many as the head's own matrix, turned round, which is as wide as logits too."""
SEARCH = ObjectiveConfig(weighting="inverse_mask_prob", search_mask_rates=True)


def train(config: PretrainConfig, made: Artifacts, out: Path) -> Path:
    """Train with the held-out tokens at hand."""
    return run_gang(PRETRAIN, config, {**made.inputs(), "tokens": made.tokens}, out, workers=config.workers)


def evaluated(trained: Path, made: Artifacts, root: Path) -> dict[str, Any]:
    """Results of evaluating the exported weights."""
    inputs = {
        "weights": convert(trained, root / "weights"),
        "tokens": made.tokens,
        "tokenizer": made.tokenizer,
        "corpus": made.corpus,
    }
    return json.loads((run_gang(EVALUATE, EvaluateConfig(), inputs, root / "results") / "results.json").read_text())


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (ObjectiveConfig(), "nelbo"),
        (ObjectiveConfig(block_size=8), "nelbo"),
        (ObjectiveConfig(target_offset=1), "nelbo"),
        (ObjectiveConfig(kind="autoregressive"), "nll"),
        (ObjectiveConfig(within_documents=True), "nelbo"),
        (ObjectiveConfig(block_size=8, within_documents=True), "nelbo"),
        (ObjectiveConfig(kind="autoregressive", within_documents=True), "nll"),
    ],
)
def test_the_last_validation_of_all_rows_is_the_evaluation_of_the_exported_weights(
    objective: ObjectiveConfig, name: str, made: Artifacts, tmp_path: Path
) -> None:
    config = tiny(objective=objective, num_steps=6, validation=ALL_ROWS)
    trained = train(config, made, tmp_path / "pretrain")
    validated = [line for line in metrics(trained) if f"val_{name}" in line]
    assert [line["step"] for line in validated] == [3, 5]
    results = evaluated(trained, made, tmp_path)
    num_tokens = load_manifest(made.tokens).stats["held_out_tokens"]
    num_given = -(-num_tokens // 32) * objective.target_offset
    assert (results["num_tokens"], results["num_given_tokens"]) == (num_tokens - num_given, num_given)
    bits = "bpb_bound" if name == "nelbo" else "bpb"
    for figure in (name, bits):
        assert validated[-1][f"val_{figure}"] == pytest.approx(results[figure], rel=1e-5)
    assert results[bits] == pytest.approx(results[name] * num_tokens / results["num_bytes"] / math.log(2), rel=1e-9)
    if name == "nelbo":
        assert validated[-1]["val_nelbo_mc_se"] == pytest.approx(results["nelbo_mc_se"], rel=1e-3)
    else:
        assert "val_nll_mc_se" not in validated[-1]
        assert results["nll_mc_se"] == 0.0


@pytest.mark.distributed
@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 3, "micro_batch_seqs": 2},
        {"architecture": EXPERTS, "ep_size": 2},
        {"objective": SEARCH, "phases": {"rows": Phase(), "blocks": Phase(2.0, block_size=4)}},
    ],
    ids=["ZeRO 3", "experts shared", "mask rates searched"],
)
def test_two_ranks_validate_and_choose_as_one_does(changes: dict[str, Any], made: Artifacts, tmp_path: Path) -> None:
    validation = ValidationConfig(every_steps=3, num_rows=11)  # no multiple of what ranks take at a time
    two = tiny(num_steps=6, workers=2, validation=validation, **changes)
    one = replace(two, workers=1, zero_stage=1, ep_size=0, micro_batch_seqs=0)
    lines = [
        [line for line in metrics(train(config, made, tmp_path / str(config.workers))) if "val_nelbo" in line]
        for config in (one, two)
    ]
    for wanted, found in zip(*lines, strict=True):
        assert found["val_nelbo"] == pytest.approx(wanted["val_nelbo"], rel=1e-5)
        assert found.get("mask_rate_low") == wanted.get("mask_rate_low")
    assert ("mask_rate_low" in lines[0][-1]) == ("objective" in changes)


@dataclass(frozen=True)
class CutStream:
    """The front of some tokens."""

    stream: TokenStream
    num_tokens: int

    @property
    def doc_starts(self) -> Any:
        return self.stream.doc_starts

    def __getitem__(self, places: slice) -> Any:
        return self.stream[places.start : min(places.stop, self.num_tokens)]


def alone_on_blocks(made: Artifacts, objective: ObjectiveConfig) -> Validator:
    """What one rank validates a model with that is not trained yet, on whole rows and on blocks of 8."""
    special = load_vocabulary(made.tokenizer).special
    model = Denoiser(ModelConfig(TINY.architecture, special.vocab_size, special.mask_token_id))
    model.init_weights(0)
    config = tiny(
        objective=objective,
        phases={"rows": Phase(), "blocks": Phase(block_size=8)},
        validation=ValidationConfig(every_steps=4, num_rows=3),
    )
    ranks: Any = SimpleNamespace(rank=0, workers=1, device="cpu", sum=lambda value: value)
    return Validator(config, SimpleNamespace(module=model), ranks, made.tokens, 32, special, lambda: None)


@pytest.mark.parametrize("left", [0, 1, 2, 5])
def test_mask_rates_are_searched_for_on_whole_blocks_alone(left: int, made: Artifacts) -> None:
    validator = alone_on_blocks(made, SEARCH)
    validator._stream = CutStream(open_held_out(made.tokens), 64 + 16 + left)  # pyright: ignore[reportAttributeAccessIssue]
    low, high = validator.search_mask_rates(validator._config.spans[1], 15)
    assert 0.0 <= low < high <= 1.0
    rows = HeldOutRows(validator._stream, 32)
    losses = validator._block_losses(rows, [0, 1, 2], (0.3, 0.8), 8, 15, torch.full((3, 4), 0.5, dtype=torch.float64))
    assert len(losses) == 4 + 4 + 2


@pytest.mark.parametrize("within", [False, True])
def test_a_search_scores_blocks_by_their_log_softmax_and_holds_the_logits_of_a_chunk_alone(
    within: bool, made: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    validator = alone_on_blocks(made, replace(SEARCH, within_documents=within))
    special = validator._special
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", CHUNK_ROWS * 4 * special.vocab_size)
    model, seen = validator._model, list[Any]()
    validator._model = lambda *columns, **named: (seen.append((columns[0], named)), model(*columns, **named))[1]
    t = torch.linspace(0.1, 0.9, 12, dtype=torch.float64).view(3, 4)
    rows = HeldOutRows(validator._stream, 32)
    with torch.no_grad():
        with Products() as products:
            found = validator._block_losses(rows, [0, 1, 2], (0.3, 0.8), 8, 15, t)
        assert max(products.rows_of_logits(special.vocab_size)) == CHUNK_ROWS
        ((xt, named),) = seen
        log_probs = model(xt, **named).double().log_softmax(dim=-1)
    nats = -log_probs.gather(1, named["x0"].view(-1, 1)).view(3, 4, 8)
    masked = (xt == special.mask_token_id).view(3, 4, 8)
    assert int(masked.sum()) > CHUNK_ROWS, "a weak test"
    wanted = torch.where(masked, nats, 0.0).sum(dim=-1) / (0.3 + 0.5 * t) / 8
    torch.testing.assert_close(found, wanted.flatten(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("number", [0, 1])
def test_validation_holds_the_logits_of_a_chunk_alone(
    number: int, made: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    validator = alone_on_blocks(made, SEARCH)
    span, vocab_size = validator._config.spans[number], validator._special.vocab_size
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", CHUNK_ROWS * 4 * vocab_size)
    with Products() as products:
        validator.validate(span)
    assert max(products.rows_of_logits(vocab_size)) == CHUNK_ROWS  # of 96 places, some half of them masked


def test_mask_rates_are_of_the_block_size_that_they_were_found_for(made: Artifacts, tmp_path: Path) -> None:
    phases = {"blocks": Phase(block_size=4), "rows": Phase(block_size=0)}
    config = tiny(num_steps=8, objective=SEARCH, phases=phases, validation=ValidationConfig(every_steps=2, num_rows=4))
    lines = metrics(train(config, made, tmp_path / "out"))
    rates = [(line["mask_rate_low"], line["mask_rate_high"]) for line in lines if "mask_rate_low" in line]
    assert len(rates) == 2
    assert rates[0] != (0.0, 1.0), "a weak test"
    has_bound = ["nelbo" in line for line in lines]
    assert has_bound == [True, True, False, False, True, True, True, True]


def test_averages_are_validated_and_training_goes_on_with_the_weights(made: Artifacts, tmp_path: Path) -> None:
    averaged = tiny(num_steps=8, validation=ALL_ROWS, optimizer=replace(TINY.optimizer, ema_decay=0.9))
    plain = replace(averaged, optimizer=TINY.optimizer)
    with_averages, without = (metrics(train(c, made, tmp_path / n)) for c, n in ((averaged, "ema"), (plain, "raw")))
    assert [line["loss"] for line in with_averages] == [line["loss"] for line in without]
    assert with_averages[-1]["val_nelbo"] != pytest.approx(without[-1]["val_nelbo"], rel=1e-3)


@pytest.mark.distributed
def test_a_rank_that_fails_in_validation_says_so_at_once_and_waits_for_no_other(
    made: Artifacts, tmp_path: Path
) -> None:
    optimizer = replace(TINY.optimizer, ema_decay=0.9)
    config = tiny(
        num_steps=8, workers=2, validation=ALL_ROWS, optimizer=optimizer, architecture=EXPERTS, ep_size=2
    )  # the other rank waits for its tokens, and would not change the averages back
    inputs = {**made.inputs(), "tokens": made.tokens}
    gang = start_gang(PRETRAIN, config, inputs, tmp_path / "out", workers=2, fault="fail_in_validation", rank=1)
    assert gang.wait() == [3, 3]
    assert "RuntimeError: no text can be asked for" in gang.log()


@pytest.mark.parametrize(("objective", "name"), [("diffusion", "val_nelbo"), ("autoregressive", "val_nll")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_logged_as_none_and_its_checkpoint_is_not_the_best(
    objective: Any, name: str, value: float
) -> None:
    found = iter([{name: 3.0, "bits": 1.0}, {name: value, "bits": value}])
    config = tiny(validation=ALL_ROWS, average=AverageConfig("best", 2), objective=ObjectiveConfig(kind=objective))
    training: Any = SimpleNamespace(
        config=config,
        progress=Progress(),
        validator=SimpleNamespace(validate=lambda span: next(found)),
        watchdog=SimpleNamespace(phase=lambda *given: None),
    )
    assert validate(training, 2) == {}
    assert validate(training, 3) == {name: 3.0, "bits": 1.0}
    assert validate(training, 7) == {name: None, "bits": None}
    assert training.progress.scores == {4: 3.0}


def test_validation_without_held_out_tokens_is_refused(made: Artifacts, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="was not given the input tokens"):
        run_gang(PRETRAIN, tiny(validation=ALL_ROWS), made.inputs(), tmp_path / "out")
