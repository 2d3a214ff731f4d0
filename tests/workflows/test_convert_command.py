"""``dlm convert``: from every layout to every other, by one command, without a store, Ray or DeepSpeed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from pipeline.ar_init.config import ArInitConfig
from pipeline.artifact import load_manifest, read_json
from pipeline.export.config import ExportConfig
from pipeline.import_checkpoint.config import STAGE as IMPORT
from pipeline.import_checkpoint.config import ImportConfig
from pipeline.repack import INDEX_FILE
from pipeline.stage import environment
from pipeline.tensor_files import TensorFiles
from pipeline.tokenizer.config import STAGE as TOKENIZER
from pipeline.tokenizer.config import TokenizerConfig
from pipeline.weights import Origin, load_record
from tests.pipeline.conftest import flip_bit
from tests.support.executors import Inline
from tests.support.exports import (
    BLOCKS,
    LLADA2,
    LLAMA,
    NEXT_TOKEN,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SHIFTED,
    Pair,
    export,
    weights_of,
)
from tests.support.hf_models import VOCAB_SIZE, save_peer
from tests.support.interchange import random_model, save_model
from tests.support.tiny_families import EXPERTS
from tests.support.tiny_run import Artifacts, run_stage
from tests.support.toy_workflow import coordinate
from tests.workflows.conftest import Dlm
from workflows import runs
from workflows.plan import make_plan
from workflows.step import Step, Workflow
from workflows.store import Store

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("forked_proofs")]
ROOT = Path(__file__).parents[2]
NO_TOKENIZER = ("--set", "export.without_tokenizer=true")
QUICK_IMPORT, QUICK_EXPORT = ("--set", "import_checkpoint.proof=tensors"), ("--set", "export.proof=tensors")
QUICK = (*QUICK_IMPORT, *QUICK_EXPORT)
RENORMALISED = replace(QWEN3_MOE, moe=replace(EXPERTS, renormalise=True))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A directory that transformers saved, with a tokenizer and code that must not run."""
    source = save_peer("llama", tmp_path / "source", dtype="bfloat16")
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE - 3)}, unk_token="w0")).save(
        str(source / "tokenizer.json")
    )
    (source / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    return source


def test_a_checkpoint_becomes_interchange_weights_and_these_the_checkpoint_again(
    dlm: Dlm, llama: Path, tmp_path: Path
) -> None:
    done = dlm("convert", str(llama), str(tmp_path / "ours"), "--to", "dlm", *QUICK_IMPORT)
    assert done.code == 0, done.stderr
    assert "import_checkpoint  read as llama: " in done.stdout
    assert "proved: every tensor read back, bit for bit\n" in done.stdout
    assert "note: *.py files beside the weights were not read" in done.stdout
    assert done.stdout.endswith(f"it lies in {tmp_path / 'ours'}\n")
    assert load_record(tmp_path / "ours").model.vocab_size == VOCAB_SIZE
    done = dlm("convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "llama", *QUICK_EXPORT)
    assert done.code == 0, done.stderr
    assert "export             written as llama in bfloat16: " in done.stdout
    before, after = (TensorFiles([folder / "model.safetensors"]) for folder in (llama, tmp_path / "theirs"))
    assert set(before.names) == set(after.names)
    for name in before.names:
        assert before.read_raw(name) == after.read_raw(name), name
    assert (llama / "tokenizer.json").read_bytes() == (tmp_path / "theirs" / "tokenizer.json").read_bytes()
    assert not (tmp_path / "ran").exists()
    assert {path.name for path in tmp_path.iterdir()} >= {"source", "ours", "theirs"}
    assert not list(tmp_path.glob(".*"))  # what was beside them is gone


def test_a_checkpoint_becomes_another_in_one_command_which_tells_its_proof(
    dlm: Dlm, llama: Path, tmp_path: Path
) -> None:
    command = ("convert", str(llama), str(tmp_path / "new" / "out"), "--to", "llama", "--dtype", "float32")
    done = dlm(*command, *QUICK_IMPORT, "--set", "export.max_shard_bytes=3000")
    assert done.code == 0, done.stderr
    assert "logits in a fresh process, which differ by " in done.stdout
    out = tmp_path / "new" / "out"
    assert (out / INDEX_FILE).is_file()
    assert read_json(out / "config.json")["torch_dtype"] == "float32"
    stats = load_manifest(out).stats
    assert stats["proof"] == "logits"
    assert [origin["kind"] for origin in stats["lineage"]] == ["imported"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("kept", "options", "written", "proof"),
    [
        ("float32", (), "float32", ""),
        ("bfloat16", (), "bfloat16", ""),
        ("float16", (), "float16", ""),
        ("float32", ("--dtype", "bfloat16"), "bfloat16", ", with the float32 weights rounded to bfloat16"),
        ("bfloat16", ("--set", "export.dtype=float16"), "float16", ", with the float32 weights rounded to float16"),
    ],
)
def test_a_checkpoint_keeps_its_dtype_and_rounding_is_told(
    kept: str, options: tuple[str, ...], written: str, proof: str, dlm: Dlm, tmp_path: Path
) -> None:
    source = save_peer("llama", tmp_path / "source", dtype=kept)
    ours, once, twice = (str(tmp_path / name) for name in ("ours", "once", "twice"))
    assert dlm("convert", str(source), ours, "--to", "dlm", *QUICK_IMPORT).code == 0
    for place, out, quick in ((str(source), once, QUICK), (ours, twice, QUICK_EXPORT)):
        done = dlm("convert", place, out, "--to", "llama", *NO_TOKENIZER, *quick, *options)
        assert done.code == 0, done.stderr
        assert f"written as llama in {written}: " in done.stdout
        assert done.stdout.splitlines()[-2].endswith(f"proved: every tensor read back, bit for bit{proof}")
        assert read_json(Path(out) / "config.json")["torch_dtype"] == written


def _with_a_buffer(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_a_buffer_in_float32_and_what_always_is_leave_the_dtype_of_a_checkpoint_as_it_is(
    dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path
) -> None:
    peer = save_peer("llama", tmp_path / "peer", dtype="float16")
    _with_a_buffer(peer)
    pair = Pair("llada2", LLADA2, BLOCKS, "float16")
    _, llada2 = export(pair, tokenizer_artifact, tmp_path / "made")
    for source, family in ((peer, "llama"), (llada2, "llada2")):
        before = TensorFiles([source / "model.safetensors"])
        assert {before.info(name).dtype for name in before.names} == {"F16", "F32"}
        ours, once, twice = (tmp_path / f"{family} {name}" for name in ("ours", "once", "twice"))
        assert dlm("convert", str(source), str(ours), "--to", "dlm", *QUICK_IMPORT).code == 0
        for place, out, quick in ((source, once, QUICK), (ours, twice, QUICK_EXPORT)):
            done = dlm("convert", str(place), str(out), "--to", family, *NO_TOKENIZER, *quick)
            assert done.code == 0, done.stderr
            after = TensorFiles([out / "model.safetensors"])
            for name in after.names:
                assert before.read_raw(name) == after.read_raw(name), name
            assert "rounded" not in done.stdout


def test_a_config_that_promises_far_more_tensors_than_there_are_is_refused_at_once(
    dlm: Dlm, llama: Path, tmp_path: Path
) -> None:
    config = read_json(llama / "config.json") | {"num_hidden_layers": 9000}
    (llama / "config.json").write_text(json.dumps(config))
    refused = dlm("convert", str(llama), str(tmp_path / "out"), "--to", "llama")
    assert refused.code == 2
    assert "tensors, but the files have " in refused.stderr.replace("\n", " ")


def test_weights_that_no_one_dtype_is_told_of_are_rounded_and_that_is_said(
    dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path
) -> None:
    weights = weights_of(Pair("llama", LLAMA, NEXT_TOKEN), tokenizer_artifact, tmp_path / "weights")
    done = dlm("convert", str(weights), str(tmp_path / "out"), "--to", "llama", *NO_TOKENIZER, *QUICK_EXPORT)
    assert done.code == 0, done.stderr
    assert "bit for bit, with the float32 weights rounded to bfloat16\n" in done.stdout
    assert "note: " not in done.stdout


def test_an_exported_diffusion_model_comes_back_and_goes_on_to_another_family(
    dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path
) -> None:
    _, dream = export(Pair("dream", QWEN2, SHIFTED), tokenizer_artifact, tmp_path / "made")
    done = dlm("convert", str(dream), str(tmp_path / "qwen2"), "--to", "qwen2", "--dtype", "float32", *QUICK)
    assert done.code == 0, done.stderr
    assert "export             note: `generate` is causal and meaningless for this model" in done.stdout
    assert "`generate` is causal and meaningless" in (tmp_path / "qwen2" / "README.md").read_text()
    done = dlm("convert", str(dream), str(tmp_path / "llada"), "--to", "llada", *QUICK)
    assert done.code == 2
    assert '--to is "llada", but target_offset is 1' in done.stderr
    assert "Give --to dream; qwen2 would hold its tensors" in done.stderr
    assert "export.family" not in done.stderr


def test_a_diffusion_model_in_plain_tensors_stays_one_whatever_it_becomes(
    dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path
) -> None:
    weights, plain = export(Pair("qwen2", QWEN2, SHIFTED), tokenizer_artifact, tmp_path / "made")
    command = ("convert", str(plain))
    done = dlm(*command, str(tmp_path / "ours"), "--to", "dlm", *QUICK_IMPORT)
    assert done.code == 0, done.stderr
    before, after = load_record(weights), load_record(tmp_path / "ours")
    assert (after.objective, after.target_offset, after.tokenizer) == ("masked_nelbo", 1, before.tokenizer)
    assert [origin.kind for origin in after.lineage] == ["trained", "imported"]
    done = dlm(*command, str(tmp_path / "again"), "--to", "qwen2", *QUICK)
    assert done.code == 0, done.stderr
    card = (tmp_path / "again" / "README.md").read_text()
    assert "`generate` is causal and meaningless" in card
    assert "1. trained" in card
    done = dlm(*command, str(tmp_path / "dream"), "--to", "dream", *QUICK)
    assert done.code == 0, done.stderr
    stats = load_manifest(tmp_path / "dream").stats
    assert (stats["objective"], stats["target_offset"]) == ("masked_nelbo", 1)


def test_an_export_with_a_damaged_file_is_not_converted(dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path) -> None:
    _, exported = export(Pair("llada", LLAMA), tokenizer_artifact, tmp_path / "made")
    flip_bit(exported / "model.safetensors")
    refused = dlm("convert", str(exported), str(tmp_path / "ours"), "--to", "dlm", *QUICK_IMPORT)
    assert refused.code == 3
    assert "model.safetensors does not have the bytes that were committed" in refused.stderr
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("pair", "family", "words"),
    [
        (Pair("llada", QWEN2), "dream", '--to is "dream", but target_offset is 0'),
        (Pair("dream", QWEN2, SHIFTED), "llada", '--to is "llada", but target_offset is 1'),
        (Pair("llama", QWEN3), "llada", "qk_norm is True"),
        (Pair("qwen3_moe", RENORMALISED), "llada_moe", "moe.renormalise is True"),
        (Pair("llama", LLAMA, NEXT_TOKEN), "llada", "the model was trained on next tokens (autoregressive_nll)"),
        (Pair("llada2", LLAMA, BLOCKS), "llada", "block_size is 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.family,
)
def test_what_is_not_the_same_function_is_refused_with_the_field(
    pair: Pair, family: str, words: str, dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path
) -> None:
    weights = weights_of(pair, tokenizer_artifact, tmp_path / "weights")
    refused = dlm("convert", str(weights), str(tmp_path / "out"), "--to", family, *NO_TOKENIZER, *QUICK_EXPORT)
    assert refused.code == 2
    assert words in refused.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_artifact", [False, True], ids=["directory", "weights"])
def test_a_wrong_tokenizer_is_refused_before_anything_is_read(
    *, is_artifact: bool, dlm: Dlm, llama: Path, tokenizer_artifact: Path, tmp_path: Path
) -> None:
    source = weights_of(Pair("llama", LLAMA, NEXT_TOKEN), tokenizer_artifact, tmp_path / "weights")
    source = source if is_artifact else llama
    other = tmp_path / "other"
    other.mkdir()
    command = ("convert", str(source), str(tmp_path / "out"), "--to", "llama", *QUICK_EXPORT, "--tokenizer")
    (own, of_others) = (str(tokenizer_artifact), save_model(tmp_path / "others", random_model(LLAMA)))
    for arguments, words in (
        ((str(other),), f"--tokenizer {other} is no artifact; it takes one of the stage tokenizer"),
        ((str(of_others),), "is an artifact of the stage convert; it takes one of the stage tokenizer"),
        ((str(other),), "leave --tokenizer out and put its tokenizer.json beside the config.json of the checkpoint"),
        ((own, *NO_TOKENIZER), f"--tokenizer is {own}, but export.without_tokenizer is true; leave one of them out"),
    ):
        refused = dlm(*command, *arguments)
        assert refused.code == 2
        assert words in refused.stderr.replace("\n", " ")
        assert "proved" not in refused.stdout


def test_a_checkpoint_without_a_tokenizer_is_told_where_one_is_put(
    dlm: Dlm, llama: Path, tokenizer_artifact: Path, tmp_path: Path
) -> None:
    tokenizer = (llama / "tokenizer.json").read_bytes()
    (llama / "tokenizer.json").unlink()
    told = "Put the tokenizer.json of its model beside the config.json that it was imported with, and import it again"
    done = dlm("convert", str(llama), str(tmp_path / "ours"), "--to", "dlm", *QUICK_IMPORT)
    assert f"note: there is no tokenizer.json, which trainings and exports want. {told}" in done.stdout
    for source in (llama, tmp_path / "ours"):
        refused = dlm("convert", str(source), str(tmp_path / "out"), "--to", "llama", *QUICK_EXPORT)
        assert refused.code == 2
        assert f"{source} brings no tokenizer. {told}, or --set" in refused.stderr.replace("\n", " ")
    (llama / "tokenizer.json").write_bytes(tokenizer)
    trained = weights_of(Pair("llada", LLAMA), tokenizer_artifact, tmp_path / "trained")
    bare = tmp_path / "bare"
    assert dlm("convert", str(trained), str(bare), "--to", "llada", *NO_TOKENIZER, *QUICK_EXPORT).code == 0
    again = (str(tmp_path / "llada"), "--to", "llada", *QUICK_EXPORT)
    refused = dlm("convert", str(bare), *again)
    assert "brings no tokenizer. Give that of its training (--tokenizer DIR, " in refused.stderr.replace("\n", " ")
    done = dlm("convert", str(bare), *again, *QUICK_IMPORT, "--tokenizer", str(tokenizer_artifact))
    assert done.code == 0, done.stderr
    done = dlm("convert", str(llama), str(tmp_path / "out"), "--to", "llama", *QUICK)
    assert done.code == 0, done.stderr


def test_the_tokenizer_of_other_weights_is_refused(dlm: Dlm, tokenizer_artifact: Path, tmp_path: Path) -> None:
    stranger = save_model(tmp_path / "weights", random_model(LLAMA), **NEXT_TOKEN)
    command = ("convert", str(stranger), str(tmp_path / "out"), "--to", "llama", *QUICK_EXPORT)
    refused = dlm(*command, "--tokenizer", str(tokenizer_artifact))
    assert refused.code == 2
    assert "is not that of the weights in" in refused.stderr


def test_a_training_becomes_weights_and_a_directory(dlm: Dlm, alone: Path, made: Artifacts, tmp_path: Path) -> None:
    done = dlm("convert", str(alone), str(tmp_path / "ours"), "--to", "dlm")
    assert done.code == 0, done.stderr
    assert "convert            " in done.stdout
    assert "of step 20" in done.stdout
    assert "logits in a fresh process, which are the same numbers" in done.stdout
    assert load_record(tmp_path / "ours").lineage[-1].kind == "trained"
    command = ("convert", str(alone), str(tmp_path / "qwen3"), "--to", "qwen3", "--set", "convert.proof=tensors")
    refused = dlm(*command)
    assert refused.code == 2
    words = "brings no tokenizer. Give that of its training (--tokenizer DIR, an artifact of the stage tokenizer), or"
    assert words in refused.stderr.replace("\n", " ")
    done = dlm(*command, "--tokenizer", str(made.tokenizer), *QUICK_EXPORT)
    assert done.code == 0, done.stderr
    assert "written as qwen3" in done.stdout
    refused = dlm("convert", str(alone), str(tmp_path / "llada"), "--to", "llada", *NO_TOKENIZER)
    assert refused.code == 2
    assert "qk_norm is True" in refused.stderr
    assert "Give --to" not in refused.stderr  # no diffusion family has it
    assert "qwen3 would hold its tensors" in refused.stderr
    assert not (tmp_path / "llada").exists()


def test_a_step_of_a_run_is_converted_with_the_tokenizer_of_the_run(
    dlm: Dlm, store: Store, llama: Path, tmp_path: Path
) -> None:
    words = [f"w{i}" for i in range(VOCAB_SIZE - 3)]
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(llama / "tokenizer.json"))
    assert len(words) + 1 == tokenizer.get_vocab_size()
    steps = (
        Step("theirs", "pipeline.import_checkpoint", ImportConfig(path=str(llama), proof="tensors")),
        Step("words", "pipeline.tokenizer", TokenizerConfig(eos_token="</s>"), {"checkpoint": "theirs"}),
        Step("first", "pipeline.ar_init", ArInitConfig(), {"weights": "theirs", "tokenizer": "words"}),
        Step("theirs_again", "pipeline.export", ExportConfig(family="llama", proof="tensors"), {"weights": "theirs"}),
    )
    plan = make_plan(Workflow("toy", "", steps), environment())
    run = runs.create_run(store, plan, "local", "r1")
    states = coordinate(store, run, Inline)
    assert {state.status for state in states.values()} == {"committed"}, states
    done = dlm("convert", "r1", str(tmp_path / "out"), "--to", "llama", *QUICK_EXPORT)
    assert done.code == 0, done.stderr
    assert read_json(tmp_path / "out" / "tokenizer_config.json")["mask_token"] == "[MASK]"
    assert [origin["kind"] for origin in load_manifest(tmp_path / "out").stats["lineage"]] == [
        "imported",
        "initialised",
    ]
    done = dlm("convert", "r1:theirs", str(tmp_path / "again"), "--to", "llama", *QUICK_EXPORT)
    assert done.code == 0, done.stderr
    assert "mask_token" not in read_json(tmp_path / "again" / "tokenizer_config.json")
    done = dlm("convert", "r1", str(tmp_path / "bare"), "--to", "llama", *NO_TOKENIZER, *QUICK_EXPORT)
    assert done.code == 0, done.stderr  # that of the run is not wanted then
    done = dlm("convert", "r1:theirs_again", str(tmp_path / "back"), "--to", "dlm", *QUICK_IMPORT)
    assert done.code == 0, done.stderr
    for source, words_ in (
        ("r1:words", "is an artifact of the stage tokenizer, which holds no weights"),
        ("r1:nothing", "has finished no step 'nothing'; it has theirs, first, theirs_again"),
        ("r2", "no file or directory r2, and no run of that name"),
    ):
        refused = dlm("convert", source, str(tmp_path / "no"), "--to", "llama")
        assert refused.code == 2
        assert words_ in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "lama"), "there is no family 'lama'; did you mean llama?"),
        (("--to", "gpt"), "there is no family 'gpt'; there are: llada, dream, "),
        (("--to", "mdlm"), "there is no family 'mdlm'"),
        (("--to", "llada"), "architecture.rope_scaling is RopeScaling("),
        (("--to", "qwen2"), "qkv_bias is False"),
        (("--to", "llama", "--dtype", "fp16"), "there is no dtype 'fp16'; there are: bfloat16, float32, float16"),
        (("--to", "llama", "--tokenizer", "/nowhere"), "--tokenizer /nowhere: there is no such directory"),
        (("--to", "dlm", "--dtype", "float32"), "leave --dtype and --tokenizer out"),
        (("--to", "llama", "--set", "export.dtpe=float32"), "did you mean"),
        (("--to", "llama", "--set", "convert.weights=ema"), "unknown setting convert.weights"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    arguments: tuple[str, ...], words: str, dlm: Dlm, llama: Path, tmp_path: Path
) -> None:
    refused = dlm("convert", str(llama), str(tmp_path / "out"), *arguments)
    assert refused.code == 2
    assert words in refused.stderr.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir() if path.name != "store"] == ["source"]


