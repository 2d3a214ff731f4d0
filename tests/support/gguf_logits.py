"""A tiny .gguf file; logits of transformers on one, for processes of their own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import pre_tokenizers


def save_logits(file: str, tokens: str, answer: str) -> None:
    """Write float32 logits [1, L, V] of token ids [1, L], both as .npy files."""
    import numpy as np
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(Path(file).parent), gguf_file=Path(file).name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        np.save(answer, model(input_ids=torch.from_numpy(np.load(tokens))).logits.numpy())


def write_tiny(
    path: Path,
    architecture: Literal["llama", "qwen3moe"] = "llama",
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Sequence[int] | None] | None = None,
) -> dict[str, Any]:
    """A model of 2 layers with a tied head and a byte-level tokenizer; what its tensors stand for, by their names.

    Matrices of a Llama are Q8_0, everything else is F32: names and sizes as in llama.cpp's gguf-py, as is the order in
    which a Llama's rows of queries and keys lie there.  ``keys`` are set besides, or left out where they are None;
    ``tensors`` are given other shapes, or left out where they have none.
    """
    import gguf
    import numpy as np
    from gguf.quants import dequantize, quantize

    d_model, d_ff, num_layers, heads, kv_heads = 64, 96, 2, 4, 2
    words = ["<unk>", "<s>", "<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "th"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_license("mit")
    writer.add_context_length(64)
    writer.add_embedding_length(d_model)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(d_ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_vocab_size(len(words))
    if "tokenizer.ggml.model" not in (keys or {}):
        writer.add_tokenizer_model("gpt2")
    if "tokenizer.ggml.pre" not in (keys or {}):
        writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([2, 3, 3, *[1] * (len(words) - 3)])
    writer.add_token_merges(["h e", "t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    head_dim = d_model // heads
    kv = head_dim * kv_heads
    layer = {"attn_q": (d_model, d_model), "attn_k": (kv, d_model), "attn_v": (kv, d_model)}
    layer |= {"attn_output": (d_model, d_model), "attn_norm": (d_model,), "ffn_norm": (d_model,)}
    if architecture == "llama":
        layer |= {"ffn_gate": (d_ff, d_model), "ffn_up": (d_ff, d_model), "ffn_down": (d_model, d_ff)}
    else:
        num_experts, d_expert = 4, 768  # the width that transformers takes for granted
        writer.add_key_length(head_dim)
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(2)
        layer |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,), "ffn_gate_inp": (num_experts, d_model)}
        layer |= {f"ffn_{name}_exps": (num_experts, d_expert, d_model) for name in ("gate", "up")}
        layer |= {"ffn_down_exps": (num_experts, d_model, d_expert)}
    for name, value in (keys or {}).items():
        if value is None:
            del writer.kv_data[0][name]
            continue
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
        add[list] = writer.add_array
        add[type(value)](name, value)
    shapes: dict[str, Sequence[int] | None]
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(num_layers) for name, shape in layer.items()}
    shapes |= {"token_embd.weight": (len(words), d_model), "output_norm.weight": (d_model,), **(tensors or {})}
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for name, shape in shapes.items():
        if shape is None:
            continue
        values = ((len(shape) == 1) + 0.2 * rng.standard_normal(shape)).astype(np.float32)
        if len(shape) == 1 or name == "token_embd.weight" or architecture != "llama":
            writer.add_tensor(name, values)
            found[name.removesuffix(".weight")] = values
        else:
            packed = quantize(values, gguf.GGMLQuantizationType.Q8_0)
            found[name.removesuffix(".weight")] = dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            if ".attn_q." in name or ".attn_k." in name:  # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
                halves = packed.reshape(-1, 2, head_dim // 2, packed.shape[1])
                packed = halves.swapaxes(1, 2).reshape(packed.shape)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found
