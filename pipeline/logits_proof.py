"""Logits in a fresh process: the proof that converted weights, as they lie on the disk, are the same function.

A comparison of names and tensors does not see a buffer that a library left uninitialised, nor a file that only this
process can read.  Memory that a proof needs is that of its own process.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import CorruptionError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dlm_core.models.config import MaskFamily
    from dlm_core.models.transformer import Denoiser

_LESS_MEMORY = "the proof by logits holds a model. Give it more, or set proof=tensors"
_LOG_CHARS = 2000
_ERRORS = {"UserError": UserError, "CorruptionError": CorruptionError}
ROWS, LENGTH, NOISE_LEVEL = 2, 48, 0.7


def in_fresh_process(function: str, *arguments: str | Path, less_memory: str = _LESS_MEMORY) -> Any:
    """What ``module:function`` of texts returns, a JSON value, when an interpreter of its own calls it.

    Its UserError and CorruptionError are raised here; MemoryError if it was killed, with ``less_memory``, what it held
    and what to do; RuntimeError for another failure.
    """
    done = _call([function, *map(str, arguments)])
    if done.returncode == -signal.SIGKILL:
        raise MemoryError(
            f"{function} was killed in a process of its own, as happens where memory is short: {less_memory}"
        )
    if done.returncode:
        raise RuntimeError(f"{function} failed in a process of its own:\n{done.stderr[-_LOG_CHARS:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["error"]:
        raise _ERRORS[answer["error"]](answer["value"])
    return answer["value"]


def _call(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.logits_proof", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def _main(function: str, *arguments: str) -> None:
    module, name = function.split(":")
    error = ""
    try:
        value = getattr(importlib.import_module(module), name)(*arguments)
    except (UserError, CorruptionError) as caught:
        error, value = type(caught).__name__, str(caught)
    print("\n" + json.dumps({"error": error, "value": value}))  # noqa: T201


def pseudo_tokens(vocab_size: int, rows: int = ROWS, length: int = LENGTH) -> "Tensor":
    """Token ids [rows, length] that spread over the whole vocabulary, the same at every call."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (rows, length), generator=generator)


def logits_of(model: "Denoiser", tokens: "Tensor", family: "MaskFamily" = "full") -> "Tensor":
    """Logits [rows, length, vocab_size] of a model in evaluation mode, with that mask family."""
    import torch

    from dlm_core.models.attention import AttentionMask

    level = torch.full((len(tokens), 1), NOISE_LEVEL) if model.config.architecture.time_conditioning else None
    with torch.inference_mode():
        logits = model(tokens, mask=AttentionMask(family), noise_level=level)
    return logits.view(*tokens.shape, -1)


def check_equal(found: "Tensor", wanted: "Tensor", name: str) -> None:
    """CorruptionError unless logits are the same numbers."""
    import torch

    if not torch.equal(found, wanted):
        both = found.isfinite() & wanted.isfinite()
        difference = (found - wanted)[both].abs().max().item() if both.any() else float("nan")
        raise CorruptionError(
            f"{name} do not give the logits of what they were made from: {int((found != wanted).sum())} of "
            f"{found.numel()} differ, by up to {difference:g}"
        )


if __name__ == "__main__":
    _main(*sys.argv[1:])
