"""The benchmark of quality: models that can be compared, the order that is expected of them, stages run alone."""

import json
import math
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures_quality, quality
from benchmarks.command import Options, RefusedError
from benchmarks.quality import arguments, best_rate, check_same, measure
from benchmarks.quality_models import AR, FULL, MDLM, MODELS, QUICK, QUICK_STEPS, Size, pretrain_config
from benchmarks.quality_order import Result, Validation, findings
from benchmarks.quality_stages import run_stage
from dlm_core.models.config import ModelConfig
from pipeline.config import identity
from pipeline.corpus.config import STAGE as CORPUS
from pipeline.corpus.config import CorpusConfig, Source

BPB = {"ar": 1.5, "bd3lm_4": 1.6, "bd3lm_16": 1.7, "mdlm": 1.9, "llada_moe": 1.85}
RATES = (1e-3, 2e-3, 4e-3)


def result(slug: str, bpb: float, **changes: Any) -> Result:
    """Made-up figures of a model."""
    model = next(model for model in MODELS if model.slug == slug)
    error = 0.0 if model.is_autoregressive else 0.01
    made = Result(
        model=model,
        lr=2e-3,
        total_params=2_700_000 if model.has_experts else 1_000_000,
        active_params=1_000_000,
        bpb=bpb,
        bpb_mc_se=error,
        bpb_doc_se=0.05,
        nats=3 * bpb,
        is_exact=model.is_autoregressive,
        tokens=1000,
        train_s=10.0,
        phase_tokens_per_s={"all": 100.0},
        last_phase=[],
        evaluation={},
        identity={"rows": "a", "num_steps": 40},
    )
    return replace(made, **changes)


def results(**bpb: float) -> list[Result]:
    """All models, in the expected order but for what is given."""
    return [result(slug, value) for slug, value in (BPB | bpb).items()]


def options(quick: bool = False, text: tuple[Path, ...] = (), words: str = "") -> Options:
    """As the command line gives them."""
    return Options(quick, text, arguments().parse_args(words.split()))


# What is compared


@pytest.mark.parametrize("size", [FULL, QUICK])
@pytest.mark.parametrize("num_steps", [QUICK_STEPS, 400, 4000])
def test_models_differ_in_objective_and_experts_alone(size: Size, num_steps: int) -> None:
    allowed = {"objective", "phases", "phases_order", "validation", "architecture", "router_loss"}
    base = identity(pretrain_config(MDLM, size, num_steps, 2e-3))
    for model in MODELS:
        found = identity(pretrain_config(model, size, num_steps, 2e-3))
        assert {name for name, value in found.items() if value != base.get(name)} <= allowed
        same = {"d_ff", "moe"} if model.has_experts else set[str]()
        a = found["architecture"]
        assert {name for name, value in a.items() if value != base["architecture"][name]} == same


@pytest.mark.parametrize("size", [FULL, QUICK])
def test_experts_have_the_active_parameters_of_the_dense_model_and_their_routers(size: Size) -> None:
    dense, sparse = (
        ModelConfig(pretrain_config(model, size, 40, 2e-3).architecture, 2048, 2047) for model in (MDLM, MODELS[-1])
    )
    routers = size.architecture.num_layers * size.architecture.d_model * size.num_experts
    assert sparse.num_active_params() == dense.num_active_params() + routers
    assert sparse.num_params() > dense.num_params() + routers


@pytest.mark.parametrize("model", [model for model in MODELS if model.block_size])
def test_blocks_come_in_the_last_seventh_and_their_mask_rates_are_searched_for_in_it(model: Any) -> None:
    config = pretrain_config(model, FULL, 4000, 2e-3)
    rows, blocks = config.spans
    assert (rows.block_size, blocks.first_step, blocks.block_size) == (0, 3400, model.block_size)
    assert config.objective.search_mask_rates
    searches = [step for step in range(3400, 4000) if (step + 1) % config.validation.every_steps == 0]
    assert len(searches) == 6


def test_best_rate_has_the_fewest_bits_a_byte() -> None:
    assert best_rate({1e-3: 2.0, 2e-3: 1.9, 4e-3: 1.95}) == 2e-3


def test_models_that_saw_other_rows_are_not_compared() -> None:
    odd = result("mdlm", 1.9, identity={"rows": "b", "num_steps": 40})
    with pytest.raises(RefusedError, match="MDLM and AR differ in rows: they cannot be compared"):
        check_same([result("ar", 1.5), odd])
    check_same(results())


