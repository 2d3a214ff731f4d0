"""Small GGUF files become ours, and only if transformers makes the whole model of them."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from pipeline.artifact import file_sha256, load_manifest, read_json
from pipeline.errors import CorruptionError, UserError
from pipeline.import_checkpoint import fetch
from pipeline.import_checkpoint.config import STAGE, ImportConfig, external_data
from pipeline.import_checkpoint.run import SOURCE_CONFIG
from pipeline.weights import load_record
from tests.pipeline.conftest import make_artifact
from tests.support.gguf_logits import write_tiny

pytestmark = pytest.mark.usefixtures("forked_proofs")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SINGLE = "model.safetensors"


def _import(source: Path | str, out: Path, **settings: Any) -> Path:
    """Without the proof by logits, which takes seconds."""
    return make_artifact(STAGE, ImportConfig(**{"path": str(source), "proof": "tensors", **settings}), {}, out)


def test_gguf_files_that_are_not_there_or_cannot_be_read_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"there is no file .*x\.gguf"):
        external_data(ImportConfig(str(tmp_path), gguf_file="x.gguf"))
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert external_data(ImportConfig(str(file))) == external_data(ImportConfig(str(tmp_path), gguf_file="x.gguf"))
    with pytest.raises(UserError, match=r"path names .* already"):
        external_data(ImportConfig(str(file), gguf_file="x.gguf"))
    with pytest.raises(UserError, match=r"the name of a \.gguf file is wanted"):
        external_data(ImportConfig(str(tmp_path), gguf_file="x.bin"))
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs transformers and gguf and accelerate: pip install 'dlm\[hf\]'"):
        _import(file, tmp_path / "out")


def test_a_gguf_file_is_dequantised_and_its_tokenizer_written(tmp_path):
    file = tmp_path / "tiny.gguf"
    tensors = write_tiny(file)
    made = _import(file, tmp_path / "out")
    found, record = load_file(made / SINGLE), load_record(made)
    a = record.model.architecture
    assert (a.d_model, a.num_heads, a.kv_heads, a.rope_base, a.tied_head) == (64, 4, 2, 500.0, True)
    assert torch.equal(found["embedding.weight"], torch.from_numpy(tensors["token_embd"]))
    assert torch.equal(found["blocks.1.feed_forward.down.weight"], torch.from_numpy(tensors["blk.1.ffn_down"]))
    qkv = torch.cat([torch.from_numpy(tensors[f"blk.1.attn_{name}"]) for name in "qkv"])
    assert torch.equal(found["blocks.1.attention.qkv.weight"], qkv)
    assert Tokenizer.from_file(str(made / "tokenizer.json")).get_vocab_size() == record.model.vocab_size == 261
    assert set(record.lineage[0].details["sha256"]) == {"tiny.gguf"}
    assert record.lineage[0].details["dequantised_from"] == "tiny.gguf"
    assert record.lineage[0].details["dtype"] == ["F32", "Q8_0"]


# What is not all that a model is made of


def test_a_tensor_of_another_size_is_not_replaced_by_a_drawn_one(tmp_path):
    write_tiny(tmp_path / "x.gguf", tensors={"blk.1.ffn_up.weight": (32, 64)})
    with pytest.raises(UserError, match=r"x\.gguf: .*mismatched_keys: .*layers\.1\.mlp\.up_proj\.weight"):
        _import(tmp_path / "x.gguf", tmp_path / "out")


def test_a_header_that_is_cut_is_told_as_damage(tmp_path):
    write_tiny(tmp_path / "x.gguf")
    whole = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[:3000])
    with pytest.raises(CorruptionError, match=r"x\.gguf has a damaged header, or is cut"):
        _import(tmp_path / "x.gguf", tmp_path / "out")


def test_a_dequantisation_that_was_killed_says_what_took_the_memory(tmp_path, monkeypatch):
    write_tiny(tmp_path / "x.gguf")
    killed = subprocess.CompletedProcess("", -signal.SIGKILL, "", "")
    monkeypatch.setattr("pipeline.logits_proof._call", lambda arguments: killed)
    with pytest.raises(MemoryError, match=r"holds the whole model in float32\..*Import the safetensors") as raised:
        _import(tmp_path / "x.gguf", tmp_path / "out")
    assert "proof" not in str(raised.value)


# What the file does not say


def test_chosen_experts_of_a_qwen3_moe_are_weighted_to_a_sum_of_1_and_a_notice_says_so(tmp_path):
    tensors = write_tiny(tmp_path / "x.gguf", "qwen3moe")
    made = _import(tmp_path / "x.gguf", tmp_path / "out")
    moe = load_record(made).model.architecture.moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.renormalise) == (4, 2, True)
    assert read_json(made / SOURCE_CONFIG)["norm_topk_prob"] is True
    gate, up, down = (torch.from_numpy(tensors[f"blk.1.ffn_{name}_exps"]) for name in ("gate", "up", "down"))
    found = load_file(made / SINGLE)
    assert torch.equal(found["blocks.1.feed_forward.experts.gate_up_proj"], torch.cat([gate, up], dim=1))
    assert torch.equal(found["blocks.1.feed_forward.experts.down_proj"], down)
    assert any("norm_topk_prob" in notice for notice in load_manifest(made).stats["notices"])


def test_an_import_without_a_tokenizer_says_so_and_ids_that_the_file_does_not_name_are_not_known(tmp_path):
    without = {"tokenizer.ggml.pre": "default", "tokenizer.ggml.eos_token_id": None}
    write_tiny(tmp_path / "x.gguf", keys=without)
    made = _import(tmp_path / "x.gguf", tmp_path / "out")
    assert not (made / "tokenizer.json").exists()
    ids = load_manifest(made).stats["special_ids"]
    assert (ids["bos"], ids["eos"], ids["pad"]) == (1, None, None)
    notices = load_manifest(made).stats["notices"]
    assert any("of which no cut of text is known here" in notice for notice in notices)
    assert any(notice.endswith("Import the safetensors that it was made from") for notice in notices)
    assert not any("beside the config.json" in notice for notice in notices)


# Where it comes from


def test_files_beside_a_gguf_file_are_not_read_and_its_own_bytes_are_the_lineage(tmp_path, monkeypatch):
    import huggingface_hub
    import transformers

    source = tmp_path / "source"
    source.mkdir()
    write_tiny(source / "tiny.gguf")
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 7, "pad_token": "he"}))
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 77}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(source))
    made = _import(f"hf:somebody/model@{COMMIT}", tmp_path / "out", gguf_file="tiny.gguf")
    details = load_record(made).lineage[0].details
    assert details["sha256"] == {"tiny.gguf": file_sha256(source / "tiny.gguf")}
    assert details["dequantised_from"] == "tiny.gguf"
    assert details["license"] == "mit"
    assert details["dequantised_by"] == f"transformers {transformers.__version__}"
    assert read_json(made / "tokenizer_config.json").get("model_max_length") != 7
    assert load_manifest(made).stats["special_ids"]["eos"] == 2
    assert "77" not in (made / "generation_config.json").read_text()
