"""What is not the same function is refused by name with what would do, and what was damaged is not committed."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer

from pipeline.artifact import MANIFEST, load_manifest
from pipeline.config import apply_settings, from_json, to_json
from pipeline.data.special_tokens import load_special_tokens
from pipeline.errors import CorruptionError, UserError
from pipeline.export import run as export_run
from pipeline.export.config import STAGE, ExportConfig, check_upstream
from pipeline.tokenizer.config import STAGE as TOKENIZER
from pipeline.tokenizer.config import TokenizerConfig
from pipeline.weights import Origin, load_record
from tests.pipeline.conftest import flip_bit, make_artifact
from tests.support.exports import (
    BLOCKS,
    EXPERTS,
    LLADA2,
    LLAMA,
    NEXT_TOKEN,
    PAIRS,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SHIFTED,
    Pair,
    export,
    weights_of,
)  # fmt: skip
from tests.support.interchange import commit, random_model, save_model
from tests.support.tiny_run import TINY, run_stage

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("forked_proofs")]
TENSORS = ExportConfig(proof="tensors", dtype="float32")
_TIED_MOE = replace(LLADA2, moe=replace(LLADA2.moe, renormalise=False))  # type: ignore[arg-type]

REFUSED = {
    "a shifted model as LLaDA": (
        Pair("llada", LLAMA, SHIFTED),
        'target_offset is 1, and "llada" reads its predictions at offset 0: .* Set export.family to '
        "dream; llama would hold its tensors",
    ),
    "a shifted model as LLaDA-MoE": (
        Pair("llada_moe", QWEN3_MOE, SHIFTED),
        "target_offset is 1.*No diffusion family here is the same function; qwen3_moe would hold its tensors",
    ),
    "a shifted model as LLaDA2": (Pair("llada2", LLADA2, SHIFTED), "target_offset is 1"),
    "an unshifted model as Dream": (
        Pair("dream", QWEN2),
        "target_offset is 0, and .dream. reads its predictions at offset 1.*Set export.family to llada; qwen2 would",
    ),
    "QK-norm as LLaDA": (
        Pair("llada", replace(QWEN3, head_dim=None)),
        "qk_norm is True; .llada. has False and nothing else: its q_norm and k_norm span all heads at once",
    ),
    "QK-norm as Dream": (Pair("dream", QWEN3, SHIFTED), "qk_norm is True; .dream. has False.*qwen3 would hold"),
    "heads of a size of their own as LLaDA": (
        Pair("llada", replace(LLAMA, head_dim=6)),
        r'head_dim is 6; "llada" has d_model / num_heads = 4',
    ),
    "heads of a size of their own as Dream": (Pair("dream", replace(QWEN2, head_dim=6), SHIFTED), "head_dim is 6"),
    "heads of a size of their own as LLaDA-MoE": (Pair("llada_moe", replace(QWEN3_MOE, head_dim=6)), "head_dim is 6"),
    "renormalised top-k as LLaDA-MoE": (
        Pair("llada_moe", replace(QWEN3_MOE, moe=replace(EXPERTS, renormalise=True))),
        "architecture.moe.renormalise is True; .llada_moe. has False and nothing else: its code never divides the "
        "chosen scores by their sum. No diffusion family here is the same function; qwen3_moe would hold its tensors",
    ),
    "a next-token model with renormalised top-k as LLaDA-MoE": (
        Pair("llada_moe", replace(QWEN3_MOE, moe=replace(EXPERTS, renormalise=True)), NEXT_TOKEN),
        "architecture.moe.renormalise is True; .* their sum. Set export.family to qwen3_moe$",
    ),
    "a next-token model with renormalised top-k as Llama": (
        Pair("llama", replace(QWEN3_MOE, moe=replace(EXPERTS, renormalise=True)), NEXT_TOKEN),
        "architecture.qk_norm is True; .llama. has False and nothing else. Set export.family to qwen3_moe$",
    ),
    "a dense model as LLaDA-MoE": (Pair("llada_moe", LLAMA), 'moe is None; "llada_moe" has experts.*llada'),
    "experts as LLaDA": (Pair("llada", replace(QWEN3_MOE, qk_norm=False)), 'moe is MoE.*; "llada" has none'),
    "experts as Dream": (Pair("dream", replace(QWEN3_MOE, qk_norm=False), SHIFTED), '"dream" has none'),
    "a dense model as LLaDA2": (Pair("llada2", QWEN3), 'moe is None; "llada2" has experts'),
    "softmax as LLaDA2": (Pair("llada2", QWEN3_MOE), "moe.router_score is .softmax."),
    "chosen scores as they are as LLaDA2": (Pair("llada2", _TIED_MOE), "moe.renormalise is False"),
    "qkv biases as Llama": (Pair("llama", QWEN2), "qkv_bias is True; .llama. has False.*Set export.family to llada"),
    "qkv biases as Qwen3": (Pair("qwen3", replace(QWEN3, qkv_bias=True)), "qkv_bias is True"),
    "no qkv biases as Qwen2": (Pair("qwen2", LLAMA), "qkv_bias is False; .qwen2. has True"),
    "a next-token model as LLaDA": (
        Pair("llada", LLAMA, NEXT_TOKEN),
        r"trained on next tokens \(autoregressive_nll\), and .* predicts masks: train it on as one first, by a "
        "workflow with ar_init and pretrain such as the recipe smollm2_to_diffusion. Set export.family to llama$",
    ),
    "a next-token model as Dream": (Pair("dream", QWEN2, NEXT_TOKEN), "trained on next tokens.*qwen2"),
    "a model of blocks as LLaDA": (
        Pair("llada", LLAMA, BLOCKS),
        "block_size is 4: the model was trained with blocks that do not see the text after them",
    ),
    "a model of blocks as LLaDA-MoE": (Pair("llada_moe", QWEN3_MOE, BLOCKS), "block_size is 4"),
    "stretched rotary positions as LLaDA": (
        Pair("llada", replace(LLAMA, rope_scaling=PAIRS["llama-llama"].architecture.rope_scaling)),
        "rope_scaling is RopeScaling.*its configuration knows rope_theta alone",
    ),
    "partly rotated heads as Qwen3": (Pair("qwen3", replace(QWEN3, rope_fraction=1 / 3)), "rope_fraction is 0.33"),
    "another norm": (Pair("llada", replace(LLAMA, norm="layer")), 'norm is .layer.*No diffusion family here is'),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_the_same_function_is_refused_before_anything_is_written(
    case: str, tokenizer: Path, tmp_path: Path
) -> None:
    pair, words = REFUSED[case]
    weights = weights_of(pair, tokenizer, tmp_path / "weights")
    config = replace(TENSORS, family=pair.family)
    with pytest.raises(UserError, match=f"^export.family is .{pair.family}., but .*{words}"):
        run_stage(STAGE, config, {"weights": weights, "tokenizer": tokenizer}, tmp_path / "out")
    assert_nothing_written(tmp_path / "out")


def assert_nothing_written(out: Path) -> None:
    attempt = out.with_name(f"{out.name}.state") / "attempt"
    assert not out.exists()
    assert not attempt.exists() or not any(attempt.iterdir())


def refused(inputs: dict[str, Path], out: Path, words: str, config: ExportConfig = TENSORS) -> None:
    with pytest.raises(UserError, match=words):
        run_stage(STAGE, config, inputs, out)
    assert_nothing_written(out)


def test_a_model_without_a_mask_token_is_refused_as_a_diffusion_model(tmp_path: Path) -> None:
    weights = save_model(tmp_path / "weights", random_model(LLAMA, mask=None))
    refused(
        {"weights": weights},
        tmp_path / "out",
        'mask_token_id is None; "llada" is a diffusion model.*ar_init',
        replace(TENSORS, without_tokenizer=True),
    )


def test_another_tokenizer_is_refused(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    other = make_artifact(TOKENIZER, TokenizerConfig(vocab_size=280), {"corpus": corpus}, tmp_path / "other")
    weights = weights_of(Pair("llada", LLAMA), tokenizer, tmp_path / "weights")
    refused({"weights": weights, "tokenizer": other}, tmp_path / "out", "is not that of the weights .*ids mean other")


def test_weights_of_which_no_tokenizer_is_known_take_none(tokenizer: Path, tmp_path: Path) -> None:
    weights = save_model(tmp_path / "weights", random_model(LLAMA))
    refused({"weights": weights, "tokenizer": tokenizer}, tmp_path / "out", "is not that of the weights")


@pytest.mark.parametrize(
    ("rows", "mask", "words"),
    [
        (-1, 0, r"has ids up to \d+, but the embedding in .* has \d+ rows.*ar_init"),
        (0, 7, r"the mask token of the model in .* is 7, that of the tokenizer .* is 0"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_embedding_is_refused(
    rows: int, mask: int, words: str, tokenizer: Path, tmp_path: Path
) -> None:
    special = load_special_tokens(tokenizer)
    model = random_model(LLAMA, special.vocab_size + rows, mask)
    weights = save_model(tmp_path / "weights", model, tokenizer=load_manifest(tokenizer).fingerprint)
    refused({"weights": weights, "tokenizer": tokenizer}, tmp_path / "out", words)


def test_a_directory_without_a_tokenizer_has_to_be_asked_for(tokenizer: Path, tmp_path: Path) -> None:
    weights = weights_of(Pair("llada", LLAMA), tokenizer, tmp_path / "weights")
    refused({"weights": weights}, tmp_path / "out", "brings no tokenizer; .*export.without_tokenizer=true")
    config = replace(TENSORS, without_tokenizer=True)
    both = {"weights": weights, "tokenizer": tokenizer}
    refused(both, tmp_path / "out", "without_tokenizer is true, but there is the input", config)
    out = run_stage(STAGE, config, {"weights": weights}, tmp_path / "out")
    assert not list(out.glob("*token*"))
    assert "there is no tokenizer here" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "settings",
    ['"auto_map": {"AutoTokenizer": ["evil.T", null]}', '"tokenizer_class": "TokenizersBackend", "is_local": true'],
    ids=["code that is not here", "a name of transformers 5"],
)
def test_the_tokenizer_that_an_import_brought_along_is_used(settings: str, tokenizer: Path, tmp_path: Path) -> None:
    special = load_special_tokens(tokenizer)
    model = random_model(LLAMA, special.vocab_size, None)
    weights = save_model(tmp_path / "weights", model, stage="import_checkpoint", **NEXT_TOKEN)
    for name, text in (
        ("tokenizer.json", (tokenizer / "tokenizer.json").read_text()),
        ("tokenizer_config.json", f'{{"chat_template": "{{{{ m }}}}", "unk_token": "the", {settings}}}'),
        ("chat_template.jinja", "{{ messages }}"),
    ):  # fmt: skip
        (weights / name).write_text(text)
    commit(weights, "import_checkpoint", {"special_ids": {"bos": 5, "eos": 1, "pad": None, "mask": None}})
    out = run_stage(STAGE, replace(TENSORS, family="llama"), {"weights": weights}, tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    bos = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).id_to_token(5)
    of_code = {"bos_token": bos, "eos_token": "<|endoftext|>"}  # which may know them without its settings
    assert export_run.read_json(out / "tokenizer_config.json") == {
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        **(of_code if "auto_map" in settings else {}),
        "chat_template": "{{ m }}",
        "unk_token": "the",
    }
    described = export_run.read_json(out / "config.json")
    assert (described["bos_token_id"], described["eos_token_id"], described["mask_token_id"]) == (5, 1, None)


def test_values_beyond_float16_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    pair = Pair("llada", LLAMA)
    special = load_special_tokens(tokenizer)
    model = random_model(pair.architecture, special.vocab_size, special.mask_token_id)
    model.state_dict()["norm.weight"][3] = 1e6
    weights = save_model(tmp_path / "weights", model, tokenizer=load_manifest(tokenizer).fingerprint)
    config = replace(TENSORS, dtype="float16")
    with pytest.raises(UserError, match=r"ln_f\.weight has values up to 1e\+06, beyond 65504"):
        run_stage(STAGE, config, {"weights": weights, "tokenizer": tokenizer}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_transformers_the_proof_by_logits_is_refused_with_what_to_install(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(Pair("llada", LLAMA), tokenizer, tmp_path / "weights")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    inputs = {"weights": weights, "tokenizer": tokenizer}
    refused(inputs, tmp_path / "out", r"pip install 'dlm\[hf\]', or set export.proof=tensors", ExportConfig())
    assert STAGE.ready is not None
    with pytest.raises(UserError, match=r"^last.proof is logits, which needs transformers.*set last.proof=tensors"):
        STAGE.ready(ExportConfig(), "last")
    STAGE.ready(TENSORS, "last")
    run_stage(STAGE, TENSORS, inputs, tmp_path / "out")
    assert load_manifest(tmp_path / "out").stats["proof"] == "tensors"
    assert "Logits were not compared" in (tmp_path / "out" / "README.md").read_text()


def test_damaged_weights_are_not_exported(tokenizer: Path, tmp_path: Path) -> None:
    weights = weights_of(Pair("llada", LLAMA), tokenizer, tmp_path / "weights")
    flip_bit(weights / "model.safetensors")
    with pytest.raises(CorruptionError, match="SHA-256 differs"):
        run_stage(STAGE, TENSORS, {"weights": weights, "tokenizer": tokenizer}, tmp_path / "out")


def _flip_weights(out: Path) -> None:
    flip_bit(out / "model.safetensors", -100)


def _change(name: str, value: Any) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        config = export_run.read_json(out / "config.json")
        export_run.write_json(out / "config.json", config | {name: value})

    return change


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("llama-llada", _flip_weights, "is not the same in both files"),
        ("llama-llada", _change("rope_theta", 7.0), "model.architecture.rope_base is 7.0; written was 500.0"),
        ("llama-llada", _change("rms_norm_eps", 1e-5), "model.architecture.norm_eps is 1e-05"),
        ("llama-llada", _change("mask_token_id", 3), r"model.mask_token_id is 3; written was \d+"),
        ("llama-llada", _change("n_kv_heads", 4), "model.architecture.num_kv_heads is 4; written was 2"),
        ("llama-llada", _change("max_sequence_length", 5), "seq_len is 5; written was 32"),
        ("own-llada2", _change("block_size", 5), "block_size is 5; written was 4"),
        ("own-llada2-whole-rows", _change("block_size", 5), "block_size is 5; written was 32"),
    ],
)
def test_what_was_not_written_as_it_should_is_not_committed(
    name: str,
    harm: Callable[[Path], None],
    words: str,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = weights_of(PAIRS[name], tokenizer, tmp_path / "weights")
    write = export_run.write_theirs

    def write_and_harm(*arguments: Any) -> list[Path]:
        paths = write(*arguments)
        harm(paths[0].parent)
        return paths

    monkeypatch.setattr(export_run, "write_theirs", write_and_harm)
    config = replace(TENSORS, family=PAIRS[name].family)
    with pytest.raises(CorruptionError, match=words):
        run_stage(STAGE, config, {"weights": weights, "tokenizer": tokenizer}, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_another_function_is_found_by_the_proof_and_not_committed(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names and shapes are right, the configuration is read as it was written: only the logits tell."""
    weights = weights_of(Pair("llada", LLAMA), tokenizer, tmp_path / "weights")
    prove = export_run.in_fresh_process

    def harm_and_prove(function: str, out: Path, *arguments: Any) -> Any:
        code, right = out / "modeling_llada.py", "self.ff_proj(normed)) * self.up_proj(normed)"
        assert right in code.read_text()
        code.write_text(code.read_text().replace(right, "self.up_proj(normed)) * self.ff_proj(normed)"))
        return prove(function, out, *arguments)

    monkeypatch.setattr(export_run, "in_fresh_process", harm_and_prove)
    inputs = {"weights": weights, "tokenizer": tokenizer}
    with pytest.raises(CorruptionError, match=r"is not the same function: the logits .* differ by .*above 0\.0001"):
        run_stage(STAGE, replace(TENSORS, proof="logits"), inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_killed_proof_left_is_removed_by_the_next(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(Pair("llada", LLAMA), tokenizer, tmp_path / "weights")
    state, places, prove = tmp_path / "out.state", [], export_run.in_fresh_process

    def look_and_prove(function: str, *arguments: Any) -> Any:
        scratch = Path(arguments[-2])
        places.append(scratch)
        assert [*scratch.parent.iterdir()] == [scratch]
        assert [*scratch.iterdir()] == []
        (scratch / "half").write_text("of a model")
        if len(places) == 1:
            raise KeyboardInterrupt
        return prove(function, *arguments)

    monkeypatch.setattr(export_run, "in_fresh_process", look_and_prove)
    inputs = {"weights": weights, "tokenizer": tokenizer}
    with pytest.raises(KeyboardInterrupt):
        run_stage(STAGE, ExportConfig(), inputs, tmp_path / "out")
    places[0].mkdir(parents=True)  # as after a kill
    (places[0] / "half").write_text("of a model")
    run_stage(STAGE, ExportConfig(), inputs, tmp_path / "out")
    assert len(places) == 2
    assert not any(place.exists() for place in places)
    assert places[0].is_relative_to(state)


def test_the_whole_stage_says_what_it_proved(tokenizer: Path, tmp_path: Path) -> None:
    weights = weights_of(Pair("qwen2", QWEN2), tokenizer, tmp_path / "weights")
    config = ExportConfig("qwen2", "bfloat16", name="A `test`", license="mit")
    out = run_stage(STAGE, config, {"weights": weights, "tokenizer": tokenizer}, tmp_path / "out")
    stats = load_manifest(out).stats
    assert (stats["proof"], stats["family"]) == ("logits", "qwen2")
    assert 0 < stats["logits_difference"] < 1e-5
    assert set(stats["versions"]) == {"transformers", "tokenizers", "torch"}
    assert stats["lineage"] == to_json(load_record(weights).lineage)
    card = (out / "README.md").read_text()
    assert card.startswith('---\nlicense: "mit"\nlibrary_name: transformers\n')
    assert "# A `test`\n" in card
    assert "`generate` is causal and meaningless for this model" in card
    assert (
        "1. trained\n   - objective: `masked_nelbo`\n   - steps: 20\n   - tokens: 5,120\n   - weights: `last`\n" in card
    )
    assert f"transformers {stats['versions']['transformers']}" in card
    # AutoTokenizer of transformers 5 takes Qwen2's rules for this model_type, whatever the files say
    assert ("Not AutoTokenizer" in card) == (not stats["auto_tokenizer_is_same"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"family": "gpt2"}, "family"),
        ({"family": "mdlm"}, "family"),
        ({"dtype": "int8"}, "dtype"),
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0; it must be at least 1"),
        ({"name": "a\nb"}, "name is 'a.nb'; it must be one line"),
        ({"license": "a\nb"}, "it must be one line"),
        ({"proof": "none"}, "proof"),
        ({"famly": "llada"}, "family"),
    ],
)
def test_bad_settings_are_refused_by_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_json(ExportConfig, values, where="export")


