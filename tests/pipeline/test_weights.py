"""Portable weights are loaded exactly or not at all."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.tensor_shapes import tensor_shapes
from dlm_core.models.transformer import Denoiser
from pipeline.artifact import MANIFEST, Manifest, load_manifest, record_files, write_json
from pipeline.data.special_tokens import SPECIAL_FILE, SpecialTokens, load_special_tokens
from pipeline.errors import CorruptionError, UserError
from pipeline.weights import (
    MODEL_FILE,
    WEIGHTS_FILE,
    ModelRecord,
    check_shapes,
    check_tokenizer,
    load_denoiser,
    load_record,
    save_record,
    save_weights,
    weights_writer,
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


def test_check_shapes_names_all_that_is_missing_unknown_or_misshapen() -> None:
    given = {name: tuple(value.shape) for name, value in tensors().items()}
    check_shapes(MODEL, given, "x")
    del given["norm.weight"]
    given["blocks.1.extra"] = (1,)
    given["embedding.weight"] = (12, 8)
    with pytest.raises(CorruptionError) as caught:
        check_shapes(MODEL, given, "the file")
    assert str(caught.value) == (
        "the weights in the file do not fit the model: norm.weight is missing; blocks.1.extra is unknown; "
        "embedding.weight has shape (12, 8), the model wants (11, 8)"
    )


def test_arrays_are_saved_as_tensors_are_and_the_library_reads_both(tmp_path: Path) -> None:
    given = tensors()
    for kind in (lambda tensor: tensor, lambda tensor: tensor.numpy(), lambda tensor: torch.nn.Parameter(tensor)):
        save_weights(tmp_path, {name: kind(tensor) for name, tensor in given.items()}, RECORD)
        found = load_file(tmp_path / WEIGHTS_FILE)
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], value) for name, value in given.items())


def test_a_model_is_held_once_while_it_is_loaded(tmp_path: Path) -> None:
    model = ModelConfig(Architecture(d_model=1024, num_layers=4, num_heads=8, d_ff=2048), 16_000, 15_999)
    size_bytes = 4 * model.num_params()
    assert size_bytes > 200e6
    with weights_writer(tmp_path, tensor_shapes(model)) as out:
        for name, shape in tensor_shapes(model).items():
            out.append(name, np.zeros(shape, np.float32))
    save_record(tmp_path, ModelRecord(model, 8, "masked_nelbo"))
    write_json(tmp_path / MANIFEST, Manifest("convert", "0" * 64, 1, {}, {}, record_files(tmp_path)))
    before, after = (int(line) for line in _in_a_process(_LOAD, str(tmp_path)).split())
    assert size_bytes < after - before < 1.25 * size_bytes


_LOAD = r"""
import re, sys
from pathlib import Path
from dlm_core.models.transformer import Denoiser
from pipeline.weights import load_denoiser
kept = lambda field: print(1024 * int(re.search(field + r":\s+(\d+) kB", open("/proc/self/status").read())[1]))
kept("VmRSS")
loaded = load_denoiser(Path(sys.argv[1]))
kept("VmHWM")
"""


def _in_a_process(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


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


def test_check_tokenizer_accepts_its_own_and_refuses_another(artifact: Path, made: Artifacts) -> None:
    own, special = load_manifest(made.tokenizer).fingerprint, load_special_tokens(made.tokenizer)
    mask, rows = special.mask_token_id, special.vocab_size

    def check(rows: int, mask: int | None, tokenizer: str = own) -> SpecialTokens:
        model = ModelConfig(MODEL.architecture, rows, mask)
        return check_tokenizer(ModelRecord(model, 6, "masked_nelbo", tokenizer=tokenizer), artifact, made.tokenizer)

    assert check(rows, mask) == check(rows + 3, mask) == check(rows, None) == special
    for other in ("f" * 64, ""):
        with pytest.raises(UserError, match=f"is not that of the weights in {artifact}"):
            check(rows, mask, other)
    with pytest.raises(UserError, match=f"ids up to {rows - 1}, but the embedding in .* has {rows - 1} rows"):
        check(rows - 1, mask)
    with pytest.raises(
        UserError, match=f"mask token of the model in .* is {mask + 1}, that of the tokenizer .* {mask}"
    ):
        check(rows, mask + 1)


def test_check_tokenizer_lets_a_model_without_a_mask_lack_the_last_row_if_that_is_the_mask(tmp_path: Path) -> None:
    weights = write_checkpoint(tmp_path / "given", rows=20)
    for place, is_fine in ((20, True), (19, True), (21, False), (3, True)):
        tokenizer = write_special_tokens(
            tmp_path / f"tokenizer-{place}", weights, SpecialTokens(place, 0, 0, max(20, place + 1))
        )
        record = load_record(weights)
        if is_fine:
            check_tokenizer(record, weights, tokenizer)
        else:
            with pytest.raises(UserError, match="ids up to 21, but the embedding"):
                check_tokenizer(record, weights, tokenizer)


def write_checkpoint(directory: Path, rows: int) -> Path:
    """Imported next-token weights without a mask."""
    directory.mkdir()
    model = ModelConfig(MODEL.architecture, rows, None)
    save_weights(directory, dict(Denoiser(model).state_dict()), ModelRecord(model, 6, "autoregressive_nll"))
    write_json(directory / MANIFEST, Manifest("import_checkpoint", "1" * 64, 1, {}, {}, record_files(directory)))
    return directory


def write_special_tokens(directory: Path, checkpoint: Path, special: SpecialTokens) -> Path:
    """The tokenizer of a checkpoint, as far as it is asked for."""
    directory.mkdir()
    (directory / SPECIAL_FILE).write_text(json.dumps(asdict(special)))
    inputs = {"checkpoint": load_manifest(checkpoint).fingerprint}
    write_json(directory / MANIFEST, Manifest("tokenizer", "2" * 64, 1, {}, inputs, record_files(directory)))
    return directory
