"""What a GGUF file says is looked through before it is read: keys, tensors, how text is cut."""

import pytest
from tokenizers import Tokenizer, models

from pipeline.errors import UserError
from pipeline.gguf_header import TYPES
from pipeline.import_checkpoint.dequantise import as_meant, as_written, check_loaded
from pipeline.import_checkpoint.gguf import check_gguf
from pipeline.import_checkpoint.gguf_tokenizer import set_cut, why_no_tokenizer
from tests.support.gguf_logits import write_tiny

# What is not all that a model is made of


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "rope.scaling.type is 'yarn'.* 4.0"),
        ({"llama.rope.scaling.factor": 4.0}, "rope.scaling.type is 'linear'"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "llama.rope.scaling.attn_factor is 1.5"),
        ({"llama.rope.scale_linear": 2.0}, "llama.rope.scale_linear is 2.0"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8; heads have 16"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.block_count": 10**9}, "llama.block_count is 1000000000"),
        ({"llama.attention.causal": False}, "llama.attention.causal is False; only True, which has no effect, is read"),
        ({"llama.attention.sliding_window": 4}, "llama.attention.sliding_window is 4"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5"),
        ({"llama.attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv is 8.0"),
        ({"llama.logit_scale": 3.0}, "llama.logit_scale is 3.0; only 1"),
        ({"llama.embedding_scale": 12.0}, "llama.embedding_scale is 12.0"),
        ({"llama.residual_scale": 0.25}, "llama.residual_scale is 0.25"),
        ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping is 30.0"),
        ({"llama.rope.freq_base_swa": 1e4}, "llama.rope.freq_base_swa is 10000.0; it is not known here"),
        ({"llama.a.key.of.tomorrow": "x"}, "llama.a.key.of.tomorrow is 'x'; it is not known here"),
        ({"llama.tensor_data_layout": "reference"}, "llama.tensor_data_layout is 'reference'"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0; a number of at least 1"),
        ({"llama.attention.head_count": [4, 4]}, r"llama.attention.head_count is \[4, 4\]; a number of at least 1"),
        ({"llama.attention.head_count_kv": [2, 2]}, r"llama.attention.head_count_kv is \[2, 2\]; a number of at least"),
        (
            {"llama.attention.head_count_kv": None},
            "llama.attention.head_count_kv is missing; transformers .* Import the safetensors",
        ),
        ({"llama.feed_forward_length": None}, "llama.feed_forward_length is missing"),
        ({"llama.feed_forward_length": [96, 96]}, r"llama.feed_forward_length is \[96, 96\]; a number of at least 1"),
        ({"llama.rope.dimension_count": [16, 16]}, r"llama.rope.dimension_count is \[16, 16\]; a number of at least 1"),
        ({"llama.vocab_size": "261"}, "llama.vocab_size is '261'; a number of at least 1"),
        ({"llama.rope.freq_base": [1e4, 1e4]}, r"llama.rope.freq_base is \[10000.0, 10000.0\]; a number"),
        ({"llama.context_length": 0}, "llama.context_length is 0"),
        ({"general.architecture": "gemma"}, "architecture is 'gemma'; llama, qwen2, qwen3, qwen3moe can be imported"),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, ""),
        ({"llama.rope.freq_base": None, "llama.vocab_size": None}, ""),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, ""),
        ({"llama.rope.dimension_count": 16, "llama.expert_count": 0}, ""),
        ({"llama.attention.causal": True, "llama.logit_scale": 1.0, "llama.attention.sliding_window": 0}, ""),
        ({"llama.tensor_data_layout": "Meta AI original pth", "qwen2.attention.causal": False}, ""),
    ],
)
def test_keys_that_transformers_passes_over_are_refused(tmp_path, keys, words):
    write_tiny(tmp_path / "x.gguf", keys=keys)
    if not words:
        assert check_gguf(tmp_path / "x.gguf") == []
        return
    with pytest.raises(UserError, match=rf"x\.gguf.*{words}"):
        check_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"qwen3moe.expert_weights_norm": True, "qwen3moe.expert_weights_scale": 1.0}, ""),
        ({"qwen3moe.expert_feed_forward_length": 768, "qwen3moe.expert_gating_func": 1}, ""),
        ({"qwen3moe.expert_weights_norm": False}, "expert_weights_norm is False"),
        ({"qwen3moe.expert_weights_scale": 2.5}, "expert_weights_scale is 2.5"),
        ({"qwen3moe.expert_gating_func": 2}, "expert_gating_func is 2"),
        ({"qwen3moe.expert_group_count": 8}, "expert_group_count is 8"),
        ({"qwen3moe.expert_used_count": 0}, "expert_used_count is 0; a number of at least 1"),
    ],
)
def test_keys_that_change_how_experts_are_chosen_are_refused(tmp_path, keys, words):
    write_tiny(tmp_path / "x.gguf", "qwen3moe", keys=keys)
    if not words:
        (notice,) = check_gguf(tmp_path / "x.gguf")
        assert "norm_topk_prob" in notice
        return
    with pytest.raises(UserError, match=rf"x\.gguf: qwen3moe.*{words}"):
        check_gguf(tmp_path / "x.gguf")