@pytest.mark.parametrize(
    ("settings", "family", "words"),
    [
        ([], "llada", "export.family is .llada., but architecture.qk_norm is True"),
        ([("architecture.qk_norm", False)], "dream", "export.family is .dream., but target_offset is 0"),
        ([("architecture.qk_norm", False), ("objective.target_offset", 1)], "llada", "target_offset is 1"),
        ([("architecture.qk_norm", False), ("objective.block_size", 4)], "llada", "block_size is 4"),
        (
            [("architecture.qk_norm", False), ("phases", {"rows": {"share": 1}, "blocks": {"block_size": 8}})],
            "llada",
            "block_size is 8",
        ),
        ([("objective", {"kind": "autoregressive", "t_min": 1e-3})], "llada2", "moe is None"),
        (
            [("architecture.qk_norm", False), ("objective", {"kind": "autoregressive", "t_min": 1e-3})],
            "llada",
            "trained on next tokens",
        ),
    ],
)
def test_a_training_that_the_family_could_not_say_is_refused_when_it_is_planned(
    settings: list[tuple[str, Any]], family: str, words: str
) -> None:
    named = [(f"pretrain.{path}", value) for path, value in settings]
    training = apply_settings({"pretrain": TINY}, named)["pretrain"]
    upstream = {"weights": {}, "weights.pretrain": to_json(training)}
    with pytest.raises(UserError, match=words):
        check_upstream(ExportConfig(family), upstream, "export")  # type: ignore[arg-type]