def test_an_unknown_model_type_is_refused_by_name(dlm: Dlm, llama: Path, tmp_path: Path) -> None:
    (llama / "config.json").write_text('{"model_type": "mamba"}')
    refused = dlm("convert", str(llama), str(tmp_path / "out"), "--to", "llama")
    assert refused.code == 2
    assert "model_type is 'mamba'; known are llama, qwen2" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_weights_of_a_gguf_file_or_an_export_are_told_where_a_tokenizer_comes_from(dlm: Dlm, tmp_path: Path) -> None:
    for name, details, words in (
        ("gguf", {"dequantised_from": "a.gguf"}, "Import the safetensors that it was made from, or --set"),
        ("export", {"export": "5" * 64}, "Export the weights that it was made from again, with their tokenizer"),
    ):
        record = {**NEXT_TOKEN, "lineage": [Origin("imported", details), Origin("initialised", {})]}
        weights = save_model(tmp_path / name, random_model(LLAMA), stage="import_checkpoint", **record)
        refused = dlm("convert", str(weights), str(tmp_path / "out"), "--to", "llama", *QUICK_EXPORT)
        assert refused.code == 2
        assert words in refused.stderr.replace("\n", " ")


def test_a_conversion_needs_neither_ray_nor_deepspeed_nor_torch_in_its_process(
    alone: Path, made: Artifacts, llama: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from workflows.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    quick = ("--set", "convert.proof=tensors", *QUICK_EXPORT)
    for arguments in (
        (str(alone), str(tmp_path / "a"), "--to", "qwen3", "--tokenizer", str(made.tokenizer), *quick),
        (str(llama), str(tmp_path / "b"), "--to", "llama", *QUICK_IMPORT),
    ):
        command = [sys.executable, "-c", code, "convert", *arguments, "--store", str(tmp_path / "no-store")]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "no-store").exists()


