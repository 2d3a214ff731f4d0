"""The model card of an export: what the model is, how it is loaded, where its weights come from, what was proved."""

import json
import math
from collections.abc import Mapping
from typing import Any

from dlm_core.models.tensor_shapes import tensor_shapes
from pipeline.export.config import ExportConfig
from pipeline.export.fit import DIFFUSION
from pipeline.export.prove import LOGITS_RTOL, auto_class
from pipeline.export.tokenizer_files import TokenizerSource
from pipeline.hf_keys import IN_BLOCKS, SHIFTED
from pipeline.lineage import told
from pipeline.tensor_files import TensorFiles
from pipeline.weights import ModelRecord, Origin

_TITLES = {
    "llada": "LLaDA", "dream": "Dream", "llada_moe": "LLaDA-MoE", "llada2": "LLaDA2", "llama": "Llama",
    "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3-MoE",
}  # fmt: skip
_OBJECTIVES = {
    "masked_nelbo": "masked diffusion of whole rows: every position sees all others",
    "block_nelbo": "block diffusion: a block of {} tokens sees itself and the blocks before it",
    "autoregressive_nll": "next tokens: every position sees itself and those before it",
}
_CALLS_MODEL_DIFFUSION = (
    "`generate` is causal and meaningless for this model. It is a diffusion model; this directory holds its tensors "
    "under the names of {}, for tools that switch the attention to both directions themselves{}. The mask token is "
    "{}."
)
_OTHER_TOKENIZER = (
    "**Not AutoTokenizer**: that of transformers {} takes {} for this model_type, whatever the files say, which gives "
    "other ids than tokenizer.json."
)
_NO_AUTO_TOKENIZER = "**Not AutoTokenizer**: that of transformers {} does not load what tokenizer_config.json names."


def model_card(
    config: ExportConfig,
    record: ModelRecord,
    tokenizer: TokenizerSource,
    theirs: TensorFiles,
    proof: Mapping[str, Any],
) -> str:
    """README.md with the head that model hubs read."""
    title = config.name or f"{_TITLES[config.family]} of {_count(num_held(theirs))} parameters"
    parts = [
        _head(config, record),
        f"# {title}",
        _what_it_is(config, record),
        _sizes(config, record, theirs),
        "## How to use it",
        _usage(config, record, proof, has_tokenizer=tokenizer.directory is not None),
        "## Where the weights come from",
        *(_origin(number, origin) for number, origin in enumerate(record.lineage, 1)),
        *([] if record.lineage else ["Nothing is known of it."]),
        "## Evaluation",
        "No numbers were measured for this card.",
        "## What was checked",
        _proof(config, theirs, proof),
    ]
    return "\n\n".join(parts) + "\n"


def num_held(theirs: TensorFiles) -> int:
    """Numbers that a directory holds: also zeros where ours has no bias, and the embedding once more as the head."""
    return sum(theirs.info(name).numel for name in theirs.names)


def _count(number: int) -> str:
    """About how many, as models are called."""
    scaled = next(((number / size, unit) for size, unit in ((1e9, "B"), (1e6, "M")) if number >= size), None)
    return f"{scaled[0]:.3g}{scaled[1]}" if scaled else f"{number:,}"


