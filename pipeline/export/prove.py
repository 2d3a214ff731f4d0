"""What transformers makes of an exported directory, beside what our own model computes; in a process of its own."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.data.vocabulary import TOKENIZER_FILE
from pipeline.errors import CorruptionError, UserError
from pipeline.export.fit import DIFFUSION
from pipeline.hf_names import Family, packed_tensors
from pipeline.logits_proof import logits_of, pseudo_tokens
from pipeline.weights import MODEL_FILE, WEIGHTS_FILE, ModelRecord, read_denoiser, read_record

if TYPE_CHECKING:
    from torch import Tensor

LOGITS_RTOL = 1e-4
"""Of float32 logits through two orders of summation, over the largest of them."""
PROBE = "The quick brown fox: naïve cafe\u0301, 3.14 + 日本語\n\tand\r\n  two  spaces 🙂"
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
    return {"difference": difference, "versions": _versions(), **_check_tokenizer(Path(folder), made_of, carried)}


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


def _check_tokenizer(folder: Path, family: Family, carried: str) -> dict[str, Any]:
    """Classes that load the tokenizer; an error unless PreTrainedTokenizerFast gives the ids of tokenizer.json.

    It is a UserError where the files are those of the checkpoint, as they came: they disagree.  AutoTokenizer goes by
    the model_type, and for some takes a class with rules of its own, whatever the files say: whether it gives the same
    ids is told.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (folder / TOKENIZER_FILE).is_file():
        return {}
    plain = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    plain.no_truncation()
    plain.no_padding()
    ids = plain.encode(PROBE, add_special_tokens=False).ids
    loaded = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    around: dict[str, Any] = {"add_special_tokens": False} if carried else {}
    if loaded(PROBE, **around)["input_ids"] != ids and carried:
        added = sorted(set(loaded.get_vocab()) - set(plain.get_vocab()))
        what = f", which adds {', '.join(map(repr, added[:5]))}," if added else ""
        raise UserError(
            f"the files of the checkpoint's tokenizer ({carried}) disagree: with the settings beside it{what} "
            f"{TOKENIZER_FILE} gives other ids than alone. In a copy of the checkpoint take out of the settings what "
            "changes them, import that, or give a tokenizer artifact (input tokenizer)"
        )
    if loaded(PROBE, **around)["input_ids"] != ids:
        raise CorruptionError(f"the tokenizer in {folder}, loaded as PreTrainedTokenizerFast, gives other ids")
    if loaded.decode(ids) != plain.decode(ids, skip_special_tokens=False):
        raise CorruptionError(f"the tokenizer in {folder}, loaded as PreTrainedTokenizerFast, decodes otherwise")
    trust = family in DIFFUSION  # it looks for a class of the tokenizer in config.json, whose own class is code
    auto = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    is_same = auto(PROBE, add_special_tokens=False)["input_ids"] == ids
    return {"auto_tokenizer": type(auto).__name__, "auto_tokenizer_is_same": is_same}
