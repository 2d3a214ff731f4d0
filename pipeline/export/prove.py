"""What transformers makes of an exported directory, beside what our own model computes; in a process of its own."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.errors import CorruptionError
from pipeline.export.fit import DIFFUSION
from pipeline.export.prove_tokenizer import check_tokenizer
from pipeline.hf_names import Family, packed_tensors
from pipeline.logits_proof import logits_of, pseudo_tokens
from pipeline.weights import MODEL_FILE, WEIGHTS_FILE, ModelRecord, read_denoiser, read_record

if TYPE_CHECKING:
    from torch import Tensor

LOGITS_RTOL = 1e-4
"""Of float32 logits through two orders of summation, over the largest of them."""
_KINDS_OF_PROBLEM = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def prove_logits(folder: str, weights: str, family: str, dtype: str, scratch: str, carried: str = "") -> dict[str, Any]:
    """The relative difference of the logits, and versions; CorruptionError if the directory is not the same function.

    ``weights`` has the interchange files that ``folder`` was made of; their numbers are rounded to ``dtype`` first.
    ``carried`` names the files of a checkpoint's own tokenizer; without, it must put nothing around a text.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules", "TOKENIZERS_PARALLELISM": "false"}
    record, made_of = read_record(Path(weights) / MODEL_FILE), cast("Family", family)
    tokens = pseudo_tokens(record.model.vocab_size)
    theirs = _their_logits(Path(folder), made_of, tokens)
    ours = _our_logits(record, Path(weights), made_of, dtype, tokens)
    if ours.shape != theirs.shape:
        raise CorruptionError(f"logits have the shape {list(theirs.shape)} in {folder}, {list(ours.shape)} in ours")
    keep = [token for token in range(record.model.vocab_size) if token != record.model.mask_token_id]
    ours, theirs = ours[..., keep], theirs[..., keep]  # the mask's is -inf in ours
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30))
    if not difference <= LOGITS_RTOL:  # nan is no small difference
        raise CorruptionError(
            f"{folder} is not the same function: the logits that transformers {_versions()['transformers']} computes "
            f"differ by {difference:.2g} of the largest, above {LOGITS_RTOL:g}. This is a defect of the conversion, or "
            "of that version; report it with config.json"
        )
    found = check_tokenizer(Path(folder), Path(weights), made_of, carried, Path(scratch))
    return {"difference": difference, "versions": _versions(), **found}


def _versions() -> dict[str, str]:
    import tokenizers
    import torch
    import transformers

    return {library.__name__: library.__version__ for library in (transformers, tokenizers, torch)}


def auto_class(family: Family) -> str:
    """The class of transformers that loads a family with its head."""
    return "AutoModel" if family == "dream" else "AutoModelForCausalLM"


def _their_logits(folder: Path, family: Family, tokens: "Tensor") -> "Tensor":
    import torch
    import transformers

    model, info = getattr(transformers, auto_class(family)).from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=family in DIFFUSION,
        local_files_only=True,
        output_loading_info=True,
    )
    if problems := [f"{kind}: {sorted(map(str, info[kind]))[:5]}" for kind in _KINDS_OF_PROBLEM if info.get(kind)]:
        raise CorruptionError(f"transformers does not find in {folder} what it looks for: {'; '.join(problems)}")
    with torch.inference_mode():
        return model.eval()(input_ids=tokens).logits.float()


def _our_logits(record: ModelRecord, weights: Path, family: Family, dtype: str, tokens: "Tensor") -> "Tensor":
    """Of a model whose weights are rounded as those of the files are: full attention, or causal where theirs is."""
    import torch

    model = read_denoiser(record.model, weights / WEIGHTS_FILE, str(weights))
    exact = {packed.ours for packed in packed_tensors(family, record.model.architecture) if packed.stays_float32}
    for name, tensor in model.state_dict().items():
        if name not in exact:
            tensor.copy_(tensor.to(getattr(torch, dtype)))
    return logits_of(model, tokens, "full" if family in DIFFUSION else "causal")