def _head(config: ExportConfig, record: ModelRecord) -> str:
    licenses = [origin.details["license"] for origin in record.lineage if origin.details.get("license")]
    license_ = config.license or next(iter(licenses), "")
    lines = [f"license: {json.dumps(license_)}"] if license_ else []
    tags = ["diffusion"] if record.objective != "autoregressive_nll" else []
    lines += ["library_name: transformers", "pipeline_tag: text-generation", *(f"tags: [{tag}]" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _what_it_is(config: ExportConfig, record: ModelRecord) -> str:
    objective = _OBJECTIVES[record.objective].format(record.block_size)
    objective += ", within its document" if record.within_documents else ""
    said = f"Trained on {objective}. Rows had {record.seq_len} tokens."
    if record.target_offset:
        said += " It is shifted: the output at a position says the next position's token."
    if config.family in DIFFUSION or record.objective == "autoregressive_nll":
        return said
    shift = ", and shift its outputs by one position" if record.target_offset else ""
    name, mask = _TITLES[config.family], record.model.mask_token_id
    return f"{said}\n\n**{_CALLS_MODEL_DIFFUSION.format(name, shift, mask)}**"


def _sizes(config: ExportConfig, record: ModelRecord, theirs: TensorFiles) -> str:
    model, a = record.model, record.model.architecture
    held = num_held(theirs)
    added = held - sum(map(math.prod, tensor_shapes(model).values()))
    rows: dict[str, Any] = {
        "family": f"{_TITLES[config.family]} (`{config.family}`)",
        "parameters": f"{held:,}",
        "of them zeros, or the embedding once more": f"{added:,}" if added else "",
        "of them active for a token": f"{model.num_active_params() + added:,}" if a.moe else "",
        "layers, width": f"{a.num_layers}, {a.d_model}",
        "heads (of keys and values)": f"{a.num_heads} ({a.kv_heads}), {a.head_size} wide",
        "experts (a token)": f"{a.moe.num_experts} ({a.moe.top_k})" if a.moe else "",
        "rows of the embedding": f"{model.vocab_size:,}",
        "seq_len": record.seq_len,
        "objective": record.objective,
        "block_size": record.block_size or "",
        "target_offset": record.target_offset,
        "mask_token_id": model.mask_token_id,
        "dtype": config.dtype,
        "tensors": len(theirs.names),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value not in ("", None)]
    return "\n".join(["| | |", "|---|---|", *lines])


def _usage(config: ExportConfig, record: ModelRecord, proof: Mapping[str, Any], *, has_tokenizer: bool) -> str:
    is_diffusion = config.family in DIFFUSION
    kind, trust = auto_class(config.family), ", trust_remote_code=True" if is_diffusion else ""
    classes = f"{kind}, PreTrainedTokenizerFast" if has_tokenizer else kind
    code = [
        *(["import torch"] if not has_tokenizer else []),
        f"from transformers import {classes}",
        "",
        'folder = "."  # where this file lies',
        f'model = {kind}.from_pretrained(folder, dtype="auto"{trust}).eval()',
    ]
    if has_tokenizer:
        code += [
            "tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)",
            'prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids',
        ]
    else:
        code += ["prompt = torch.tensor([[0, 1, 2]])  # token ids: there is no tokenizer here"]
    if is_diffusion:
        code += ["out = model.generate(prompt, max_new_tokens=32, steps=32)"]
    elif record.objective == "autoregressive_nll":
        code += ["out = model.generate(prompt, max_new_tokens=32, do_sample=False)"]
    else:
        code += ["out = model(prompt).logits  # with the causal attention of the class: see above"]
    if has_tokenizer and (is_diffusion or record.objective == "autoregressive_nll"):
        code += ["print(tokenizer.decode(out[0]))"]
    else:
        code += ["print(out)"]
    text = ["```python", *code, "```"]
    if proof.get("auto_tokenizer_is_same") is False:
        said = _OTHER_TOKENIZER if proof["auto_tokenizer"] else _NO_AUTO_TOKENIZER
        text += ["", said.format(proof["versions"]["transformers"], proof["auto_tokenizer"])]
    if is_diffusion:
        text += ["", _generation(config)]
    return "\n".join(text)


def _generation(config: ExportConfig) -> str:
    said = (
        "`generate` begins with masks and replaces those that the model is surest of, `steps` times at most; "
        "`temperature`, `top_p`, `threshold`, `block_length` and `seed` are its settings. The code that is loaded is "
        "the `*.py` beside this file. It works with transformers 4.57 and 5. Prompts of several lengths are padded on "
        "the left and come with their `attention_mask`."
    )
    if config.family in SHIFTED:
        said += " The prompt must have a token: the output of a position says the next one."
    if config.family in IN_BLOCKS:
        said += " Blocks have the length `block_size` of config.json, counted from the first token of a row."
    return said


def _origin(number: int, origin: Origin) -> str:
    lines = [f"{number}. {origin.kind}"]
    lines += [f"   - {name}: {_as_code(words)}" for name, words in told(origin)]
    return "\n".join(lines)


def _as_code(words: str) -> str:
    """Marked as code, where nothing is markup, unless it is a number."""
    return words if words.replace(",", "").isdigit() else f"`{words.replace('`', chr(39))}`"


def _proof(config: ExportConfig, theirs: TensorFiles, proof: Mapping[str, Any]) -> str:
    exact = sorted({name.rpartition(".")[2] for name in theirs.names if theirs.info(name).dtype == "F32"})
    but = f" (all but {', '.join(f'`{name}`' for name in exact)})" if exact else ""
    rounded = "" if config.dtype == "float32" else f" rounded to {config.dtype}{but}"
    tensors = (
        f"Every tensor was read back and is, bit for bit, that of the float32 weights{rounded}; config.json, read "
        "again, says the same model."
    )
    if proof["proof"] == "tensors":
        return f"{tensors} Logits were not compared."
    attention = "attention in both directions" if config.family in DIFFUSION else "causal attention"
    versions = ", ".join(f"{name} {version}" for name, version in proof["versions"].items())
    return (
        f"{tensors} A fresh process loaded this directory ({versions}) and computed float32 logits with {attention}: "
        f"they differ from those of dlm's own model by {proof['logits_difference']:.2g} of the "
        f"largest (allowed: {LOGITS_RTOL:g})."
    )
