"""Figures over batches of 1, 7 and 32 rows: within 1e-5 of each other in float32, to the printed digit in float64."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import weights as interchange
from pipeline.evaluate.config import STAGE, EvaluateConfig
from pipeline.inference.likelihood import LikelihoodConfig, Request, score
from pipeline.inference.model import forget_models, open_model
from tests.support.model_kinds import KINDS, save_models
from tests.support.tiny_run import Artifacts, run_stage

pytestmark = pytest.mark.timeout(120)
BATCHES = (1, 7, 32)
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-10}
REQUESTS = [Request(range(20, 20 + i % 9), range(50 + i, 52 + i + i % 11), i) for i in range(15)]


@pytest.fixture(params=KINDS)
def asked(request: pytest.FixtureRequest, made: Artifacts, tmp_path: Path) -> Path:
    """Weights of one kind."""
    return save_models(tmp_path, made.tokenizer, request.param)[request.param]


def expect_alike(dtype: torch.dtype, found: Sequence[dict[str, float]]) -> None:
    """Standard errors too, though they are differences of sums."""
    first, *others = found
    for other in others:
        assert other == pytest.approx(first, rel=RELATIVE[dtype])


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_scores_of_answers_over_batch_sizes(dtype: torch.dtype, asked: Path, made: Artifacts) -> None:
    model = open_model(asked, made.tokenizer, "cpu")
    model.denoiser.to(dtype)
    config = LikelihoodConfig(num_masks=16)
    found = [score(model, REQUESTS, replace(config, batch_rows=rows)) for rows in BATCHES]
    for scores in zip(*found, strict=True):
        expect_alike(dtype, [{"nats": one.nats, "mc_se": one.mc_se} for one in scores])


@pytest.mark.parametrize("asked", ["masked", "shifted", "blocks"], indirect=True)
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_evaluation_over_batch_sizes(
    dtype: torch.dtype,
    asked: Path,
    made: Artifacts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    def load(path: Path) -> tuple[Any, interchange.ModelRecord]:
        model, record = interchange.load_denoiser(path)
        return model.to(dtype), record

    monkeypatch.setattr("pipeline.inference.model.load_denoiser", load)
    forget_models()  # of another precision
    request.addfinalizer(forget_models)
    inputs = {"weights": asked, "tokens": made.tokens, "tokenizer": made.tokenizer, "corpus": made.corpus}
    found: list[dict[str, float]] = []
    for rows in BATCHES:
        out = tmp_path / f"rows-{rows}"
        run_stage(STAGE, EvaluateConfig(device="cpu", batch_rows=rows), inputs, out)
        results = json.loads((out / "results.json").read_text())
        found.append({name: value for name, value in results.items() if isinstance(value, float)})
    expect_alike(dtype, found)
