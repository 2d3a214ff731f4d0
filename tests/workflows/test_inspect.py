"""``dlm inspect``: what weights are, of every kind, without loading them."""

import contextlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dlm_core.models.config import Architecture
from pipeline.artifact import load_manifest
from pipeline.config import apply_settings, from_json, parse_value
from pipeline.data.special_tokens import load_special_tokens
from pipeline.errors import CorruptionError, UserError
from pipeline.gguf_header import read_gguf_header
from tests.support.exports import BLOCKS, LLADA2, LLAMA, PAIRS, QWEN2, SHIFTED, Pair, export, weights_of
from tests.support.hf_models import save_peer
from tests.support.interchange import TRAINED, random_model, save_model
from tests.support.tiny_run import TINY, Artifacts
from tests.workflows.conftest import Dlm
from workflows.recipes import load_recipe

ROOT = Path(__file__).parents[2]


def facts(text: str) -> dict[str, str]:
    """Name -> value of the lines before the first empty one."""
    lines = text.split("\n\n")[0].splitlines()
    return {line.split("  ")[0]: line.partition("  ")[2].strip() for line in lines}


def test_interchange_weights_tell_all_that_their_record_has(dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path) -> None:
    weights = weights_of(
        Pair("llada2", LLADA2, {**BLOCKS, "within_documents": True}), tokenizer_artifact, tmp_path / "weights"
    )
    done = dlm("inspect", str(weights))
    assert done.code == 0, done.stderr
    found = facts(done.stdout)
    rows = load_special_tokens(tokenizer_artifact).vocab_size + 3
    model = random_model(LLADA2, rows).config
    assert found["kind"] == "interchange weights, of the stage convert"
    assert found["parameters"].startswith(f"{model.num_params():,}, {model.num_active_params():,} active for a token; ")
    assert f"{16 * rows:,} in the embedding, and as many in the head" in found["parameters"]
    assert "moe.num_experts 8" in found["architecture"]
    assert found["vocabulary"] == f"{rows} rows"
    assert found["mask token"] == str(load_special_tokens(tokenizer_artifact).mask_token_id)
    assert found["target_offset"] == "0: position l predicts token l"
    attention = "block-causal: a block of 4 tokens sees itself and the blocks before it, within its document"
    assert found["attention"] == attention
    assert found["seq_len"] == "32"
    assert found["dtype"] == "F32"
    assert found["tokenizer"] == f"artifact {load_manifest(tokenizer_artifact).fingerprint[:12]}"
    assert found["lineage"] == "1. trained: objective masked_nelbo; steps 20; tokens 5,120; weights last"


@pytest.mark.parametrize(
    "architecture", [LLADA2, LLAMA, PAIRS["llama-llama"].architecture], ids=["moe", "dense", "stretched"]
)
def test_the_printed_setting_gives_a_training_this_architecture(
    architecture: Architecture, dlm: Dlm, tmp_path: Path
) -> None:
    weights = save_model(tmp_path / "weights", random_model(architecture))
    shown = json.loads(dlm("inspect", str(weights), "--json").stdout)
    path, _, value = shown["setting"].partition("=")
    assert path == "pretrain.architecture"
    recipe = {step.name: step.config for step in load_recipe("llada_moe_tiny").steps}
    for training in (recipe["pretrain"], TINY):
        config = apply_settings({"pretrain": training}, [(path, parse_value(value))])["pretrain"]
        assert config.architecture == architecture
    assert "--set 'pretrain.architecture={" in dlm("inspect", str(weights)).stdout


def test_json_has_the_record_and_every_tensor(dlm: Dlm, tmp_path: Path) -> None:
    model = random_model(LLAMA)
    weights = save_model(tmp_path / "weights", model, **SHIFTED)
    shown = json.loads(dlm("inspect", str(weights), "--json").stdout)
    assert from_json(Architecture, shown["record"]["model"]["architecture"]) == LLAMA
    assert shown["record"]["target_offset"] == 1
    assert shown["record"]["lineage"][0]["details"] == TRAINED.details
    assert shown["num_params"] == sum(p.numel() for p in model.parameters())
    assert {name: tensor["shape"] for name, tensor in shown["tensors"].items()} == {
        name: list(tensor.shape) for name, tensor in model.state_dict().items()
    }
    listed = dlm("inspect", str(weights), "--tensors").stdout
    assert all(name in listed for name in model.state_dict())
    assert "blocks.0.attention.qkv.weight" not in dlm("inspect", str(weights)).stdout


def test_a_training_tells_what_it_trained(dlm: Dlm, alone: Path) -> None:
    found = facts(dlm("inspect", str(alone)).stdout)
    stats = load_manifest(alone).stats
    assert found["kind"] == "training, of the stage pretrain"
    assert found["objective"] == "masked_nelbo"
    assert found["tokens"] == str(stats["tokens"])
    assert found["final_loss"] == f"{stats['final_loss']:.6g}"
    assert "average_steps" not in found  # there are none
    assert found["parameters"].startswith(f"{stats['num_params']:,}; ")


