"""The portable weights are the trained ones, and nothing damaged or foreign becomes weights."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dlm_core.models.transformer import Denoiser
from pipeline.artifact import MANIFEST, load_manifest, read_json, write_json
from pipeline.convert.config import STAGE, ConvertConfig
from pipeline.weights import WEIGHTS_FILE, load_denoiser
from tests.support.tiny_run import Artifacts, Gang, Payload, convert, forge, pretrain, start_gang, tiny

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
MODEL_STATES = "checkpoint/ds/mp_rank_00_model_states.pt"
OPTIMIZER_STATES = "checkpoint/ds/zero_pp_rank_0_mp_rank_00_optim_states.pt"


def trained_module(trained: Path) -> dict[str, Tensor]:
    """The module as DeepSpeed saved it whole beside the shards: in fp32 it is what the shards add up to."""
    return torch.load(trained / MODEL_STATES, weights_only=False)["module"]


@pytest.mark.parametrize("workers", [1, 2])
def test_weights_from_the_shards_are_those_of_the_trained_module(
    alone: Path, weights: Path, pair: Path, tmp_path: Path, workers: int
) -> None:
    trained = alone if workers == 1 else pair
    made = weights if workers == 1 else convert(pair, tmp_path / "weights")
    found, wanted = load_file(made / WEIGHTS_FILE), trained_module(trained)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, wanted[name]), name
    manifest = load_manifest(made)
    assert manifest.stats == {"num_params": sum(t.numel() for t in found.values()), "tensors": len(found)}


def test_converted_model_gives_the_logits_of_the_trained_one(alone: Path, weights: Path, made: Artifacts) -> None:
    model, record = load_denoiser(weights)
    assert record.seq_len == 32
    assert record.tokenizer == load_manifest(made.tokenizer).fingerprint
    trained = Denoiser(record.model)
    trained.load_state_dict(trained_module(alone))
    fresh = Denoiser(record.model)
    fresh.init_weights(tiny().init_seed)
    xt = torch.arange(3 * 32).view(3, 32) * 7 % record.model.vocab_size
    with torch.no_grad():
        assert torch.equal(model(xt), trained(xt))
        assert not torch.allclose(model(xt), fresh(xt), atol=0.1), "training changed nothing: a weak test"


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_weights_of_other_zero_stages_are_those_of_one_worker(
    weights: Path, made: Artifacts, tmp_path: Path, zero_stage: Any
) -> None:
    trained = pretrain(tiny(workers=2, zero_stage=zero_stage), made, tmp_path / "pretrain")
    found, wanted = load_file(convert(trained, tmp_path / "weights") / WEIGHTS_FILE), load_file(weights / WEIGHTS_FILE)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-4, rtol=1e-3)


@pytest.fixture
def copy(alone: Path, tmp_path: Path) -> Path:
    """A copy of the trained artifact, to be damaged."""
    return Path(shutil.copytree(alone, tmp_path / "pretrain"))


def refused(trained: Path, code: int) -> Gang:
    """Convert, which must fail with an exit code and without an artifact."""
    gang = start_gang(STAGE, ConvertConfig(), {"pretrain": trained}, trained.with_name("weights"))
    assert gang.wait() == [code], gang.log()
    assert not (gang.out / MANIFEST).exists()
    return gang


def flip(path: Path) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Lose the end."""
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", [OPTIMIZER_STATES, MODEL_STATES, "model_config.json"])
def test_a_damaged_training_is_refused_by_the_name_of_the_file(
    copy: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(copy / name)
    gang = refused(copy, code=2)
    assert f"convert: {copy / name}" in gang.log()
    assert "Traceback" not in gang.log()


@pytest.mark.parametrize("name", [OPTIMIZER_STATES, MODEL_STATES])
def test_a_pickle_that_runs_code_is_refused_although_its_hash_is_right(copy: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    value = torch.load(copy / name, weights_only=False)
    torch.save({**value, "extra": Payload(marker)}, copy / name)
    forge(copy, name)
    assert "UnpicklingError" in refused(copy, code=3).log()
    assert not marker.exists()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_layers", 3, "blocks.2.attention.out.weight is missing"),
        ("num_layers", 1, "blocks.1.attention.out.weight is unknown"),
        ("d_ff", 32, "blocks.0.feed_forward.down.weight has shape (32, 64), the model wants (32, 32)"),
    ],
)
def test_a_training_that_does_not_fit_its_configuration_is_refused_by_tensor(
    copy: Path, field: str, value: int, words: str
) -> None:
    config = read_json(copy / "model_config.json")
    config["architecture"][field] = value
    write_json(copy / "model_config.json", config)
    forge(copy, "model_config.json")
    assert words in refused(copy, code=2).log()
