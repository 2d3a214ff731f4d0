"""The benchmark of conversions: what it writes is a checkpoint, what it measures is a process's own peak."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import conversion, conversion_files, process
from benchmarks.command import Options, RefusedError
from benchmarks.conversion import CASES, Peak
from benchmarks.conversion_files import write_family, write_training
from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.transformer import Denoiser
from pipeline.artifact import read_json
from pipeline.convert.gather import gather
from pipeline.hf_config import read_config
from pipeline.import_checkpoint.source import check_index, find_source
from pipeline.repack import check_theirs
from pipeline.tensor_files import TensorFiles

TINY = ModelConfig(Architecture(8, 2, 2, d_ff=12), 19, 18)
CONVERSIONS = [
    *(f"{name} -> interchange" for name in CASES),
    *(f"interchange -> {name}" for name in CASES),
    *(f"training -> interchange, {weights}" for weights in ("last", "ema", "average")),
]


@pytest.mark.parametrize("file_bytes", [400, 10**9])
def test_files_are_those_of_the_family_with_different_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int
):
    monkeypatch.setattr(conversion_files, "FILE_BYTES", file_bytes)
    write_family("llama", TINY, tmp_path)
    paths = sorted(tmp_path.glob("*.safetensors"))
    files = TensorFiles(paths)
    check_theirs("llama", TINY, files)
    check_index(find_source(tmp_path), files)
    found = read_config(read_json(tmp_path / "config.json")).model
    assert found == replace(TINY, architecture=replace(TINY.architecture, init="normal"))
    assert (len(paths) > 1) == (file_bytes == 400)
    assert {files.info(name).dtype for name in files.names} == {"BF16"}
    assert files.read("model.embed_tokens.weight").std() > 0.1


@pytest.mark.parametrize("workers", [1, 3, 50])
@pytest.mark.parametrize("weights", ["last", "ema", "average"])
def test_a_training_that_is_made_up_has_all_weights_of_its_model(tmp_path: Path, workers: int, weights):
    write_training(TINY, tmp_path, workers)
    found = gather(weights, tmp_path)
    assert {name: list(shape) for name, shape in found.shapes.items()} == {
        name: list(tensor.shape) for name, tensor in Denoiser(TINY).state_dict().items()
    }
    values = torch.from_numpy(next(found.blocks("embedding.weight")))
    assert values.std() > 0.1
    assert found.steps == ([10, 20] if weights == "average" else [20])


def test_the_peak_is_that_of_the_process_and_of_nothing_else(tmp_path: Path):
    ballast = b"x" * 700_000_000
    peaks = []
    for size in (1, 300_000_000):
        process.run_program("tests.support.fresh:hold", str(size), log=tmp_path / "log")
        peaks.append(int((tmp_path / "log").read_text().splitlines()[-1]))
    assert len(ballast) > peaks[1] > peaks[0] + 290_000_000


def test_text_and_checkpoints_that_are_too_small_are_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="--text"):
        conversion.measure(Options(quick=True, text=(Path("x"),)))
    monkeypatch.setattr(conversion, "_both_ways", lambda name, *rest: [Peak(name, 10**9, 5, 10.0, 1.0)])
    monkeypatch.setattr(conversion, "_from_training", lambda *given: [Peak("training", 3 * 10**9, 20, 10.0, 1.0)])
    with pytest.raises(RefusedError, match="checkpoints of Llama, Qwen3-MoE have less than 2 GB"):
        conversion.measure(Options(quick=False, text=()))
    measured = conversion.measure(Options(quick=True, text=()))
    assert measured.ratios["peak_over_bound_training"] == 2.0
    assert "1000" in measured.table


def test_a_conversion_that_fails_is_no_measurement(tmp_path: Path):
    with pytest.raises(RefusedError, match="ended with exit code"):
        conversion._peak("x", 1, 1.0, tmp_path, "to_interchange", '{"path": "/absent"}', str(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_conversion_stays_within_its_bound():
    measured = conversion.measure(Options(quick=True, text=()))
    assert set(measured.figures) == set(CONVERSIONS)
    assert len(measured.ratios) == len(CONVERSIONS)
    assert all(0.1 < ratio < 1.0 for ratio in measured.ratios.values())
