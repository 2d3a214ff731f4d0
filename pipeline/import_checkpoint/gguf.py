"""Which GGUF files transformers makes the whole model of: their keys and tensors, looked through before it reads them.

It passes over keys and tensors that it doesn't know and draws the weights that it misses.  Names: constants.py of
gguf-py (github.com/ggml-org/llama.cpp).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.gguf_header import INSTEAD, read_gguf_header
from pipeline.import_checkpoint.gguf_keys import WITH_EXPERTS, check_keys
from pipeline.import_checkpoint.gguf_tokenizer import why_no_tokenizer

_ALWAYS = ("token_embd.weight", "output_norm.weight")
_HEAD = "output.weight"
"""Absent where it is the embedding."""
_ROPE_FREQS = "rope_freqs.weight"
_ATTENTION = tuple(f"{part}.weight" for part in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm"))
_QK_NORM = ("attn_q_norm.weight", "attn_k_norm.weight")
_DENSE = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
_EXPERTS = ("ffn_gate_inp.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight")
_LAYERS = {
    "llama": (*_ATTENTION, *_DENSE),
    "qwen2": (*_ATTENTION, *_DENSE, "attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": (*_ATTENTION, *_DENSE, *_QK_NORM),
    WITH_EXPERTS: (*_ATTENTION, *_EXPERTS, *_QK_NORM),
}
"""Tensors of every layer, by architecture."""
_MAX_TOLD = 20


def check_gguf(path: Path) -> list[str]:
    """What there is to tell of a file that is read whole.

    Raises UserError naming the key or tensor that would be passed over or drawn, CorruptionError for a header that is
    cut or damaged.
    """
    header = read_gguf_header(path)
    kind = header.keys.get("general.architecture")
    if not isinstance(kind, str) or kind not in _LAYERS:
        raise UserError(f"{path}: general.architecture is {kind!r}; {', '.join(_LAYERS)} can be imported. {INSTEAD}")
    keys = check_keys(path, kind, header.keys)
    _check_tensors(path, kind, keys, header.tensors)
    notices = [why] if (why := why_no_tokenizer(header.keys)) else []
    if kind == WITH_EXPERTS:
        notices.append("norm_topk_prob is taken as true, as llama.cpp computes every Qwen3-MoE")
    return notices


def gguf_license(path: Path) -> str | None:
    """The licence that the file names, if it names one."""
    license_ = read_gguf_header(path).keys.get("general.license")
    return license_ if isinstance(license_, str) and license_ else None


def _check_tensors(path: Path, kind: str, keys: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """UserError unless the tensors are just those of a model of that architecture."""
    if _ROPE_FREQS in found:
        raise UserError(
            f"{path} has {_ROPE_FREQS}, a stretch of the rotary positions (llama3) that transformers does not read "
            f"from a GGUF file: other positions would be computed. {INSTEAD}, whose config.json tells the stretch"
        )
    num_layers = keys["block_count"]
    if num_layers > len(found):
        raise UserError(f"{path}: {kind}.block_count is {num_layers}, but the file has {len(found)} tensors in all")
    wanted = {*_ALWAYS, *(f"blk.{layer}.{name}" for layer in range(num_layers) for name in _LAYERS[kind])}
    problems = [
        *(f"{name} is missing" for name in sorted(wanted - found.keys())),
        *(f"{name} is unknown" for name in sorted(found.keys() - wanted - {_HEAD})),
    ]
    if problems:
        more = f"; and {len(problems) - _MAX_TOLD} more" if len(problems) > _MAX_TOLD else ""
        raise UserError(
            f"{path} does not hold just the tensors of {kind}: {'; '.join(problems[:_MAX_TOLD])}{more}. transformers "
            f"would draw those that are missing and pass over the others. {INSTEAD}"
        )
