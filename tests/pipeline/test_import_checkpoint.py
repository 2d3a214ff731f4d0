"""Checkpoints of other projects become ours, same function, same bits; damaged or foreign ones do not."""

import inspect
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from dlm_core.ar_init import shift_right
from dlm_core.models.attention import AttentionMask
from dlm_core.models.config import ModelConfig
from dlm_core.models.transformer import Denoiser
from pipeline.artifact import load_manifest, read_json
from pipeline.config import from_json
from pipeline.errors import CorruptionError, UserError
from pipeline.import_checkpoint import fetch, run
from pipeline.import_checkpoint.config import STAGE, ImportConfig, external_data
from pipeline.import_checkpoint.source import license_of
from pipeline.weights import load_denoiser, load_record
from tests.pipeline.conftest import damage, flip_bit, make_artifact
from tests.support.hf_models import MODELS, VOCAB_SIZE, change_config, save_peer

pytestmark = pytest.mark.usefixtures("forked_proofs")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def _tokenizer(path: Path, num_words: int) -> None:
    words = {f"w{i}": i for i in range(num_words)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(path))


def _import(source: Path, out: Path, **settings: Any) -> Path:
    """Without the proof by logits, which takes seconds, unless it is asked for."""
    return make_artifact(STAGE, ImportConfig(**{"path": str(source), "proof": "tensors", **settings}), {}, out)


def _saved(root: Path, name: str = "llama", **values: Any) -> Path:
    return save_peer(name, root / "source", **values)


