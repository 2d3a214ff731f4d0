"""Imports with transformers 4.57 instead of the installed 5: what it saves is read, and it gives the same logits."""

import sys
from pathlib import Path

import pytest

from dlm_core.models.config import ModelConfig
from pipeline.artifact import load_manifest, read_json
from pipeline.import_checkpoint.config import STAGE, ImportConfig
from pipeline.logits_proof import in_fresh_process
from tests.pipeline.conftest import make_artifact
from tests.pipeline.test_import_diffusion import MODELS as DIFFUSION
from tests.pipeline.test_import_diffusion import random_model, record_of, write_source
from tests.support.hf_models import MODELS

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]


@pytest.fixture
def in_children(transformers4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh processes find it first; this one has imported what it has."""
    monkeypatch.setattr(sys, "path", [str(transformers4), *sys.path])


@pytest.mark.usefixtures("in_children")
@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_4_saves_is_imported_and_proved_by_it(name, tmp_path):
    source = tmp_path / "source"
    version = in_fresh_process("tests.support.hf_models:save_in_fresh_process", name, source)
    assert version.startswith("4.57.")
    assert "rope_theta" in read_json(source / "config.json")  # the older spelling
    stats = load_manifest(make_artifact(STAGE, ImportConfig(str(source)), {}, tmp_path / "out")).stats
    assert stats["proof"] == "logits"
    assert stats["logits_difference"] < 1e-5


@pytest.mark.usefixtures("in_children")
@pytest.mark.parametrize("name", ["llada", "dream", "llada_moe", "llada2"])
def test_diffusion_models_are_proved_by_transformers_4(name, tmp_path):
    family, a = DIFFUSION[name]
    model = random_model(ModelConfig(a, 23, 4))
    source = write_source(tmp_path / name, family, record_of(family, a), model)
    stats = load_manifest(make_artifact(STAGE, ImportConfig(str(source)), {}, tmp_path / "out")).stats
    assert stats["logits_difference"] < 1e-5
