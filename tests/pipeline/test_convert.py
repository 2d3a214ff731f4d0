"""The portable weights are the trained ones, and nothing damaged or foreign becomes weights."""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlm_core.models.transformer import Denoiser
from pipeline.artifact import MANIFEST, load_manifest, read_json, record_files, write_json
from pipeline.config import from_json, to_json
from pipeline.convert.config import STAGE, ConvertConfig
from pipeline.convert.prove import prove_logits
from pipeline.convert.run import run
from pipeline.errors import CorruptionError
from pipeline.logits_proof import in_fresh_process
from pipeline.stage import StageContext
from pipeline.tensor_files import read_header
from pipeline.training_state import CheckpointManifest, file_name, read_manifest, write_manifest
from pipeline.weights import WEIGHTS_FILE, load_denoiser, load_record
from tests.support.tiny_run import Artifacts, Gang, Payload, convert, forge, pretrain, run_gang, start_gang, tiny

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120), pytest.mark.usefixtures("forked_proofs")]
LAST = "checkpoints/step-00000020"
FILE = f"{LAST}/{file_name(0)}"


def trained_masters(trained: Path) -> dict[str, Tensor]:
    """What stands in the ranks' files, put together by their names."""
    shapes = read_json(trained / LAST / MANIFEST)["shapes"]
    found = {name: torch.full((int(torch.Size(shape).numel()),), float("nan")) for name, shape in shapes.items()}
    for path in sorted((trained / LAST).glob("*.safetensors")):
        for key, tensor in load_file(path).items():
            kind, name, start = key.split(":")
            if kind == "master":
                found[name][int(start) : int(start) + tensor.numel()] = tensor
    return {name: tensor.view(shapes[name]) for name, tensor in found.items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_weights_are_the_masters_in_the_files_of_the_ranks(
    alone: Path, pair: Path, tmp_path: Path, workers: int
) -> None:
    trained = alone if workers == 1 else pair
    made = convert(trained, tmp_path / "weights", proof="logits")
    found, wanted = load_file(made / WEIGHTS_FILE), trained_masters(trained)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, wanted[name]), name
    stats = load_manifest(made).stats
    assert stats == {
        "num_params": sum(t.numel() for t in found.values()),
        "tensors": len(found),
        "steps": [20],
        "proof": "logits",
    }


def test_a_record_tells_what_made_the_weights_after_all_that_was_before(copy: Path) -> None:
    before = {"kind": "imported", "details": {"family": "qwen2"}}
    manifest = load_manifest(copy)
    for lineage in ([], [before]):
        write_json(copy / MANIFEST, replace(manifest, stats={**manifest.stats, "lineage": lineage}))
        out = copy.with_name(f"weights-{len(lineage)}")
        found = load_record(run_gang(STAGE, ConvertConfig(proof="tensors"), {"pretrain": copy}, out)).lineage
        assert to_json(found[:-1]) == lineage
        assert found[-1].kind == "trained"
        details = found[-1].details
        assert details.pop("versions")["torch"]
        assert details == {
            "objective": "masked_nelbo",
            "training": manifest.fingerprint,
            "tokens": manifest.stats["tokens"],
            "weights": "last",
            "steps": [20],
            "optimizer_steps": 20,
        }


def convert_as(kind: Any, trained: Path) -> Gang:
    """Convert with a choice of weights."""
    return start_gang(STAGE, ConvertConfig(kind), {"pretrain": trained}, trained.with_name(f"weights-{kind}"))


def grown(trained: Path, change: Callable[[Path], None]) -> None:
    """Change the files of a training artifact; its manifest follows."""
    change(trained)
    manifest = load_manifest(trained)
    write_json(trained / MANIFEST, replace(manifest, files=record_files(trained)))


def test_the_running_average_is_taken_where_there_is_one(copy: Path) -> None:
    def add_average(trained: Path) -> None:
        path = trained / LAST / file_name(0)
        tensors = load_file(path)
        masters = {key: value for key, value in tensors.items() if key.startswith("master:")}
        save_file({**tensors, **{key.replace("master:", "ema:"): 2 * v for key, v in masters.items()}}, path)
        write_manifest(path.parent, replace(read_manifest(path.parent), files=record_files(path.parent)))

    grown(copy, add_average)
    gang = convert_as("ema", copy)
    assert gang.wait() == [0], gang.log()
    for name, tensor in trained_masters(copy).items():
        assert torch.equal(load_file(gang.out / WEIGHTS_FILE)[name], 2 * tensor)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("ema", "has kept no running average of its weights. Train with pretrain.optimizer.ema_decay"),
        ("average", "has kept no checkpoints to be averaged. Train with pretrain.average"),
    ],
)
def test_weights_that_were_not_kept_are_refused(copy: Path, kind: str, words: str) -> None:
    gang = convert_as(kind, copy)
    assert gang.wait() == [2]
    assert words in gang.log()