def test_a_training_that_ends_with_whole_rows_may_be_planned_as_llada() -> None:
    architecture = replace(TINY.architecture, qk_norm=False)
    phases: dict[str, Any] = {"blocks": {"block_size": 8}, "rows": {"block_size": 0}}
    training = apply_settings({"pretrain": replace(TINY, architecture=architecture)}, [("pretrain.phases", phases)])
    upstream = {"weights": {}, "weights.pretrain": to_json(training["pretrain"])}
    bare = ExportConfig("llada", without_tokenizer=True)
    check_upstream(ExportConfig("llada"), upstream | {"tokenizer": {}}, "export")
    check_upstream(bare, upstream, "export")
    check_upstream(ExportConfig("dream"), {"weights": {}}, "export")  # of what was imported nothing is known yet
    with pytest.raises(UserError, match=r"export has no input tokenizer.*or set export.without_tokenizer=true"):
        check_upstream(ExportConfig("llada"), upstream, "export")
    with pytest.raises(UserError, match=r"export.without_tokenizer is true, but there is the input tokenizer"):
        check_upstream(bare, {"weights": {}, "tokenizer": {}}, "export")


@pytest.mark.parametrize("name", ["llama-tied-dream", "own-llada2", "llama-llama"])
def test_card_and_stats_count_what_the_directory_holds(name: str, tokenizer: Path, tmp_path: Path) -> None:
    weights, exported = export(PAIRS[name], tokenizer, tmp_path)
    held, own = (
        sum(tensor.numel() for file in folder.glob("*.safetensors") for tensor in load_file(file).values())
        for folder in (exported, weights)
    )
    card = (exported / "README.md").read_text()
    assert load_manifest(exported).stats["num_params"] == held
    assert f" of {held:,} parameters\n" in card
    assert f"| parameters | {held:,} |" in card
    assert (held > own) == (name == "llama-tied-dream")
    told = f"| of them zeros, or the embedding once more | {held - own:,} |"
    assert (told in card) == (held > own)
    assert ("embedding once more" in card) == (held > own)


