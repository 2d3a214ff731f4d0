"""Portable weights are loaded exactly or not at all."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.transformer import Denoiser
from pipeline.artifact import MANIFEST, Manifest, record_files, write_json
from pipeline.errors import CorruptionError, UserError
from pipeline.weights import (
    MODEL_FILE,
    WEIGHTS_FILE,
    ModelRecord,
    check_tensors,
    check_tokenizer,
    load_denoiser,
    load_record,
    save_weights,
)
from tests.support.tiny_run import Artifacts, forge

MODEL = ModelConfig(Architecture(d_model=8, num_layers=1, num_heads=2, d_ff=8), vocab_size=11, mask_token_id=10)
RECORD = ModelRecord(MODEL, seq_len=6, objective="masked_nelbo", tokenizer="f" * 64)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of MODEL."""
    model = Denoiser(MODEL)
    model.init_weights(seed)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Committed weights."""
    directory = tmp_path / "weights"
    directory.mkdir()
    save_weights(directory, tensors(), RECORD)
    write_json(directory / MANIFEST, Manifest("convert", "0" * 64, 1, {}, {}, record_files(directory)))
    return directory


def test_weights_come_back_bit_for_bit_and_ready_to_evaluate(artifact: Path) -> None:
    model, record = load_denoiser(artifact)
    assert record == load_record(artifact) == RECORD
    assert not model.training
    found = model.state_dict()
    assert found.keys() == tensors().keys()
    assert all(torch.equal(found[name], value) for name, value in tensors().items())


def test_check_tensors_names_all_that_is_missing_unknown_or_misshapen() -> None:
    given = tensors()
    check_tensors(Denoiser(MODEL), given, "x")
    del given["norm.weight"]
    given["blocks.1.extra"] = torch.zeros(1)
    given["embedding.weight"] = torch.zeros(12, 8)
    with pytest.raises(CorruptionError) as caught:
        check_tensors(Denoiser(MODEL), given, "the file")
    assert str(caught.value) == (
        "the weights in the file do not fit the model: norm.weight is missing; blocks.1.extra is unknown; "
        "embedding.weight has shape (12, 8), the model wants (11, 8)"
    )


def test_a_tensor_that_is_missing_is_refused_on_loading(artifact: Path) -> None:
    given = tensors()
    del given["blocks.0.attention.qkv.weight"]
    save_weights(artifact, given, RECORD)
    forge(artifact, WEIGHTS_FILE)
    with pytest.raises(CorruptionError, match=r"blocks\.0\.attention\.qkv\.weight is missing"):
        load_denoiser(artifact)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, MODEL_FILE])
@pytest.mark.parametrize("change", ["flip", "cut"])
def test_a_damaged_file_is_refused_before_it_is_parsed(artifact: Path, name: str, change: str) -> None:
    data = bytearray((artifact / name).read_bytes())
    if change == "flip":
        data[-3] ^= 1
    else:
        del data[-7:]
    (artifact / name).write_bytes(data)
    with pytest.raises(CorruptionError, match=f"{name} does not have the bytes that were committed"):
        load_denoiser(artifact)


def test_a_model_record_with_an_unknown_field_or_a_wrong_size_is_refused(artifact: Path) -> None:
    value = json.loads((artifact / MODEL_FILE).read_text())
    for change, words in (({"sequence": 1}, "sequence"), ({"seq_len": "long"}, "seq_len")):
        (artifact / MODEL_FILE).write_text(json.dumps({**value, **change}))
        forge(artifact, MODEL_FILE)
        with pytest.raises(UserError, match=rf"{MODEL_FILE}.*{words}"):
            load_record(artifact)


def test_weights_without_a_manifest_are_no_artifact(artifact: Path) -> None:
    (artifact / MANIFEST).unlink()
    with pytest.raises(UserError, match="not a finished artifact"):
        load_denoiser(artifact)


def test_check_tokenizer_refuses_another_and_accepts_its_own_or_none(made: Artifacts) -> None:
    own = json.loads((made.tokenizer / MANIFEST).read_text())["fingerprint"]
    for known in (own, ""):
        check_tokenizer(ModelRecord(MODEL, 6, "masked_nelbo", tokenizer=known), made.tokenizer)
    with pytest.raises(UserError, match="trained with another tokenizer"):
        check_tokenizer(RECORD, made.tokenizer)
