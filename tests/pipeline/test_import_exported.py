"""An export of this project is imported as what it was, by the manifest beside it, and only with the proved bytes."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import MANIFEST, load_manifest
from pipeline.errors import CorruptionError
from pipeline.export.config import STAGE as EXPORT
from pipeline.export.config import ExportConfig
from pipeline.import_checkpoint.config import STAGE, ImportConfig, external_data
from pipeline.weights import load_record
from tests.pipeline.conftest import damage, flip_bit, make_artifact
from tests.support.exports import LLADA2, LLAMA, NEXT_TOKEN, QWEN2, SHIFTED, Pair, weights_of
from tests.support.interchange import TRAINED, random_model, save_model
from tests.support.tiny_run import run_stage

WITHIN = {"within_documents": True}
SPOKEN = "7" * 64
"""Fingerprint of the tokenizer of the training."""


def _exported(pair: Pair, root: Path, mask: int | None = 0, **settings: Any) -> Path:
    record = {"tokenizer": SPOKEN, **pair.record}
    weights = save_model(root / "weights", random_model(pair.architecture, mask=mask), **record)
    config = ExportConfig(pair.family, "float32", proof="tensors", without_tokenizer=True, **settings)  # type: ignore[arg-type]
    return run_stage(EXPORT, config, {"weights": weights}, root / "exported")


def _import(source: Path, out: Path, proof: str = "tensors") -> Path:
    return make_artifact(STAGE, ImportConfig(str(source), proof=proof), {}, out)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "architecture", "record"),
    [
        ("qwen2", QWEN2, SHIFTED | WITHIN),
        ("llama", LLAMA, {}),
        ("llama", LLAMA, NEXT_TOKEN),
        ("dream", QWEN2, SHIFTED),
        ("llada", LLAMA, WITHIN),
        ("llada2", LLADA2, {}),
    ],
)
def test_an_export_is_imported_as_what_it_was_whatever_its_family(
    family: str, architecture: Any, record: Mapping[str, Any], tmp_path: Path
) -> None:
    exported = _exported(Pair(family, architecture, record), tmp_path)
    made = _import(exported, tmp_path / "out")
    before, after = load_record(tmp_path / "weights"), load_record(made)
    model = replace(after.model, architecture=before.model.architecture)  # which says more than a family does
    assert replace(after, model=model, lineage=after.lineage[:-1]) == before
    assert before.lineage == [TRAINED]
    last = after.lineage[-1]
    assert (last.kind, last.details["family"]) == ("imported", family)
    assert last.details["export"] == load_manifest(exported).fingerprint
    notices = load_manifest(made).stats["notices"]
    assert any("those that its manifest tells" in notice for notice in notices)
    assert not any("taken as a next-token model" in notice for notice in notices)
    assert any("Export the weights that it was made from again" in notice for notice in notices)
    assert not any("beside the config.json" in notice for notice in notices)  # which the manifest would not let pass


@pytest.mark.usefixtures("forked_proofs")
def test_a_shifted_diffusion_model_in_plain_tensors_proves_itself_against_the_causal_class(tmp_path: Path) -> None:
    made = _import(_exported(Pair("qwen2", QWEN2, SHIFTED), tmp_path), tmp_path / "out", proof="logits")
    assert load_manifest(made).stats["logits_difference"] < 1e-5


def test_the_tokenizer_that_went_into_an_export_is_that_of_its_import(tmp_path: Path) -> None:
    exported = _exported(Pair("llada", LLAMA), tmp_path)
    manifest = json.loads((exported / MANIFEST).read_text())
    assert manifest["stats"].pop("tokenizer") == SPOKEN  # an older version left it to the inputs
    manifest["inputs"]["tokenizer"] = "5" * 64
    (exported / MANIFEST).write_text(json.dumps(manifest))
    assert load_record(_import(exported, tmp_path / "out")).tokenizer == "5" * 64


def test_without_its_manifest_an_export_is_what_its_family_says(tmp_path: Path) -> None:
    exported = _exported(Pair("qwen2", QWEN2, SHIFTED), tmp_path)
    (exported / MANIFEST).unlink()
    made = _import(exported, tmp_path / "out")
    record = load_record(made)
    assert (record.objective, record.target_offset, len(record.lineage)) == ("autoregressive_nll", 0, 1)
    assert any("taken as a next-token model" in notice for notice in load_manifest(made).stats["notices"])


def test_a_manifest_that_is_not_of_an_export_is_not_looked_at(tmp_path: Path) -> None:
    exported = _exported(Pair("llama", LLAMA, NEXT_TOKEN), tmp_path, mask=None)
    (exported / MANIFEST).write_text(json.dumps({"manifest_version": 3, "name": "an extension of a browser"}))
    flip_bit(exported / "model.safetensors")
    assert load_record(_import(exported, tmp_path / "out")).lineage[0].details.get("export") is None


@pytest.mark.parametrize("pattern", ["model-00002-*.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_damaged_file_of_an_export_is_named(pattern: str, tmp_path: Path) -> None:
    exported = _exported(Pair("llada", LLAMA), tmp_path, max_shard_bytes=30_000)
    (path,) = exported.glob(pattern)
    if path.suffix == ".json":
        damage(path, lambda data: data.append(ord(" ")))  # the same JSON
    else:
        flip_bit(path)
    with pytest.raises(
        CorruptionError, match=rf"/{path.name} does not have the bytes .*take manifest.json out of a copy"
    ):
        _import(exported, tmp_path / "out")


@pytest.mark.parametrize(("name", "said"), [("objective", "masked_nelbo"), ("within_documents", True)])
def test_a_manifest_that_lacks_what_it_should_tell_is_told_as_damage_and_can_be_mended(
    name: str, said: Any, tmp_path: Path
) -> None:
    exported = _exported(Pair("llada", LLAMA), tmp_path)
    manifest = json.loads((exported / MANIFEST).read_text())
    del manifest["stats"][name]
    (exported / MANIFEST).write_text(json.dumps(manifest))
    words = rf"manifest\.json is not that of an export, .*: stats: {name} is missing.*Export the weights again, or say"
    with pytest.raises(CorruptionError, match=words):
        _import(exported, tmp_path / "out")
    manifest["stats"][name] = said
    (exported / MANIFEST).write_text(json.dumps(manifest))
    assert getattr(load_record(_import(exported, tmp_path / "mended")), name) == said


def test_the_tokenizer_of_a_training_goes_with_the_import_of_its_export(tokenizer: Path, tmp_path: Path) -> None:
    weights = weights_of(Pair("llada", LLAMA), tokenizer, tmp_path / "weights")
    bare = ExportConfig("llada", "float32", proof="tensors", without_tokenizer=True)
    made = _import(run_stage(EXPORT, bare, {"weights": weights}, tmp_path / "exported"), tmp_path / "back")
    whole = replace(bare, without_tokenizer=False)
    again = run_stage(EXPORT, whole, {"weights": made, "tokenizer": tokenizer}, tmp_path / "again")
    assert load_manifest(again).stats["tokenizer"] == load_manifest(tokenizer).fingerprint


def test_the_manifest_of_an_export_is_among_what_identifies_it(tmp_path: Path) -> None:
    exported = _exported(Pair("llada", LLAMA), tmp_path)
    assert MANIFEST in external_data(ImportConfig(str(exported)))["files"]