def _change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the only file of weights."""
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


# Numbers that are none


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("value", "told"), [(float("nan"), "nan"), (float("-inf"), "-inf")])
def test_a_tensor_that_is_not_finite_is_named(tmp_path, dtype, value, told):
    source = _saved(tmp_path, dtype=dtype)
    _change_tensors(source, lambda tensors: tensors[Q_PROJ].view(-1)[7:9].copy_(torch.tensor([value, float("inf")])))
    with pytest.raises(CorruptionError, match=rf"^{re.escape(str(source / SINGLE))}: {Q_PROJ} has the value {told} at "
                       "element 7; weights are finite numbers. Get the checkpoint again"):  # fmt: skip
        _import(source, tmp_path / "out")


# What an import gives


@pytest.fixture(scope="module", params=list(MODELS))
def imported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, forked_proofs: None
) -> tuple[Path, Path]:
    """Source and artifact of each family: bfloat16 shards, with code beside them that must not run."""
    root = tmp_path_factory.mktemp(request.param)
    source = save_peer(request.param, root / "source", shard_bytes=4000, dtype="bfloat16")
    trap = f"open({str(root / 'was_run')!r}, 'w')\n"
    (source / "modeling_trap.py").write_text(trap)
    (source / "configuration_trap.py").write_text(trap)
    change_config(source, auto_map={"AutoConfig": "configuration_trap.C", "AutoModelForCausalLM": "modeling_trap.M"})
    _tokenizer(source / "tokenizer.json", VOCAB_SIZE - 3)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    return source, _import(source, root / "out", proof="logits")


def _peer(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()


def test_import_proves_itself_by_logits_and_runs_no_code_beside_the_weights(imported):
    source, made = imported
    stats = load_manifest(made).stats
    assert stats["proof"] == "logits"
    assert 0.0 <= stats["logits_difference"] < 1e-5
    assert "*.py files beside the weights were not read" in stats["notices"]
    assert not (source.parent / "was_run").exists()


def test_imported_record_tells_where_the_weights_come_from(imported):
    source, made = imported
    record = load_record(made)
    (origin,) = record.lineage
    assert origin.kind == "imported"
    assert origin.details["dtype"] == ["BF16"]
    assert origin.details["family"] == json.loads((source / "config.json").read_text())["model_type"]
    assert set(origin.details["sha256"]) >= {"config.json", "model.safetensors.index.json", "tokenizer.json"}
    assert not any(name.endswith(".py") for name in origin.details["sha256"])
    assert (record.objective, record.target_offset, record.model.mask_token_id) == ("autoregressive_nll", 0, None)
    assert record.model.vocab_size == VOCAB_SIZE
    assert load_manifest(made).stats["special_ids"] == {
        "bos": 1,
        "eos": 2,
        "pad": None,
        "mask": None,
        "eos_token_ids": [],
    }


def test_files_of_the_tokenizer_are_passed_on_and_code_is_not(imported):
    source, made = imported
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (made / name).read_bytes() == (source / name).read_bytes()
    assert (made / run.SOURCE_CONFIG).read_bytes() == (source / "config.json").read_bytes()
    assert not list(made.glob("*.py"))
    assert "the embedding has 3 row(s) behind the last id of the tokenizer" in load_manifest(made).stats["notices"]


def test_report_names_every_tensor_of_ours_and_what_it_was_made_of(imported):
    _, made = imported
    report = read_json(made / run.REPORT)
    model, _ = load_denoiser(made)
    assert {*report["copied"], *report["joined"]} == model.state_dict().keys()
    assert report["joined"]["blocks.0.attention.qkv.weight"] == [
        f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"
    ]
    assert report["copied"]["norm.weight"] == "model.norm.weight"
    assert report["left_out"] == {}


def test_converted_model_with_a_causal_mask_and_a_masked_tail_gives_the_autoregressive_logits(imported):
    source, made = imported
    imported_model, record = load_denoiser(made)
    mask = VOCAB_SIZE - 1  # a row behind the tokenizer's ids
    model = Denoiser(replace(record.model, mask_token_id=mask)).eval()
    model.load_state_dict(imported_model.state_dict())
    tokens = torch.randint(VOCAB_SIZE - 3, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = _peer(source)(input_ids=tokens, use_cache=False).logits[..., :mask]
        clean = model(tokens, mask=AttentionMask("causal")).view(2, 12, -1)[..., :mask]
        for i in range(1, 12):
            xt = torch.where(torch.arange(12) < i, tokens, mask)
            shifted = shift_right(model(xt, mask=AttentionMask("causal")).view(2, 12, -1))[:, i, :mask]
            # experts see tokens in groups, whose size changes the order of their sums
            torch.testing.assert_close(
                shifted, clean[:, i - 1], rtol=0, atol=1e-6 if record.model.architecture.moe else 0
            )
            torch.testing.assert_close(shifted, theirs[:, i - 1], rtol=0, atol=2e-5)
        seen_all = model(xt, mask=AttentionMask("full")).view(2, 12, -1)[..., :mask]
    assert float((seen_all[:, 3] - clean[:, 3]).abs().max()) > 1e-2  # else the mask made no difference


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_dtype_is_widened_without_a_change(tmp_path, dtype):
    source = _saved(tmp_path, dtype=dtype)
    made = _import(source, tmp_path / "out")
    theirs, ours = load_file(source / SINGLE), load_file(made / SINGLE)
    assert torch.equal(ours["embedding.weight"], theirs[EMBEDDING].float())
    assert all(tensor.dtype == torch.float32 for tensor in ours.values())
    assert load_manifest(made).stats["proof"] == "tensors"


def test_licence_of_the_model_card_is_in_the_lineage(tmp_path):
    source = _saved(tmp_path)
    (source / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nlicense: other\n")
    details = load_record(_import(source, tmp_path / "out", name="somebody/model")).lineage[0].details
    assert (details["license"], details["name"]) == ("apache-2.0", "somebody/model")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('license: "LLAMA 3.1 Community"', "LLAMA 3.1 Community"),  # as an export of this project writes it
        ('license: "a \\"b\\" # c"  # d', 'a "b" # c'),
        ("license: 'it''s mine'", "it's mine"),
        ("license: LLAMA 3.1 C# # as they say", "LLAMA 3.1 C#"),
        ("license: apache-2.0\t", "apache-2.0"),
        ("license:", None),
        ("license: # none", None),
        ('license: "a', None),
        ('license: "\\x41"', None),
        ("license_name: x", None),
    ],
)
def test_a_licence_is_read_whole(line, wanted, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{line}\nlanguage: en\n---\n")
    assert license_of(tmp_path) == wanted


def test_buffers_without_function_are_left_out_and_listed(tmp_path):
    source = _saved(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _change_tensors(source, lambda tensors: tensors.update({name: torch.ones(2)}))
    made = _import(source, tmp_path / "out")
    assert read_json(made / run.REPORT)["left_out"] == {name: "frequencies that config.json tells"}
    assert load_manifest(made).stats["left_out"] == 1


def test_buffers_of_other_dtypes_are_left_out_too_and_only_they(tmp_path):
    source = _saved(tmp_path)
    mask, places = "model.layers.0.attention.bias", "model.embeddings.position_ids"
    _change_tensors(source, lambda t: t.update({mask: torch.ones(4, 4, dtype=torch.bool), places: torch.arange(64)}))
    made = _import(source, tmp_path / "out")
    assert read_json(made / run.REPORT)["left_out"].keys() == {mask, places}
    assert load_record(made).lineage[0].details["dtype"] == ["F32"]
    _change_tensors(source, lambda t: t.update({"model.layers.0.other": torch.arange(64)}))
    with pytest.raises(UserError, match=r"1 tensor\(s\) that cannot be used.* model\.layers\.0\.other, which is I64"):
        _import(source, tmp_path / "no")


def test_a_checkpoint_without_a_tokenizer_is_imported_with_a_notice(tmp_path):
    made = _import(_saved(tmp_path), tmp_path / "out")
    assert any(notice.startswith("there is no tokenizer.json") for notice in load_manifest(made).stats["notices"])


# Tied heads


def test_head_that_is_the_embedding_once_more_is_left_out(tmp_path):
    source = _saved(tmp_path, "qwen2")
    _change_tensors(source, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    made = _import(source, tmp_path / "out")
    assert load_record(made).model.architecture.tied_head
    assert read_json(made / run.REPORT)["left_out"] == {HEAD: "the embedding once more"}


def test_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path):
    source = _saved(tmp_path, "qwen2")
    _change_tensors(source, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}))
    with pytest.raises(UserError, match=rf"ties the head .* {HEAD} is not {EMBEDDING} once more.* untie them"):
        _import(source, tmp_path / "out")
    change_config(source, tie_word_embeddings=False)
    assert not load_record(_import(source, tmp_path / "untied")).model.architecture.tied_head


# Tensors that do not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_PROJ), f"{Q_PROJ} is missing"),
        (lambda t: t.update({"model.layers.0.extra": torch.ones(1)}), r"model\.layers\.0\.extra is unknown"),
        (
            lambda t: t.update({Q_PROJ: torch.ones(16, 15)}),
            rf"{Q_PROJ} has shape \(16, 15\), the model wants \(16, 16\)",
        ),
        (lambda t: t.update({Q_PROJ: torch.ones(16, 16, dtype=torch.int8)}), rf"{Q_PROJ}, which is I8"),
        (lambda t: t.pop(HEAD), f"{HEAD} is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name_before_anything_is_written(tmp_path, change, message):
    source = _saved(tmp_path)
    _change_tensors(source, change)
    with pytest.raises(UserError, match=message):
        _import(source, tmp_path / "out")
    assert not (tmp_path / "out" / SINGLE).exists()


def test_a_file_cut_off_is_refused_by_its_name(tmp_path):
    source = _saved(tmp_path)
    damage(source / SINGLE, lambda data: data.__delitem__(slice(len(data) - 9, None)))
    with pytest.raises(CorruptionError, match=r"source/model\.safetensors is cut"):
        _import(source, tmp_path / "out")


def test_a_damaged_header_is_refused_by_the_name_of_its_file(tmp_path):
    source = _saved(tmp_path)
    flip_bit(source / SINGLE, 9)
    with pytest.raises(CorruptionError, match=r"source/model\.safetensors has a damaged header"):
        _import(source, tmp_path / "out")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return _saved(tmp_path, shard_bytes=9000)


def test_a_missing_shard_is_refused_by_its_name(sharded, tmp_path):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks {shard.name}, which model.safetensors.index.json names"):
        _import(sharded, tmp_path / "out")


def _change_index(directory: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def _swap(index: dict[str, str]) -> None:
    index[Q_PROJ] = next(name for name in index.values() if name != index[Q_PROJ])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap, rf"has {Q_PROJ} in model-.*, but it is in model-"),
        (lambda index: index.pop(Q_PROJ), rf"has {Q_PROJ} in no file, but it is in model-"),
        (lambda index: index.update({"no.such": index[Q_PROJ]}), r"has no\.such in model-.*, but it is in none"),
        (lambda index: index.update({Q_PROJ: "../x.safetensors"}), "weight_map names files that are no"),
        (lambda index: index.clear(), "has no weight_map from tensors to files"),
    ],
)
def test_an_index_that_disagrees_with_its_files_is_refused(sharded, tmp_path, change, message):
    _change_index(sharded, change)
    with pytest.raises(CorruptionError, match=message):
        _import(sharded, tmp_path / "out")


def test_a_single_file_beside_an_index_of_others_is_refused(sharded, tmp_path):
    shutil.copyfile(min(sharded.glob("*.safetensors")), sharded / SINGLE)
    with pytest.raises(UserError, match="take out the one that is not meant"):
        _import(sharded, tmp_path / "out")


def test_files_without_an_index_are_refused(sharded, tmp_path):
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"safetensors files and no model\.safetensors\.index\.json"):
        _import(sharded, tmp_path / "out")


# Files that are not what they should be


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path):
    source = _saved(tmp_path)
    _tokenizer(source / "tokenizer.json", VOCAB_SIZE + 1)
    with pytest.raises(UserError, match=rf"has ids up to {VOCAB_SIZE}, but the embedding has {VOCAB_SIZE} rows"):
        _import(source, tmp_path / "out")
    _tokenizer(source / "tokenizer.json", VOCAB_SIZE)
    _import(source, tmp_path / "fits")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'; known are llama"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0, a key that is not known"),
    ],
)
def test_a_configuration_that_is_not_computed_is_refused(tmp_path, values, message):
    source = _saved(tmp_path)
    change_config(source, **values)
    with pytest.raises(UserError, match=message):
        _import(source, tmp_path / "out")


def test_weights_in_a_pickle_are_refused_without_being_opened(tmp_path):
    source = _saved(tmp_path)
    (source / SINGLE).rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickle: loading one runs code"):
        _import(source, tmp_path / "out")


def test_directories_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no directory .*absent"):
        _import(tmp_path / "absent", tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        _import(tmp_path / "empty", tmp_path / "b")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"has no \*\.safetensors"):
        _import(tmp_path / "empty", tmp_path / "c")
    save_file({"x": torch.ones(1)}, tmp_path / "empty" / SINGLE)
    with pytest.raises(CorruptionError, match=r"config\.json is no JSON"):
        _import(tmp_path / "empty", tmp_path / "d")
    (tmp_path / "empty" / "config.json").write_text('{"num_hidden_layers": 1' + "0" * 5000 + "}")
    with pytest.raises(CorruptionError, match=r"config\.json is no JSON: .*4300 digits"):
        _import(tmp_path / "empty", tmp_path / "e")


# Proofs


def test_a_number_that_changed_on_the_way_is_found_before_the_commit(tmp_path, monkeypatch):
    def write_and_spoil(family: Any, model: Any, theirs: Any, path: Path, left_out: Any) -> None:
        write_ours(family, model, theirs, path, left_out)
        flip_bit(path)

    write_ours = run.write_ours
    monkeypatch.setattr(run, "write_ours", write_and_spoil)
    with pytest.raises(CorruptionError, match="is not the same in both files"):
        _import(_saved(tmp_path), tmp_path / "out")


def test_a_model_that_computes_something_else_is_found_by_its_logits(tmp_path, monkeypatch):
    """As a wrong base of the rotary positions would, which no tensor shows."""

    def read_wrongly(*arguments: Any) -> Any:
        found = read_directory(*arguments)
        model = found.model
        return replace(found, model=ModelConfig(replace(model.architecture, rope_base=400.0), model.vocab_size, None))

    read_directory = run.read_directory
    source = _saved(tmp_path)
    monkeypatch.setattr(run, "read_directory", read_wrongly)
    with pytest.raises(CorruptionError, match="the converted model is not the same function: its logits differ"):
        _import(source, tmp_path / "out", proof="logits")


def test_proof_by_logits_without_transformers_says_what_to_install(tmp_path, monkeypatch):
    source = _saved(tmp_path)
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs transformers: pip install 'dlm\[hf\]', or set .*proof=tensors"):
        _import(source, tmp_path / "a", proof="logits")
    _import(source, tmp_path / "b")


# Identity, the hub


def test_identity_follows_the_bytes_that_are_read_and_not_their_place(tmp_path):
    source = _saved(tmp_path)
    before = external_data(ImportConfig(str(source)))
    (source / "modeling_x.py").write_text("pass")
    moved = source.rename(tmp_path / "elsewhere")
    assert external_data(ImportConfig(str(moved))) == before
    change_config(moved, rope_theta=7.0)
    assert external_data(ImportConfig(str(moved))) != before
    assert external_data(ImportConfig()) is None


def test_no_checkpoint_at_all_is_asked_for_before_a_run():
    assert STAGE.ready is not None
    with pytest.raises(UserError, match=r"import_checkpoint\.path is empty"):
        STAGE.ready(ImportConfig(), "import_checkpoint")
    STAGE.ready(ImportConfig("x"), "import_checkpoint")


def test_a_name_on_the_hub_is_downloaded_at_its_commit_without_code(tmp_path, monkeypatch):
    import huggingface_hub

    source = _saved(tmp_path)
    asked: dict[str, Any] = {}

    signature = inspect.signature(huggingface_hub.snapshot_download)

    def download(*names: str, **how: Any) -> str:
        asked.update(signature.bind(*names, **how).arguments)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    path = f"hf:somebody/model@{COMMIT}"
    assert external_data(ImportConfig(path)) == {"hub": f"somebody/model@{COMMIT}", "gguf_file": ""}
    made = make_artifact(STAGE, ImportConfig(path, proof="tensors"), {}, tmp_path / "out")
    assert asked.keys() == {"repo_id", "revision", "allow_patterns"}  # versions below 1 know little more
    assert (asked["repo_id"], asked["revision"]) == ("somebody/model", COMMIT)
    assert not any(pattern in ("*", "*.py") for pattern in asked["allow_patterns"])
    assert load_record(made).lineage[0].details["name"] == f"somebody/model@{COMMIT}"


@pytest.mark.parametrize("path", ["hf:somebody/model", "hf:somebody/model@main", "hf:model"])
def test_a_name_on_the_hub_without_its_commit_is_refused(path):
    with pytest.raises(UserError, match="names no commit on the hub"):
        from_json(ImportConfig, {"path": path})
