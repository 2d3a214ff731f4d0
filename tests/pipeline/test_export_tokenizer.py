"""The tokenizer of an export: what its files say, what both versions of transformers make of them, where they disagree.

A tokenizer of single bytes and a few special tokens, as a checkpoint has it that was imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.artifact import load_manifest, read_json
from pipeline.data.vocabulary import load_vocabulary
from pipeline.errors import CorruptionError, UserError
from pipeline.export import run as export_run
from pipeline.export.config import STAGE, ExportConfig
from pipeline.import_checkpoint.config import STAGE as IMPORT
from pipeline.import_checkpoint.config import ImportConfig
from pipeline.tokenizer.config import STAGE as TOKENIZER
from pipeline.tokenizer.config import TokenizerConfig
from tests.support.exports import LLAMA, NEXT_TOKEN, QWEN2, ROOT
from tests.support.interchange import commit, random_model, save_model
from tests.support.tiny_run import run_stage

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("forked_proofs")]
BEGIN, EOS, MASK, TURN, ROWS = 256, 257, 258, 259, 300
TENSORS = ExportConfig("llama", "float32", proof="tensors")
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}


def bytewise() -> Tokenizer:
    """Puts a token in front of a text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<|endoftext|>", "[MASK]", "<|im_end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return tokenizer


def imported(
    root: Path, settings: Mapping[str, Any], tokenizer: Tokenizer | None = None, mask: int | None = None, **ids: Any
) -> Path:
    """Weights as an import of a checkpoint with this tokenizer commits them."""
    record = NEXT_TOKEN if mask is None else {}
    model = random_model(QWEN2 if settings.get("tokenizer_class") == "Qwen2Tokenizer" else LLAMA, ROWS, mask)
    weights = save_model(root / "weights", model, stage="import_checkpoint", **record)
    (tokenizer or bytewise()).save(str(weights / "tokenizer.json"))
    (weights / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {"bos": BEGIN, "eos": EOS, "pad": None, "mask": mask, **ids}
    return commit(weights, "import_checkpoint", {"special_ids": special})


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "TokenizersBackend"])
def test_special_tokens_as_transformers_5_saves_them_are_written_as_4_reads_them(name: str, tmp_path: Path) -> None:
    settings = {"tokenizer_class": name, "extra_special_tokens": ["<|im_end|>"], "model_max_length": 77}
    family = "qwen2" if name == "Qwen2Tokenizer" else "llama"
    inputs = {"weights": imported(tmp_path, settings)}
    out = run_stage(STAGE, replace(TENSORS, family=family), inputs, tmp_path / "out")  # type: ignore[arg-type]
    written = read_json(out / "tokenizer_config.json")
    assert written["additional_special_tokens"] == ["<|im_end|>"]
    assert "extra_special_tokens" not in written
    assert written["model_max_length"] == 77
    assert written["tokenizer_class"] == ("Qwen2Tokenizer" if family == "qwen2" else "PreTrainedTokenizerFast")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "TokenizersBackend"])