def test_the_card_tells_in_words_where_weights_come_from(tokenizer: Path, tmp_path: Path) -> None:
    lineage = [
        Origin("imported", {"sha256": {"a`b.gguf": "ab12" * 16}, "dtype": ["F32", "Q4_1"], "name": "two\nlines"}),
        Origin("trained", {"final_loss": 7.2321073644301475, "average_steps": [], "versions": {"torch": "2.13"}}),
        Origin("initialised", {"made": {f"blocks.{n}.gate": "drawn" for n in (0, 1)}, "left_out": []}),
    ]
    _, exported = export(Pair("llada", LLAMA, {"lineage": lineage}), tokenizer, tmp_path)
    card = (exported / "README.md").read_text()
    for told in (
        f"1. imported\n   - sha256: `a'b.gguf {'ab12' * 16}`\n   - dtype: `F32, Q4_1`\n   - name: `two lines`\n",
        "2. trained\n   - final loss: `7.232`\n   - versions: `torch 2.13`\n",
        "3. initialised\n   - made anew: `blocks.*.gate (drawn)`\n\n## Evaluation",
    ):
        assert told in card


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        (Pair("llada", LLAMA, {"within_documents": True}), "every position sees all others, within its document."),
        (Pair("llada2", LLADA2, BLOCKS, "bfloat16"), "rounded to bfloat16 (all but `expert_bias`);"),
        (Pair("llada", LLAMA, dtype="float16"), "of the float32 weights rounded to float16;"),
    ],
)
def test_the_card_says_what_was_seen_and_what_was_rounded(pair: Pair, told: str, tokenizer: Path, tmp_path: Path):
    _, exported = export(pair, tokenizer, tmp_path)
    assert told in (exported / "README.md").read_text()
