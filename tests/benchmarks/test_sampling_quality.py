"""Curves of quality: what is said of rows, which samplers are in them, and the figure."""

import json
import math
from typing import get_args
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import sampling_quality
from benchmarks.command import Options
from benchmarks.figures_sampling import FAMILIES, draw_sampling
from benchmarks.sampling_scores import distinct, next_token_nll, row_entropy, score
from dlm_core.models.attention import AttentionMask
from dlm_core.models.presets import PRESETS, tiny
from dlm_core.models.transformer import Denoiser
from pipeline.data.special_tokens import SpecialTokens
from pipeline.inference.rules import make_rule
from pipeline.inference.sampler import Kind
from pipeline.pretrain.config import ValidationConfig
from workflows.recipes.quickstart import quickstart

SHOWN = {label: name for family in FAMILIES.values() for label, name in family.items()}
RTOL = 1e-5  # float32 sums

pytestmark = pytest.mark.usefixtures("one_thread")


def _model(seed: int) -> Denoiser:
    model = Denoiser(tiny(PRESETS["llada-8b"])).eval()
    model.init_weights(seed)
    return model


@torch.no_grad()
def test_next_token_nll_is_the_chain_rule_token_by_token():
    model, eos = _model(0), 5
    x0 = torch.randint(60, (3, 6), generator=torch.Generator().manual_seed(1))
    found = next_token_nll(model, x0, eos)
    for row in range(3):
        seen = [eos, *x0[row].tolist()]
        for place in range(6):
            logits = model(torch.tensor([seen[: place + 1]]), mask=AttentionMask("causal"))[-1].double()
            expected = -float(logits.log_softmax(dim=-1)[seen[place + 1]])
            assert float(found[row, place]) == pytest.approx(expected, rel=RTOL)


@torch.no_grad()
def test_scores_are_means_over_tokens_and_rows():
    x0 = torch.randint(60, (40, 6), generator=torch.Generator().manual_seed(1))
    found = score(x0, _model(0), _model(1), mask_token_id=63, eos_token_id=5)
    nll = next_token_nll(_model(0), x0, 5)
    assert found.nll == pytest.approx(float(nll.mean()), rel=RTOL)
    assert found.ppl == pytest.approx(math.exp(found.nll))
    assert found.nll_se == pytest.approx(float(nll.mean(dim=1).std()) / math.sqrt(40), rel=RTOL)
    assert abs(found.bound - math.log(63)) < 0.5  # a drawn model knows nothing
    assert 0 < found.bound_mc_se < 0.1


def test_entropy_and_distinct_n_grams_of_rows_that_can_be_counted():
    assert float(row_entropy(torch.tensor([3, 3, 3, 3]))) == 0.0
    assert float(row_entropy(torch.tensor([1, 2, 3, 4]))) == pytest.approx(math.log(4))
    x0 = torch.tensor([[1, 2, 1, 2], [2, 1, 2, 9]])
    assert distinct(x0, 2) == 3 / 6  # 12 21 29; none goes over the end of a row
    assert distinct(x0, 3) == 3 / 4


def test_every_kind_of_sampler_is_in_the_curves_and_makes_a_rule():
    found = sampling_quality.curves([8, 128], num_samples=2)
    configs = [config for curve in found for config in curve.points]
    assert {config.sampler.kind for config in configs} == set(get_args(Kind))
    assert {config.cache for config in configs} >= {"prefix", "dual"}
    assert all(make_rule(config.sampler, SpecialTokens(3, 1, 2, 4)) for config in configs)
    assert len({curve.label for curve in found}) == len(found)
    assert SHOWN.keys() == {curve.label for curve in found}


def test_trainings_are_those_of_the_quickstart_but_for_the_validation():
    training = sampling_quality.full()
    pretrain = next(step.config for step in quickstart().steps if step.name == "pretrain")
    assert (training.pretrain.architecture, training.pretrain.num_steps) == (pretrain.architecture, pretrain.num_steps)
    assert training.pretrain.validation == ValidationConfig()
    assert training.packing.seq_len == 128


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--weights", "w", "--tokens", "t"], "--scorer, --tokenizer missing"),
        (["--tokenizer", "w"], "--weights, --scorer, --tokens missing"),
    ],
)
def test_a_part_of_the_artifacts_is_refused(argv, message):
    own = sampling_quality.arguments().parse_args(argv)
    with pytest.raises(ValueError, match=f"{message}: give all of"):
        sampling_quality.measure(Options(quick=True, text=(), own=own))


def test_figure_has_a_line_a_sampler_and_the_level_of_text_for_perplexity_and_entropy():
    point = {"ppl": 50.0, "unigram_entropy": 4.0}
    curves = {label: [{**point, "nfe": 8.0}, {**point, "nfe": 64.0, "unigram_entropy": 3.0}] for label in SHOWN}
    report = {"figures": {"curves": curves, "text": {**point, "ppl": 30.0}, "num_samples": 4, "seq_len": 64}}
    drawn = ElementTree.fromstring(draw_sampling(report))
    kept = [element for element in drawn.iter() if element.get("class") == "curve"]
    assert len(kept) == 2 * len(SHOWN)
    words = [element.text for element in drawn.iter() if element.text]
    assert set(words) >= {*FAMILIES, *SHOWN.values()}
    assert words.count("held-out text") == 2
    curves["another"] = curves["random"]
    with pytest.raises(ValueError, match="another has no column; FAMILIES has In random order, "):
        draw_sampling(report)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quick_run_trains_both_models_and_scores_every_sampler(tmp_path):
    own = sampling_quality.arguments().parse_args(["--work", str(tmp_path)])
    measured = sampling_quality.measure(Options(quick=True, text=(), own=own))
    labels = [curve.label for curve in sampling_quality.curves([4, 16], 4)]
    assert list(measured.figures["curves"]) == labels
    assert measured.ratios.keys() == {"ancestral_ppl_over_text"}
    assert all(point["nfe"] > 0 for points in measured.figures["curves"].values() for point in points)
    json.dumps(measured.figures)
