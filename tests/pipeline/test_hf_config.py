"""config.json of the families: published ones, both spellings, what is written, what is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest

from dlm_core.models.config import Architecture, ModelConfig, MoE, RopeScaling
from dlm_core.models.presets import PRESETS, tiny
from pipeline.errors import UserError
from pipeline.hf_config import (
    AUTOREGRESSIVE,
    Described,
    SpecialIds,
    read_config,
    write_config,
    write_generation_config,
)
from pipeline.hf_names import DITS, FAMILIES, Family
from pipeline.weights import ModelRecord
from tests.support.published_configs import DREAM_7B, LLADA2_MINI, LLADA_8B, LLADA_MOE, LLAMA_3_1, PUBLISHED, QWEN3_MOE

EXPORTABLE = [family for family in FAMILIES if family not in DITS]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration_is_the_preset_of_that_name(name):
    found, preset = read_config(PUBLISHED[name]), PRESETS[name]
    is_causal = found.family in AUTOREGRESSIVE
    mask = None if is_causal else preset.model.mask_token_id
    architecture = preset.model.architecture
    if architecture.head_size * architecture.num_heads == architecture.d_model:
        architecture = replace(architecture, head_dim=None)
    assert found.model == replace(preset.model, architecture=architecture, mask_token_id=mask)
    assert found.target_offset == preset.target_offset
    assert found.objective == (
        "autoregressive_nll" if is_causal else "block_nelbo" if preset.block_size else "masked_nelbo"
    )
    assert found.block_size == (preset.block_size or 0)
    assert found.notices


def test_ids_and_dtype_are_told():
    assert read_config(LLAMA_3_1).special == SpecialIds(128_000, 128_001, eos_token_ids=[128_001, 128_008])
    assert read_config(LLAMA_3_1).dtype == read_config(QWEN3_MOE).dtype == "bfloat16"
    assert read_config(QWEN3_MOE | {"dtype": None}).dtype is None
    assert read_config(DREAM_7B).special == SpecialIds(151_643, 151_643, 151_643, 151_666)


def test_ids_missing_in_config_come_from_generation_config():
    generation = {"eos_token_id": [5, 6], "pad_token_id": 7, "temperature": 0.6}
    found = read_config(QWEN3_MOE | {"pad_token_id": 9}, generation)
    assert found.special == SpecialIds(None, 5, 9, None, [5, 6])


@pytest.mark.parametrize(
    ("own", "generation", "wanted"),
    [
        ([5, 6, 7], None, SpecialIds(None, 5, None, None, [5, 6, 7])),
        ([5, 6, 7], [5, 6], SpecialIds(None, 5, None, None, [5, 6])),
        (5, [6, 5], SpecialIds(None, 5, None, None, [6, 5])),
        (5, 6, SpecialIds(None, 5, None, None, [6])),
        ([5], 5, SpecialIds(None, 5)),
        (5, [], SpecialIds(None, 5)),
        (-1, -1, SpecialIds()),
    ],
)
def test_every_end_of_generation_is_kept_and_that_of_generation_config_goes_first(own, generation, wanted):
    found = read_config(QWEN3_MOE | {"bos_token_id": None, "eos_token_id": own}, {"eos_token_id": generation}).special
    assert found == wanted
    ends = wanted.eos_token_ids or wanted.eos_token_id
    assert write_generation_config(found).get("eos_token_id") == ends


def test_an_end_of_generation_that_is_no_id_is_refused():
    with pytest.raises(UserError, match=r"eos_token_ids.1 is 'end'"):
        read_config(QWEN3_MOE, {"eos_token_id": [5, "end"]})


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in DITS])
def test_ids_that_are_written_as_none_are_none_whatever_the_class_would_take(family):
    record = _record(family)
    written = write_config(family, record, SpecialIds())
    assert written["eos_token_id"] is None
    found = read_config(written).special
    assert found == SpecialIds(mask_token_id=record.model.mask_token_id)


def test_an_id_below_0_is_none():
    assert read_config(QWEN3_MOE | {"pad_token_id": -1}).special.pad_token_id is None


@pytest.mark.parametrize("family", EXPORTABLE)
def test_ids_that_are_null_are_unknown_whatever_the_family_has_without_the_key(family):
    written = write_config(family, _record(family), SpecialIds())
    assert written["eos_token_id"] is None
    special = read_config(written).special
    assert (special.bos_token_id, special.eos_token_id, special.pad_token_id) == (None, None, None)


def test_llada_with_experts_is_llada_moe():
    assert read_config(LLADA_MOE | {"model_type": "llada"}) == read_config(LLADA_MOE)


def test_both_spellings_of_keys_are_read_alike():
    moe = {name: value for name, value in QWEN3_MOE.items() if name not in ("num_experts", "rope_theta", "dtype")}
    rope = {"rope_theta": 1_000_000.0, "rope_type": "default"}
    other = moe | {"num_local_experts": 128, "rope_parameters": rope, "torch_dtype": "bfloat16"}
    assert read_config(other) == read_config(QWEN3_MOE)
    rest = {name: value for name, value in LLAMA_3_1.items() if not name.startswith("rope")}
    flat = LLAMA_3_1["rope_scaling"] | {"rope_theta": 500_000.0}
    assert read_config(rest | {"rope_parameters": flat}) == read_config(LLAMA_3_1)
    assert read_config(rest | {"rope_parameters": {"full_attention": flat}}) == read_config(LLAMA_3_1)
    old = {"type" if name == "rope_type" else name: value for name, value in LLAMA_3_1["rope_scaling"].items()}
    assert read_config(LLAMA_3_1 | {"rope_scaling": old}) == read_config(LLAMA_3_1)


def _rope(**values: Any) -> RopeScaling | None:
    return read_config(LLAMA_3_1 | {"rope_scaling": values}).model.architecture.rope_scaling


def test_rotary_stretches_are_read_with_the_defaults_of_transformers():
    assert _rope(rope_type="linear", factor=2.0) == RopeScaling("linear", 2.0)
    assert _rope(rope_type="yarn", factor=4.0) == RopeScaling("yarn", 4.0, 131_072, 1.0, 32.0)
    yarn = _rope(
        type="yarn",
        factor=4.0,
        original_max_position_embeddings=32,
        beta_fast=16,
        beta_slow=2,
        attention_factor=1.13862944,
        truncate=True,
    )
    assert yarn == RopeScaling("yarn", 4.0, 32, 2.0, 16.0)
    assert _rope(rope_type="linear", factor=1.0) is None
    assert _rope(rope_type="default") is None


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'; default, linear, llama3 and yarn"),
        ({"rope_type": "linear"}, 'factor is missing, which "linear" needs'),
        ({"rope_type": "llama3", "factor": 8.0}, 'low_freq_factor is missing, which "llama3" needs'),
        (
            {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0},
            r"attention_factor is 1\.0; only .* = 1\.13863",
        ),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": False}, "truncate is False; only True"),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}, r"mscale is 1\.0"),
        ({"rope_type": "linear", "factor": 0.5}, r"factor is 0\.5"),
        ({"rope_type": "default", "mrope_section": [1]}, r"mrope_section is \[1\]"),
        ({"rope_type": "default", "short_factor": 2.0}, r"short_factor is 2\.0; \"default\" has none here"),
        ({"rope_type": "yarn", "factor": "4"}, "factor is '4'"),
        (["yarn"], r"rope_scaling is \['yarn'\]; an object is wanted"),
    ],
)
def test_rotary_parameters_that_are_not_computed_are_refused(rope, message):
    with pytest.raises(UserError, match=message):
        read_config(LLAMA_3_1 | {"rope_scaling": rope})


def test_layers_with_experts_are_found_whichever_way_they_are_written():
    base = QWEN3_MOE | {"num_hidden_layers": 6}

    def places(**values: Any) -> tuple[int, int]:
        moe = read_config(base | values).model.architecture.moe
        assert moe
        return moe.first_k_dense, moe.layer_frequency

    assert places() == (0, 1)
    assert places(decoder_sparse_step=2) == (1, 2)
    assert places(mlp_only_layers=[0, 1]) == (2, 1)
    assert places(mlp_only_layers=[0, 1, 2, 3, 4]) == (5, 1)
    assert places(mlp_only_layers=[0, 2, 3, 4, 5]) == (1, 5)
    with pytest.raises(UserError, match=r"mlp_only_layers puts experts into the layers \[0, 2, 3, 4, 5\]"):
        places(mlp_only_layers=[1])
    with pytest.raises(UserError, match="mlp_only_layers leaves no layer with experts"):
        places(decoder_sparse_step=7)


# Writing

SPECIAL = SpecialIds(1, 2, 3, 4)


def _record(family: Family, **changes: Any) -> ModelRecord:
    """A tiny model of a family, with whatever the family can hold and its defaults are not."""
    source = {
        "llama": "llama3.1-8b",
        "qwen2": "qwen2.5-7b",
        "qwen3": "qwen3-0.6b",
        "qwen3_moe": "qwen3-30b-a3b",
        "llada": "llada-8b",
        "dream": "dream-7b",
        "llada_moe": "llada-moe-7b-a1b",
        "llada2": "llada2-mini",
    }
    a = replace(tiny(PRESETS[source[family]]).architecture, num_kv_heads=2, norm_eps=3e-5, rope_base=777.0)
    a = replace(a, **{"head_dim": None if a.head_size * a.num_heads == a.d_model else a.head_dim, **changes})
    objective = {"llada2": "block_nelbo"}.get(family, "masked_nelbo")
    objective = "autoregressive_nll" if family in AUTOREGRESSIVE else objective
    return ModelRecord(
        ModelConfig(a, 23, None if family in AUTOREGRESSIVE else 4),
        seq_len=96,
        objective=objective,
        block_size=8 if family == "llada2" else 0,
        target_offset=1 if family == "dream" else 0,
    )


def _special(family: Family) -> SpecialIds:
    return replace(SPECIAL, mask_token_id=None) if family in AUTOREGRESSIVE else SPECIAL


@pytest.mark.parametrize("family", EXPORTABLE)
def test_written_configuration_is_read_as_the_same_record(family):
    record = _record(family)
    found = read_config(json.loads(json.dumps(write_config(family, record, SPECIAL, "bfloat16"))))
    assert found.record() == record
    assert (found.family, found.dtype, found.special) == (family, "bfloat16", _special(family))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_scaling": RopeScaling("yarn", 4.0, 16, 1.0, 16.0), "tied_head": True}),
        ("llama", {"rope_scaling": RopeScaling("linear", 4.0), "head_dim": 10}),
        ("dream", {"rope_scaling": RopeScaling("llama3", 4.0, 16, 1.0, 4.0)}),
        ("llada", {"tied_head": True, "qkv_bias": True, "init": "normal", "init_std": 0.3}),
        ("llada_moe", {"num_layers": 5, "d_ff": 48, "moe": MoE(4, 2, 8, 2, renormalise=False, layer_frequency=2)}),
        ("qwen3_moe", {"num_layers": 5, "d_ff": 48, "moe": MoE(4, 2, 8, first_k_dense=1, layer_frequency=2)}),
    ],
)
def test_written_options_of_a_family_are_read_back(family, changes):
    record = _record(family, **changes)
    assert read_config(write_config(family, record, SPECIAL)).record() == record


@pytest.mark.parametrize(
    ("family", "public", "left"),
    [
        ("llada", LLADA_8B, set()),
        ("dream", DREAM_7B, set()),
        ("llada_moe", LLADA_MOE, set()),
        ("llada2", LLADA2_MINI, set()),
        ("llama", LLAMA_3_1, set()),
        ("qwen3_moe", QWEN3_MOE, {"dtype"}),
    ],
)
def test_every_key_of_a_published_configuration_is_written(family, public, left):
    assert public.keys() - left <= write_config(family, _record(family), SPECIAL).keys()


def test_a_tied_head_that_a_family_writes_out_is_not_called_tied():
    for family in ("dream", "llada_moe", "llada2"):
        config = write_config(family, _record(family, tied_head=True), SPECIAL)
        assert config["tie_word_embeddings"] is False
        assert not read_config(config).model.architecture.tied_head


def test_generation_configuration_holds_the_ids_that_are_known():
    written = write_generation_config(SpecialIds(eos_token_id=2, mask_token_id=4))
    assert {name: value for name, value in written.items() if name.endswith("_id")} == {
        "eos_token_id": 2,
        "mask_token_id": 4,
    }


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mdlm", {}, '"mdlm" is read here and not written'),
        ("dream", {"target_offset": 0}, 'target_offset is 0; "dream" reads its predictions at offset 1'),
        ("llada", {"target_offset": 1}, 'target_offset is 1; "llada" reads .* Write "dream"'),
        ("llada2", {"target_offset": 1}, "target_offset is 1"),
    ],
)
def test_models_that_a_family_would_read_differently_are_refused(family, change, message):
    record = replace(_record("llama" if family in DITS else family), **change)
    with pytest.raises(UserError, match=message):
        write_config(family, record, SPECIAL)


def test_a_model_without_a_mask_is_no_diffusion_family():
    record = _record("llada")
    with pytest.raises(UserError, match='mask_token_id is None; "llada" is a diffusion model'):
        write_config("llada", replace(record, model=replace(record.model, mask_token_id=None)), SPECIAL)
    config = write_config("llada", record, SPECIAL)
    with pytest.raises(UserError, match='mask_token_id is missing; "llada" is a diffusion model'):
        read_config(config | {"mask_token_id": None})
    assert read_config(config | {"mask_token_id": None}, {"mask_token_id": 6}).model.mask_token_id == 6


@pytest.mark.parametrize("public", [LLAMA_3_1, LLADA2_MINI, DREAM_7B])
def test_attention_that_is_said_to_be_full_everywhere_is_what_it_is_without_the_word(public):
    words = {"layer_types": ["full_attention"] * 32, "use_sliding_window": False, "sliding_window": None}
    assert read_config({**public, **words}) == read_config({**public, "use_sliding_window": False})


# Refusals


@pytest.mark.parametrize(
    ("public", "change", "message"),
    [
        (LLAMA_3_1, {"model_type": "mistral"}, "model_type is 'mistral'; known are llama, qwen2, .* bd3lm"),
        (LLAMA_3_1, {"model_type": None}, "model_type is None; known are"),
        (LLADA2_MINI, {"model_type": "llada2_moe_veomni"}, "whose experts are merged"),
        (LLAMA_3_1, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; of \"llama\" only 'silu' is computed here"),
        (LLAMA_3_1, {"attention_bias": True}, "attention_bias is True"),
        (LLAMA_3_1, {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA_3_1, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        (LLAMA_3_1, {"rope_interleaved": True}, "rope_interleaved is True"),
        (LLAMA_3_1, {"quantization_config": {"bits": 4}}, "quantization_config is"),
        (LLAMA_3_1, {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1"),
        (LLAMA_3_1, {"sliding_window": 4096}, r"sliding_window is 4096, a key that is not known .*take it out"),
        (LLAMA_3_1, {"logit_softcapping": 30.0}, r"logit_softcapping is 30\.0, a key that is not known"),
        (LLAMA_3_1, {"rope_parameters": {"rope_theta": 1.0}}, "rope_scaling and rope_parameters differ"),
        (LLAMA_3_1, {"num_key_value_heads": 5}, "num_kv_heads is 5; it must divide num_heads 32"),
        (LLAMA_3_1, {"hidden_size": "wide"}, "hidden_size is 'wide'; a number is wanted"),
        (LLAMA_3_1, {"num_hidden_layers": True}, "num_layers is True: a number is needed"),
        (LLAMA_3_1, {"rms_norm_eps": None}, "rms_norm_eps is None; a number is wanted"),
        (LLAMA_3_1, {"tie_word_embeddings": None}, "tie_word_embeddings is None; true or false is wanted"),
        (LLAMA_3_1, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; true or false is wanted"),
        (LLAMA_3_1, {"use_sliding_window": True}, "use_sliding_window is True"),
        (LLAMA_3_1, {"layer_types": ["sliding_attention"] * 32}, "layer_types is"),
        (LLAMA_3_1, {"eos_token_id": "</s>"}, "eos_token_id is '</s>'; a token id is wanted"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be at least 1"),
        (LLADA_MOE, {"moe_layer_freq": 1}, "moe_layer_freq is 1; a list is wanted"),
        (QWEN3_MOE, {"use_sliding_window": True}, "use_sliding_window is True"),
        (QWEN3_MOE, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        (QWEN3_MOE, {"num_local_experts": 64}, "num_experts is 128 and num_local_experts is 64"),
        (LLAMA_3_1, {"num_hidden_layers": 10_001}, r"num_hidden_layers is 10001; at most 10,000 is computed here"),
        (LLADA_8B, {"n_layers": 10**9}, r"n_layers is 1000000000; at most 10,000"),
        (QWEN3_MOE, {"num_experts": 10**9}, r"num_experts is 1000000000; at most 10,000"),
        (LLADA_8B, {"attention_layer_norm": True}, "attention_layer_norm is True"),
        (LLADA_8B, {"alibi": True}, "alibi is True"),
        (LLADA_8B, {"scale_logits": True}, "scale_logits is True"),
        (LLADA_8B, {"embedding_size": 100}, "embedding_size is 100, fewer than vocab_size 126464"),
        (LLADA_8B, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is"),
        (LLADA_8B, {"mask_token_id": 126_464}, "mask_token_id 126464 is outside the vocabulary"),
        (LLADA_MOE, {"norm_topk_prob": True}, "norm_topk_prob is True"),
        (LLADA_MOE, {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias is True"),
        (LLADA_MOE, {"moe_layer_freq": [1, 1]}, "moe_layer_freq has 2 entries for 16 layers"),
        (LLADA_MOE, {"shared_expert_intermediate_size": 1000}, "shared_expert_intermediate_size is 1000"),
        (LLADA2_MINI, {"rotary_dim": 32}, "rotary_dim is 32; partial_rotary_factor makes it 64"),
        (LLADA2_MINI, {"score_function": "softmax"}, "score_function is 'softmax'"),
        (LLADA2_MINI, {"use_bias": True}, "use_bias is True"),
        (LLADA2_MINI, {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        (DREAM_7B, {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        (DREAM_7B, {"head_dim": 64}, "head_dim is 64, a key that is not known"),
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(public, change, message):
    read_config(public)
    with pytest.raises(UserError, match=message):
        read_config(public | change)


@pytest.mark.parametrize(
    ("public", "key", "message"),
    [
        (LLAMA_3_1, "hidden_size", "hidden_size is missing"),
        (LLADA_8B, "rope", "rope is missing, which means False there"),
        (LLADA_8B, "activation_type", "activation_type is missing, which means 'swiglu' there"),
        (LLADA_MOE, "moe_layer_freq", "moe_layer_freq is missing"),
        (LLADA2_MINI, "use_bias", "use_bias is missing, which means True there"),
    ],
)
def test_keys_whose_default_in_their_class_is_a_trap_are_refused_when_they_are_missing(public, key, message):
    with pytest.raises(UserError, match=message):
        read_config({name: value for name, value in public.items() if name != key})


def test_defaults_of_their_classes_are_taken_where_keys_are_missing():
    small = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes = {"vocab_size": 9, **small}
    assert _of(sizes, "llama").model.architecture == Architecture(
        d_model=64, num_layers=1, num_heads=4, d_ff=48, tied_head=False, init="normal"
    )
    assert _of(sizes | {"num_key_value_heads": 4}, "qwen3").model.architecture.head_dim == 128
    assert _of(sizes, "llama").special == SpecialIds(1, 2)
    assert _of(sizes, "llama").seq_len == 2048


def _of(values: dict[str, Any], family: str) -> Described:
    return read_config(values | {"model_type": family})


@pytest.mark.parametrize("family", AUTOREGRESSIVE)
def test_what_transformers_saves_is_read_and_what_is_written_is_the_same_to_it(family, tmp_path):
    from transformers import AutoConfig

    record = _record(family)
    config = write_config(family, record, SPECIAL)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "rope_theta" not in saved  # the newer spelling
    assert read_config(saved).record() == record