@pytest.mark.parametrize("weights", ["last", "average"])
def test_the_proof_by_logits_finds_one_bit_in_the_file_or_in_the_training(
    alone: Path, tmp_path: Path, weights: Any
) -> None:
    kept = {"last": alone, "average": _with_average(alone, tmp_path / "two")}[weights]
    out = convert(kept, tmp_path / "weights", weights)
    prove_logits(str(out), str(kept), weights)
    data = bytearray((out / WEIGHTS_FILE).read_bytes())
    info = read_header(out / WEIGHTS_FILE)["blocks.1.feed_forward.down.weight"]
    place = 8 + int.from_bytes(data[:8], "little") + info.start + 2
    data[place] ^= 64
    (out / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(CorruptionError, match=r"model\.safetensors do not give the logits of what they were made from"):
        in_fresh_process("pipeline.convert.prove:prove_logits", out, kept, weights)


def _with_average(trained: Path, copy: Path) -> Path:
    """A training that has kept its last checkpoint twice, with other numbers, to be averaged."""
    shutil.copytree(trained, copy)
    other = Path(shutil.copytree(copy / LAST, copy / "checkpoints/step-00000010"))
    tensors = {key: 3 * tensor + 1 for key, tensor in load_file(other / file_name(0)).items()}
    save_file(tensors, other / file_name(0))
    value = read_json(other / MANIFEST)
    del value["sha256"]
    changed = {**value, "step": 10, "files": to_json(record_files(other))}
    write_manifest(other, from_json(CheckpointManifest, changed))
    manifest = load_manifest(copy)
    stats = {**manifest.stats, "average_steps": [10, 20]}
    write_json(copy / MANIFEST, replace(manifest, stats=stats, files=record_files(copy)))
    return copy


def test_the_mean_over_checkpoints_is_that_of_float64(alone: Path, tmp_path: Path) -> None:
    kept = _with_average(alone, tmp_path / "two")
    found = load_file(convert(kept, tmp_path / "weights", "average") / WEIGHTS_FILE)
    for name, tensor in trained_masters(alone).items():
        other = 3 * tensor + 1
        assert torch.equal(found[name], ((tensor.double() + other.double()) / 2).float()), name


def test_a_proof_of_tensors_alone_is_told_and_starts_no_process(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.convert.run.in_fresh_process", lambda *given: pytest.fail("started"))
    context = StageContext(copy.with_name("weights"), copy.with_name("state"), "f")
    context.out.mkdir()
    stats = run(ConvertConfig(proof="tensors"), {"pretrain": copy}, context)
    assert stats["proof"] == "tensors"


def test_a_tensor_that_changes_on_the_way_to_the_disk_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = StageContext(copy.with_name("weights"), copy.with_name("state"), "f")
    context.out.mkdir()

    def save_and_spoil(directory: Path, record: Any) -> None:
        flip(directory / WEIGHTS_FILE)

    monkeypatch.setattr("pipeline.convert.run.save_record", save_and_spoil)
    with pytest.raises(CorruptionError, match=r"\w+\.weight changed on the way to model\.safetensors"):
        run(ConvertConfig(proof="tensors"), {"pretrain": copy}, context)


def test_converted_model_gives_the_logits_of_the_trained_one(alone: Path, weights: Path, made: Artifacts) -> None:
    model, record = load_denoiser(weights)
    assert record.seq_len == 32
    assert record.tokenizer == load_manifest(made.tokenizer).fingerprint
    trained = Denoiser(record.model)
    trained.load_state_dict(trained_masters(alone))
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
@pytest.mark.parametrize("name", [FILE, f"{LAST}/{MANIFEST}", "model_config.json"])
def test_a_damaged_training_is_refused_by_the_name_of_the_file(
    copy: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(copy / name)
    gang = refused(copy, code=2)
    assert f"convert: {copy / name}" in gang.log()
    assert "Traceback" not in gang.log()


def test_a_pickle_that_runs_code_is_refused_although_its_hash_is_right(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (copy / FILE).write_bytes(pickle.dumps({"master": Payload(marker)}))
    forge(copy / LAST, file_name(0))
    forge(copy, FILE, f"{LAST}/{MANIFEST}")
    assert f"{copy / FILE} is not a file of training state" in refused(copy, code=2).log()
    assert not marker.exists()


def test_a_file_that_was_damaged_before_the_training_recorded_it_is_refused(copy: Path) -> None:
    flip(copy / FILE)
    forge(copy, FILE)
    assert f"{copy / FILE} was damaged between its saving and the end of the training" in refused(copy, code=2).log()


def test_a_training_without_a_checkpoint_is_refused(copy: Path) -> None:
    grown(copy, lambda trained: shutil.rmtree(trained / "checkpoints"))
    assert f"{copy} has no checkpoint" in refused(copy, code=2).log()


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