def test_a_directory_of_transformers_is_told_in_our_words(dlm: Dlm, tmp_path: Path) -> None:
    source = save_peer("qwen3_moe", tmp_path / "source", dtype="bfloat16", shard_bytes=4000)
    found = facts(dlm("inspect", str(source)).stdout)
    assert found["family"] == "qwen3_moe"
    assert found["mask token"] == "none yet"
    assert found["objective"] == "autoregressive_nll"
    assert found["target_offset"] == "0, of a next-token model: position l predicts token l + 1"
    assert found["attention"].startswith("causal")
    assert found["dtype"] == "BF16"
    assert found["tokenizer"] == "none"
    assert "head_dim 6" in found["architecture"]
    assert "moe.first_k_dense 1" in found["architecture"]


def test_an_export_tells_its_lineage_and_shift(dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path) -> None:
    _, exported = export(Pair("dream", QWEN2, SHIFTED), tokenizer_artifact, tmp_path)
    done = dlm("inspect", str(exported))
    found = facts(done.stdout)
    assert (found["kind"], found["family"]) == ("export of this project, of the stage export", "dream")
    assert found["target_offset"] == "1, shifted: position l - 1 predicts token l"
    assert found["lineage"].startswith("1. trained")
    assert found["tokenizer"] == "tokenizer.json"
    _, plain = export(Pair("qwen2", QWEN2, SHIFTED), tokenizer_artifact, tmp_path / "plain")
    found = facts(dlm("inspect", str(plain)).stdout)
    assert found["target_offset"] == "1, shifted: position l - 1 predicts token l"  # which config.json cannot say
    assert found["objective"] == "masked_nelbo"


def test_an_export_is_known_without_the_files_that_nobody_reads(
    dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path
) -> None:
    _, exported = export(Pair("llada", LLAMA), tokenizer_artifact, tmp_path)
    for code in exported.glob("*.py"):  # which a download of the hub leaves out
        code.unlink()
    with (exported / "README.md").open("a") as card:
        card.write("Numbers were measured since.\n")
    done = dlm("inspect", str(exported))
    assert done.code == 0, done.stderr
    assert facts(done.stdout)["kind"] == "export of this project, of the stage export"


def test_what_others_wrote_is_printed_on_one_line_each_and_moves_no_cursor(
    dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path
) -> None:
    _, exported = export(Pair("llada", LLAMA), tokenizer_artifact, tmp_path)
    manifest = json.loads((exported / "manifest.json").read_text())
    manifest["stats"]["lineage"] = [
        {
            "kind": "trained",
            "details": {"a\n# b": "x\x1b[2Jy", "sha256": {"f\r\x1b]0;t\x07": "\u202e1"}, "<i>": ["\x9by"]},
        }
    ]
    (exported / "manifest.json").write_text(json.dumps(manifest))
    assert facts(dlm("inspect", str(exported)).stdout)["lineage"] == "1. trained: a b x [2Jy; sha256 f ]0;t 1; i y"
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "mamba", "sizes\\u001b": "\\u001b[2Jx\\ny"}')
    save_file({"w\x1b[2J": np.zeros(1, np.float32)}, tmp_path / "strange" / "model.safetensors")
    shown = dlm("inspect", str(tmp_path / "strange"), "--tensors").stdout
    assert "\x1b" not in shown
    assert "[2Jx y" in shown
    assert "w [2J" in shown