def test_an_unfinished_download_of_many_tensors_is_told_as_one(dlm: Dlm, tmp_path: Path) -> None:
    source = save_peer("qwen3_moe", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 48, "num_experts": 128}))
    for path in source.glob("*.safetensors*"):
        path.unlink()
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    done = dlm("convert", str(source), str(tmp_path / "out"), "--to", "qwen3_moe", *NO_TOKENIZER)
    assert done.code in (2, 3)
    assert "lacks model-00001-of-00002.safetensors" in " ".join(done.stderr.split())


def test_a_tokenizer_made_of_an_exports_import_goes_with_the_export(dlm: Dlm, llama: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    tokenizer.add_special_tokens(["[END]", "[MASK]"])
    tokenizer.save(str(llama / "tokenizer.json"))
    assert dlm("convert", str(llama), str(tmp_path / "export"), "--to", "llama", *QUICK).code == 0
    weights = run_stage(IMPORT, ImportConfig(path=str(tmp_path / "export"), proof="tensors"), {}, tmp_path / "import")
    own = TokenizerConfig(mask_token="[MASK]", mask_from="existing", eos_token="[END]", pad_token="[END]")
    made = run_stage(TOKENIZER, own, {"checkpoint": weights}, tmp_path / "tokenizer")
    command = ("convert", str(tmp_path / "export"), str(tmp_path / "again"), "--to", "llama", "--tokenizer", str(made))
    done = dlm(*command, *QUICK)
    assert done.code == 0, done.stderr