def test_a_norm_whose_number_is_not_told_is_not_guessed(tmp_path):
    write_tiny(tmp_path / "x.gguf")
    file = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(file.replace(b"layer_norm_rms_epsilon", b"layer_norm_xyz_epsilon"))
    with pytest.raises(
        UserError, match=r"x\.gguf: llama\.attention\.layer_norm_rms_epsilon is None; a number is wanted"
    ):
        check_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("architecture", "tensors", "words"),
    [
        ("llama", {"rope_freqs.weight": (8,)}, r"rope_freqs\.weight, a stretch of the rotary positions"),
        ("llama", {"blk.0.attn_q.bias": (64,)}, r"blk\.0\.attn_q\.bias is unknown"),
        ("llama", {"blk.0.post_ffw_norm.weight": (64,)}, r"blk\.0\.post_ffw_norm\.weight is unknown"),
        ("llama", {"blk.2.attn_norm.weight": (64,)}, r"blk\.2\.attn_norm\.weight is unknown"),
        ("llama", {"blk.1.ffn_up.weight": None}, r"blk\.1\.ffn_up\.weight is missing"),
        ("qwen3moe", {"blk.1.ffn_up_exps.weight": None}, r"blk\.1\.ffn_up_exps\.weight is missing"),
        ("qwen3moe", {"blk.1.ffn_up_shexp.weight": (64, 64)}, r"blk\.1\.ffn_up_shexp\.weight is unknown"),
    ],
)
def test_tensors_of_which_transformers_makes_nothing_are_refused(tmp_path, architecture, tensors, words):
    write_tiny(tmp_path / "x.gguf", architecture, tensors=tensors)
    with pytest.raises(UserError, match=rf"x\.gguf.*{words}"):
        check_gguf(tmp_path / "x.gguf")


def test_sizes_of_types_are_those_of_gguf_py():
    import gguf

    known = [kind for kind in gguf.GGMLQuantizationType if kind in TYPES]
    assert {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in known} == TYPES


@pytest.mark.parametrize("kind", ["missing_keys", "mismatched_keys", "error_msgs"])
def test_what_transformers_draws_or_drops_is_refused_by_name(kind):
    nothing = {name: [] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
    check_loaded("x.gguf", nothing)
    with pytest.raises(UserError, match=rf"x\.gguf: .*{kind}: .*lm_head"):
        check_loaded("x.gguf", nothing | {kind: {"lm_head"}})


# What the file does not say, or says in its own way


def test_numbers_of_a_gguf_file_are_those_that_were_written_into_it():
    read = {
        "norm": 9.999999747378752e-06,
        "base": 100000.0,
        "nested": [{"std": 0.019999999552965164}],
        "n": 3,
        "b": True,
    }
    assert as_written(read) == {"norm": 1e-05, "base": 100000.0, "nested": [{"std": 0.02}], "n": 3, "b": True}
    assert as_written(0.1) == 0.1  # no float32


def test_qwen3_moe_is_renormalised_whatever_transformers_takes_for_granted():
    assert as_meant({"model_type": "qwen3_moe", "norm_topk_prob": False})["norm_topk_prob"] is True
    assert as_meant({"model_type": "llama", "eps": 9.999999747378752e-06}) == {"model_type": "llama", "eps": 1e-05}


PIECES = {  # of "It's 1234½ HE'LL\n\n  go"
    "gpt-2": ["It", "'s", "Ġ1234½", "ĠHE", "'", "LL", "ĊĊĠ", "Ġgo"],
    "smollm": ["It", "'s", "Ġ", "1", "2", "3", "4", "½", "ĠHE", "'", "LL", "ĊĊĠ", "Ġgo"],
    "llama-bpe": ["It", "'s", "Ġ", "123", "4½", "ĠHE", "'LL", "ĊĊ", "Ġ", "Ġgo"],
    "qwen2": ["It", "'s", "Ġ", "1", "2", "3", "4", "½", "ĠHE", "'LL", "ĊĊ", "Ġ", "Ġgo"],
}


@pytest.mark.parametrize("cut", PIECES)
def test_text_is_cut_as_the_file_says_and_not_as_transformers_takes_for_granted(cut):
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": cut}
    assert why_no_tokenizer(keys) == ""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, []))
    set_cut(tokenizer, keys)
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("It's 1234½ HE'LL\n\n  go")
    assert [piece.replace("Â½", "½") for piece, _ in pieces] == PIECES[cut]
    assert tokenizer.encode("ab").ids == ([2] if cut == "llama-bpe" else [0, 1])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tokenizer.ggml.pre": "default"}, "tokenizer.ggml.pre is 'default', of which no cut of text is known here"),
        ({"tokenizer.ggml.pre": "falcon"}, "tokenizer.ggml.pre is 'falcon'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'; passed on are those of"),
    ],
)
def test_a_tokenizer_whose_cut_is_not_known_is_not_passed_on(tmp_path, keys, words):
    write_tiny(tmp_path / "x.gguf", keys=keys)
    assert words in check_gguf(tmp_path / "x.gguf")[0]