def test_such_a_tokenizer_loads_in_transformers_4(name: str, tmp_path: Path, transformers4: Path) -> None:
    settings = {"tokenizer_class": name, "extra_special_tokens": ["<|im_end|>"]}
    config = replace(TENSORS, family="qwen2" if name == "Qwen2Tokenizer" else "llama")
    out = run_stage(STAGE, config, {"weights": imported(tmp_path, settings)}, tmp_path / "out")
    code = (
        "import sys, transformers as t; loaded = t.PreTrainedTokenizerFast.from_pretrained(sys.argv[1]); "
        "print(t.__version__, loaded.additional_special_tokens, loaded('a<|im_end|>').input_ids)"
    )
    environment = os.environ | {"PYTHONPATH": str(transformers4), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = Tokenizer.from_file(str(out / "tokenizer.json")).encode("a<|im_end|>").ids
    assert done.stdout.startswith("4.57.")
    assert done.stdout.endswith(f" ['<|im_end|>'] {ids}\n")


@pytest.mark.slow
def test_a_class_that_transformers_4_does_not_know_is_told_and_no_failure(tmp_path: Path, transformers4: Path) -> None:
    weights = imported(tmp_path, {"tokenizer_class": "FancyTokenizer"})
    (tmp_path / "c.json").write_text('{"family": "llama", "dtype": "float32"}')
    command = [sys.executable, "-m", "pipeline.export", "--config", str(tmp_path / "c.json")]
    command += ["--input", f"weights={weights}", "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": f"{transformers4}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stats = load_manifest(tmp_path / "out").stats
    assert stats["versions"]["transformers"].startswith("4.57.")
    assert (stats["auto_tokenizer"], stats["auto_tokenizer_is_same"]) == (None, False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Not AutoTokenizer**: that of transformers 4.57." in card
    assert " does not load what tokenizer_config.json names." in card


def test_special_tokens_under_both_names_are_joined(tmp_path: Path) -> None:
    settings = {**PLAIN, "extra_special_tokens": ["[MASK]", "<s>"], "additional_special_tokens": ["<|im_end|>", "<s>"]}
    out = run_stage(
        STAGE, ExportConfig("llama", "float32"), {"weights": imported(tmp_path, settings)}, tmp_path / "out"
    )
    written = read_json(out / "tokenizer_config.json")
    assert written["additional_special_tokens"] == ["<|im_end|>", "<s>", "[MASK]"]
    assert "extra_special_tokens" not in written


def test_a_table_of_special_tokens_by_name_is_kept(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": {"turn_token": "<|im_end|>"}}
    out = run_stage(STAGE, TENSORS, {"weights": imported(tmp_path, settings)}, tmp_path / "out")
    assert read_json(out / "tokenizer_config.json")["extra_special_tokens"] == {"turn_token": "<|im_end|>"}


def adopted(root: Path, weights: Path, **settings: Any) -> Path:
    return run_stage(TOKENIZER, TokenizerConfig(**settings), {"checkpoint": weights}, root / "tokenizer")


def test_a_next_token_model_has_no_mask_though_the_tokenizer_that_it_gave_has_one(tmp_path: Path) -> None:
    weights = imported(tmp_path, PLAIN)
    tokenizer = adopted(tmp_path, weights, mask_token="[NEW]", mask_from="unused_row")
    out = run_stage(STAGE, TENSORS, {"weights": weights, "tokenizer": tokenizer}, tmp_path / "out")
    assert read_json(out / "config.json")["mask_token_id"] is None
    assert "mask_token_id" not in read_json(out / "generation_config.json")
    assert "mask_token" not in read_json(out / "tokenizer_config.json")


OWN = {
    "eos_token": "<|im_end|>",
    "bos_token": None,
    "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
}
"""Other tokens than config.json names, as chat models have them."""


@pytest.mark.parametrize("proof", ["tensors", "logits"])
@pytest.mark.parametrize(
    "named",
    [PLAIN, {"tokenizer_class": "TokenizersBackend"}, {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}],
    ids=["a plain class", "a name of transformers 5", "code that is not here"],
)
def test_special_tokens_of_a_checkpoint_stay_its_own_whatever_config_json_names(
    named: Mapping[str, Any], proof: Any, tmp_path: Path
) -> None:
    weights = imported(tmp_path, {**named, **OWN, "cls_token": "[MASK]"})
    assert load_manifest(weights).stats["special_ids"]["eos"] == EOS
    out = run_stage(STAGE, ExportConfig("llama", "float32", proof=proof), {"weights": weights}, tmp_path / "out")
    loaded = PreTrainedTokenizerFast.from_pretrained(out)
    assert loaded.special_tokens_map == {"eos_token": "<|im_end|>", "cls_token": "[MASK]"}
    turn = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(turn, tokenize=False) == "hi<|im_end|>"
    assert (read_json(out / "config.json")["bos_token_id"], read_json(out / "config.json")["eos_token_id"]) == (
        256,
        257,
    )
    if proof == "logits":
        assert load_manifest(out).stats["auto_tokenizer_is_same"] is True


def test_a_map_of_special_tokens_is_passed_on_and_none_is_made(tmp_path: Path) -> None:
    weights = imported(tmp_path, PLAIN)
    own = {"eos_token": "<|im_end|>"}
    (weights / "tokenizer_config.json").unlink()
    (weights / "special_tokens_map.json").write_text(json.dumps(own))
    commit(weights, "import_checkpoint", load_manifest(weights).stats)
    out = run_stage(STAGE, ExportConfig("llama", "float32"), {"weights": weights}, tmp_path / "out")
    assert PreTrainedTokenizerFast.from_pretrained(out).special_tokens_map == own
    (weights / "special_tokens_map.json").unlink()
    commit(weights, "import_checkpoint", load_manifest(weights).stats)
    out = run_stage(STAGE, ExportConfig("llama", "float32"), {"weights": weights}, tmp_path / "ids")
    loaded = PreTrainedTokenizerFast.from_pretrained(out)
    assert loaded.special_tokens_map == {"bos_token": "<s>", "eos_token": "<|endoftext|>"}  # those of config.json
    assert not (out / "special_tokens_map.json").exists()


def test_other_special_tokens_than_the_checkpoints_are_found_by_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove = export_run.in_fresh_process

    def harm_and_prove(function: str, out: Path, *arguments: Any) -> Any:
        (out / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
        return prove(function, out, *arguments)

    monkeypatch.setattr(export_run, "in_fresh_process", harm_and_prove)
    words = r"loads the special tokens .*<.endoftext.>.*; of the checkpoint's own .*<.im_end.>"
    weights = imported(tmp_path, {**PLAIN, **OWN})
    with pytest.raises(CorruptionError, match=words):
        run_stage(STAGE, ExportConfig("llama", "float32"), {"weights": weights}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generation_goes_on_ending_where_the_checkpoint_did(tmp_path: Path) -> None:
    weights = imported(tmp_path, PLAIN, eos_token_ids=[TURN, EOS])
    for name, inputs in (("own", {}), ("adopted", {"tokenizer": adopted(tmp_path, weights)})):
        out = run_stage(STAGE, TENSORS, {"weights": weights, **inputs}, tmp_path / name)
        assert read_json(out / "generation_config.json")["eos_token_id"] == [TURN, EOS]
        assert read_json(out / "config.json")["eos_token_id"] == EOS
        back = run_stage(IMPORT, ImportConfig(path=str(out), proof="tensors"), {}, tmp_path / f"{name} again")
        ids = load_manifest(back).stats["special_ids"]
        assert (ids["eos"], ids["eos_token_ids"]) == (EOS, [TURN, EOS])


def test_the_tokenizer_of_a_training_puts_nothing_in_front_that_training_did_not(tmp_path: Path) -> None:
    weights = imported(tmp_path, PLAIN, mask=MASK)
    tokenizer = adopted(tmp_path, weights)
    assert load_vocabulary(tokenizer).tokenizer.encode("ab").ids[0] == BEGIN
    inputs = {"weights": weights, "tokenizer": tokenizer}
    out = run_stage(STAGE, ExportConfig("llada", "float32"), inputs, tmp_path / "out")
    exported = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert exported.encode("ab").ids == load_vocabulary(tokenizer).tokenizer.encode("ab", add_special_tokens=False).ids
    assert exported.encode("a[MASK]").ids[-1] == MASK


def test_a_tokenizer_that_puts_something_in_front_by_default_is_found_by_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = imported(tmp_path, PLAIN, mask=MASK)
    tokenizer = adopted(tmp_path, weights)
    prove = export_run.in_fresh_process

    def harm_and_prove(function: str, out: Path, *arguments: Any) -> Any:
        bytewise().save(str(out / "tokenizer.json"))
        return prove(function, out, *arguments)

    monkeypatch.setattr(export_run, "in_fresh_process", harm_and_prove)
    with pytest.raises(CorruptionError, match="loaded as PreTrainedTokenizerFast, gives other ids"):
        run_stage(STAGE, ExportConfig("llada"), {"weights": weights, "tokenizer": tokenizer}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _cutting() -> Tokenizer:
    tokenizer = bytewise()
    tokenizer.enable_truncation(8)
    return tokenizer


def _padding() -> Tokenizer:
    tokenizer = bytewise()
    tokenizer.enable_padding(length=200, pad_id=EOS, pad_token="<|endoftext|>")
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "settings"),
    [
        (_cutting(), PLAIN),
        (_padding(), PLAIN),
        (bytewise(), {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}),
    ],
    ids=["cuts", "pads", "code that is not here"],
)
def test_a_sound_tokenizer_of_a_checkpoint_is_proved_beside_code_of_our_own(
    tokenizer: Tokenizer, settings: dict[str, Any], tmp_path: Path
) -> None:
    weights = imported(tmp_path, settings, tokenizer, MASK)
    out = run_stage(STAGE, ExportConfig("llada", "float32"), {"weights": weights}, tmp_path / "out")
    stats = load_manifest(out).stats
    assert stats["proof"] == "logits"
    assert stats["auto_tokenizer_is_same"] is True
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("a").ids[0] == BEGIN  # as the checkpoint's does
    assert read_json(out / "tokenizer_config.json")["padding_side"] == "left"


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize(("family", "side"), [("llama", "left"), ("llama", "right"), ("llada", "right")])
def test_what_a_checkpoint_says_of_padding_and_cutting_is_kept_where_a_family_takes_it(
    family: Any, side: str, name: str, tmp_path: Path
) -> None:
    said = {"padding_side": side, "truncation_side": "left", "split_special_tokens": True}
    settings = {"tokenizer_class": name, "eos_token": "<|im_end|>", **said}
    weights = imported(tmp_path, settings, mask=MASK if family == "llada" else None)
    out = run_stage(STAGE, ExportConfig(family, "float32"), {"weights": weights}, tmp_path / "out")
    written = read_json(out / "tokenizer_config.json")
    assert {key: written[key] for key in said} == {**said, "padding_side": "left" if family == "llada" else side}


def test_another_side_of_padding_than_the_checkpoints_is_found_by_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = imported(tmp_path, {**PLAIN, "padding_side": "left"})
    prove = export_run.in_fresh_process

    def harm_and_prove(function: str, out: Path, *arguments: Any) -> Any:
        written = read_json(out / "tokenizer_config.json")
        (out / "tokenizer_config.json").write_text(json.dumps({**written, "padding_side": "right"}))
        return prove(function, out, *arguments)

    monkeypatch.setattr(export_run, "in_fresh_process", harm_and_prove)
    with pytest.raises(CorruptionError, match="pads on the right, the checkpoint's own on the left"):
        run_stage(STAGE, ExportConfig("llama", "float32"), {"weights": weights}, tmp_path / "out")


def test_files_of_a_tokenizer_that_disagree_are_the_users_to_mend(tmp_path: Path) -> None:
    more = {"content": "quick", "special": False, "lstrip": False, "rstrip": False, "normalized": False}
    settings = {**PLAIN, "added_tokens_decoder": {"260": {**more, "single_word": False}}}
    weights = imported(tmp_path, settings, mask=MASK)
    words = r"\(tokenizer.json, tokenizer_config.json\) disagree: .* which adds 'quick', tokenizer.json gives other ids"
    with pytest.raises(UserError, match=words):
        run_stage(STAGE, ExportConfig("llada", "float32"), {"weights": weights}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