@pytest.mark.parametrize(
    ("quick", "words", "match"),
    [
        (True, "--steps 400", "leave out --steps and --minutes"),
        (True, "--minutes 1", "leave out --steps and --minutes"),
        (False, "--steps 199", "--steps 199: a learning rate is tried on a tenth of them, which takes at least 20"),
        (False, "--minutes 0", "wanted a number above 0"),
        (False, "--minutes nan", "wanted a number above 0"),
    ],
)
def test_length_that_has_no_meaning_is_refused(quick: bool, words: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        measure(options(quick, words=words))


def test_time_and_steps_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments().parse_args(["--steps", "400", "--minutes", "1"])
    assert "not allowed with argument" in capsys.readouterr().err


# The order


def test_expected_order_is_one_sentence() -> None:
    (found,) = findings(results(), RATES)
    assert found.endswith("AR < BD3-LM, blocks of 4 < BD3-LM, blocks of 16 < MDLM and LLaDA-MoE tiny")


def test_pairs_in_another_order_are_named_with_what_may_explain_them() -> None:
    found = findings(results(bd3lm_16=1.8, llada_moe=1.65), RATES)
    (only,) = found
    assert only.startswith(
        "LLaDA-MoE tiny was expected above BD3-LM, blocks of 16 in bits a byte and lies 0.1500 below"
    )
    assert only.endswith("(± 0.0141 from the masks): LLaDA-MoE tiny has 2.7 times the parameters")


def test_difference_within_the_noise_of_the_masks_is_no_order() -> None:
    (found,) = findings(results(bd3lm_16=1.61), RATES)
    assert "lies 0.0100 above" in found
    assert "within 2 standard errors, the masks drawn decide" in found


def test_rate_at_the_edge_of_those_tried_is_named() -> None:
    changed = [replace(r, lr=4e-3) if r.model.slug == "bd3lm_4" else r for r in results(bd3lm_4=1.75)]
    (found,) = findings(changed, RATES)
    assert "the learning rate of BD3-LM, blocks of 4, 0.004, is the highest that was tried" in found


@pytest.mark.parametrize(("last", "is_named"), [(4.0, True), (4.49, False)])
def test_blocks_that_were_still_learning_are_named(last: float, is_named: bool) -> None:
    bounds = [Validation(99, 5.0, 0.02), Validation(199, 4.5, 0.02), Validation(299, last, 0.02)]
    changed = [replace(r, last_phase=bounds) if r.model.slug == "bd3lm_4" else r for r in results(bd3lm_4=1.75)]
    (found,) = findings(changed, RATES)
    assert ("had not settled in its blocks" in found) == is_named
    assert found.endswith("nothing that was measured explains it") != is_named


# Stages run alone


def corpus_config(folder: Path) -> CorpusConfig:
    """A few documents."""
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.md").write_text(f"document {number} " * 20)
    return CorpusConfig(source={"text": Source((str(folder),))}, held_out_fraction=0.2)


def test_stage_that_fails_is_no_measurement_and_its_words_are_told(tmp_path: Path) -> None:
    config = CorpusConfig(source={"text": Source((str(tmp_path / "nowhere"),))})
    with pytest.raises(RefusedError, match=r"(?s)corpus ended with exit codes \[2\].*nowhere"):
        run_stage(CORPUS, config, {}, tmp_path / "corpus")


def test_stage_that_was_stopped_is_gone_on_with_and_then_not_made_again(tmp_path: Path) -> None:
    config, handler = corpus_config(tmp_path / "text"), signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(RefusedError, match=r"stopped in corpus of .*; the same command goes on from there"):
        run_stage(CORPUS, config, {}, tmp_path / "corpus")
    timer.join()
    assert signal.getsignal(signal.SIGTERM) is handler
    made = run_stage(CORPUS, config, {}, tmp_path / "corpus")
    assert made.stats["train_docs"] + made.stats["held_out_docs"] == 40
    assert run_stage(CORPUS, config, {}, tmp_path / "corpus") == made


# All of it


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_quick_run_compares_all_models_and_goes_on_with_what_is_there(tmp_path: Path) -> None:
    found = measure(options(quick=True, words=f"--work {tmp_path}"))
    assert list(found.figures["models"]) == [model.label for model in MODELS]
    assert list(found.ratios) == [f"{model.slug}_bpb_over_ar" for model in MODELS if model != AR]
    for model in found.figures["models"].values():
        assert model["tokens"] == found.figures["tokens"] == QUICK_STEPS * QUICK.step_tokens
        assert 1.0 < model["bpb"] < 8.0
        assert (model["bpb_mc_se"] == 0.0) == model["is_exact"]
        assert model["bpb_doc_se"] > 0.0
        assert model["tokens_per_s"] == pytest.approx(model["tokens"] / model["train_s"], rel=0.05)
    blocks = found.figures["models"]["BD3-LM, blocks of 4"]
    assert list(blocks["phase_tokens_per_s"]) == ["rows", "blocks"]
    assert json.loads(json.dumps(found.figures, allow_nan=False)) == found.figures
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")}
    again = measure(options(quick=True, words=f"--work {tmp_path}"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")} == before
    assert again == found


# The figure


def report() -> dict[str, Any]:
    """What a run would save."""
    models = {r.label: quality._shown(r) for r in results()}
    yardsticks = {"xz_bpb": 1.62, "unigram_bpb": 2.4}
    return {"figures": {"models": models, "yardsticks": yardsticks, "tokens": 8_192_000, "num_steps": 4000}}


def test_figure_has_every_model_with_its_bits_and_errors() -> None:
    svg = figures_quality.draw_quality(report())
    for model in results():
        assert f">{model.label}<" in svg
        assert (f">{model.bpb:.3f}<" if model.is_exact else f">{model.bpb:.3f} ± 0.010<") in svg
    assert svg.count('stroke-width="5"') == svg.count('stroke-width="1.5"') == svg.count("<circle") == len(MODELS)
    places = [float(part.partition('"')[0]) for part in svg.split('cx="')[1:]]
    assert sorted(range(5), key=lambda i: places[i]) == sorted(range(5), key=lambda i: list(BPB.values())[i])
    assert not math.isnan(sum(places))


def test_committed_figure_is_that_of_the_committed_result(tmp_path: Path) -> None:
    assert figures_quality.RESULT.exists() == figures_quality.OUT.exists()
    if figures_quality.RESULT.exists():
        figures_quality.main([str(tmp_path / "new.svg")])
        assert (tmp_path / "new.svg").read_bytes() == figures_quality.OUT.read_bytes()