def test_of_an_unknown_family_it_says_what_is_known(dlm: Dlm, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "mamba", "hidden_size": 7, "layers": [1, 2]}')
    save_file({"w": np.zeros((3, 5), np.float32)}, source / "model.safetensors")
    done = dlm("inspect", str(source))
    assert done.code == 0, done.stderr
    found = facts(done.stdout)
    assert (found["model_type"], found["hidden_size"], found["tensors"]) == ("mamba", "7", "1")
    assert found["parameters"] == "15 in all tensors"
    assert "note: config.json: model_type is 'mamba'; known are llama" in done.stdout
    (source / "model.safetensors").unlink()
    done = dlm("inspect", str(source))
    assert done.code == 0
    assert "has no *.safetensors; there are no weights to import" in done.stdout
    save_file({"w": np.zeros((3, 5), np.int8), "mask": np.ones(2, bool)}, source / "model.safetensors")
    assert facts(dlm("inspect", str(source)).stdout)["dtype"] == "BOOL, I8"
    shown = json.loads(dlm("inspect", str(source), "--json").stdout)
    assert shown["tensors"]["mask"] == {"dtype": "BOOL", "shape": [2]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("model.norm.weight"), "config.json: model.norm.weight is missing\n"),
        (lambda t: t.update(extra=np.zeros(3, np.int8)), "config.json: extra is unknown\n"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(5, np.float32)}),
            "config.json: model.norm.weight has shape (5,), the model wants (16,)\n",
        ),
        (lambda t: t.update({str(n): np.zeros(1, np.float32) for n in range(9)}), "; 4 is unknown; and 4 more\n"),
        (lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}), ""),
    ],
)
def test_tensors_that_are_not_those_of_its_config_are_told(
    change: Callable[[dict[str, Any]], Any], told: str, dlm: Dlm, tmp_path: Path
) -> None:
    source = save_peer("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    done = dlm("inspect", str(source))
    assert done.code == 0, done.stderr
    assert ("note: its tensors are not those of its " in done.stdout.replace("\n", " ")) == bool(told)
    assert told.strip() in " ".join(done.stdout.split())


def test_a_config_that_promises_far_more_tensors_than_there_are_is_told(dlm: Dlm, tmp_path: Path) -> None:
    source = save_peer("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9_999}))
    done = dlm("inspect", str(source))
    assert done.code == 0, done.stderr
    assert "take both from one checkpoint" in " ".join(done.stdout.split())


def test_a_file_in_the_hubs_cache_is_what_its_name_says(dlm: Dlm, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1f").write_bytes(EXAMPLE)
    save_file({"a": np.zeros((3, 5), np.float16)}, blobs / "2e")
    for name, blob in (("x.gguf", "1f"), ("x.safetensors", "2e")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    assert facts(dlm("inspect", str(snapshot / "x.gguf")).stdout)["kind"] == "GGUF file"
    assert facts(dlm("inspect", str(snapshot / "x.safetensors")).stdout)["kind"] == "safetensors file"


def test_a_path_through_a_link_and_back_is_where_the_link_leads(dlm: Dlm, tmp_path: Path) -> None:
    for folder, names in (("there/a", "a"), ("there/b", "b"), ("b", "c")):
        (tmp_path / folder).mkdir(parents=True)
        save_file({names: np.zeros(3, np.float32)}, tmp_path / folder / "x.safetensors")
    (tmp_path / "latest").symlink_to("there/a")
    assert "\nb " in dlm("inspect", str(tmp_path / "latest" / ".." / "b" / "x.safetensors"), "--tensors").stdout


def test_a_file_of_weights_alone_is_its_tensors(dlm: Dlm, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": np.zeros((3, 5), np.float16), "b": np.zeros(2, np.float32)}, path)
    done = dlm("inspect", str(path), "--tensors")
    found = facts(done.stdout)
    assert (found["kind"], found["parameters"], found["dtype"]) == ("safetensors file", "17 in all tensors", "F16, F32")
    path.write_bytes(path.read_bytes()[:-3])
    cut = dlm("inspect", str(path))
    assert cut.code == 3
    assert "is cut" in cut.stderr


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("none", None, "there is no file or directory "),
        ("notes.txt", "hello", "is nothing with weights that is known here"),
        ("x.gguf", "hello", "is no GGUF file"),
    ],
)
def test_what_has_no_weights_is_refused(name: str, text: str | None, words: str, dlm: Dlm, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    refused = dlm("inspect", str(tmp_path / name))
    assert refused.code == 2
    assert words in refused.stderr


def test_artifacts_without_weights_are_told_by_their_stage(dlm: Dlm, made: Artifacts, tmp_path: Path) -> None:
    refused = dlm("inspect", str(made.rows))
    assert refused.code == 2
    assert "is an artifact of the stage packing, which holds no weights" in refused.stderr
    (tmp_path / "empty").mkdir()
    assert dlm("inspect", str(tmp_path / "empty")).code == 2


# GGUF


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(
    keys: Mapping[str, tuple[int, bytes]], tensors: Mapping[str, tuple[int, tuple[int, ...], int]], num_bytes: int
) -> bytes:
    """A file of zeros; values are (type, bytes), tensors (type, dimensions, fastest first, offset)."""
    data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for name, (kind, value) in keys.items():
        data += _text(name) + struct.pack("<I", kind) + value
    for name, (kind, shape, offset) in tensors.items():
        data += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return data + bytes(-len(data) % 64 + num_bytes)


EXAMPLE = gguf(
    {
        "general.architecture": (8, _text("llama")),
        "general.alignment": (4, struct.pack("<I", 64)),
        "llama.block_count": (4, struct.pack("<I", 30)),
        "llama.rope.freq_base": (6, struct.pack("<f", 1.5)),
        "tokenizer.ggml.tokens": (9, struct.pack("<IQ", 8, 2) + _text("a") + _text("é")),
        "tokenizer.ggml.scores": (9, struct.pack("<IQ3f", 6, 3, 0.5, 1.0, 2.0)),
        "tokenizer.ggml.add_bos": (7, b"\x01"),
    },
    {"token_embd.weight": (2, (64, 7), 0), "output_norm.weight": (0, (64,), 256), "odd": (99, (2, 2), 64)},
    512,
)


def test_an_export_whose_config_was_changed_is_told_as_damage(
    dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path
) -> None:
    _, exported = export(Pair("llada", LLAMA), tokenizer_artifact, tmp_path)
    config = (exported / "config.json").read_text()
    (exported / "config.json").write_text(config.replace('"rope_theta": 500.0', '"rope_theta": 600.0'))
    refused = dlm("inspect", str(exported))
    assert refused.code == 3
    assert "config.json does not have the bytes that were committed" in refused.stderr


def test_a_manifest_of_something_else_is_not_looked_at(dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path) -> None:
    _, exported = export(Pair("llada", LLAMA), tokenizer_artifact, tmp_path)
    (exported / "manifest.json").write_text('{"manifest_version": 3}')
    assert facts(dlm("inspect", str(exported)).stdout)["kind"] == "directory of transformers"


def test_the_header_of_a_gguf_file_is_told(dlm: Dlm, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(EXAMPLE)
    header = read_gguf_header(path)
    assert header.keys["tokenizer.ggml.tokens"] == ["a", "é"]
    assert header.keys["tokenizer.ggml.scores"] == [0.5, 1.0, 2.0]
    assert header.keys["tokenizer.ggml.add_bos"] is True
    assert header.tensors == {
        "token_embd.weight": ("Q4_0", (7, 64)), "output_norm.weight": ("F32", (64,)), "odd": ("type 99", (2, 2)),
    }  # fmt: skip
    found = facts(dlm("inspect", str(path)).stdout)
    assert (found["kind"], found["family"], found["llama.block_count"]) == ("GGUF file", "llama", "30")
    assert found["tokenizer.ggml.tokens"] == "2 tokens"
    assert found["parameters"] == f"{7 * 64 + 64 + 4} in all tensors"


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (1, "is cut: output_norm.weight ends at byte 512 of its data, of which there are 511"),
        (257, "is cut: output_norm.weight ends at byte 512 of its data, of which there are 255"),
        (512, "is cut: output_norm.weight ends at byte 512 of its data, of which there are 0"),
        (515, "is cut: output_norm.weight ends at byte 512 of its data, of which there are 0"),
    ],
)
def test_a_gguf_file_that_ends_before_its_tensors_is_told_as_cut(
    lost: int, words: str, dlm: Dlm, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(EXAMPLE[:-lost])
    for command in (("inspect", str(path)), ("convert", str(path), str(tmp_path / "out"), "--to", "llama")):
        cut = dlm(*command)
        assert cut.code == 3
        assert words in cut.stderr.replace("\n", " ")


def test_an_unknown_type_is_cut_where_it_begins_after_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    alignment = {"general.alignment": (4, struct.pack("<I", 64))}
    path.write_bytes(gguf(alignment, {"odd": (99, (2, 2), 128)}, 127))
    with pytest.raises(CorruptionError, match=r"x\.gguf is cut: odd ends at byte 128 of its data"):
        read_gguf_header(path)
    path.write_bytes(gguf({"general.alignment": (4, struct.pack("<I", 0))}, {}, 0))
    with pytest.raises(CorruptionError, match=r"x\.gguf has a damaged header, or is cut: general\.alignment is 0"):
        read_gguf_header(path)


PLACES = st.integers(0, len(EXAMPLE) - 1)


@settings(deadline=None)
@given(
    cut=st.integers(0, len(EXAMPLE) - 1), flips=st.dictionaries(st.integers(0, len(EXAMPLE) - 1), st.integers(1, 255))
)
def test_a_damaged_gguf_file_is_refused_and_never_anything_else(
    cut: int, flips: dict[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(EXAMPLE[:cut])
    with pytest.raises((CorruptionError, UserError)):
        read_gguf_header(path)
    data = bytearray(EXAMPLE)
    for place, bits in flips.items():
        data[place] ^= bits
    path.write_bytes(data)
    with contextlib.suppress(CorruptionError, UserError):  # or a letter of a name changed, which nothing can tell
        read_gguf_header(path)


@pytest.mark.parametrize("options", [(), ("--json",), ("--tensors",)], ids=["plain", "json", "tensors"])
def test_inspect_imports_neither_torch_nor_ray(options: tuple[str, ...], alone: Path, tmp_path: Path) -> None:
    places: list[Any] = [alone, save_model(tmp_path / "weights", random_model(replace(LLAMA, num_layers=1)))]
    code = (
        "import sys; from workflows.cli import main\n"
        f"for place in {[str(place) for place in places]!r}:\n"
        f"    sys.argv = ['dlm', 'inspect', place, *{options!r}]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
