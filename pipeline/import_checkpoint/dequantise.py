"""A .gguf file as float32 safetensors, in a process of its own that may take the memory of the whole model."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.gguf_header import read_gguf_header
from pipeline.import_checkpoint.gguf_tokenizer import set_cut, why_no_tokenizer

_SPECIAL_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
_MAX_TOLD = 20


def dequantise(file: str, target: str) -> str:
    """Write config.json and weights, with the version of transformers, whose arithmetic it is, as the result.

    The tokenizer is written too where it is known how the file cuts text.

    Raises UserError if transformers cannot read the file, or cannot fill the whole model from it.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    settings: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep the blocks where they have kernels for them
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as alone:  # files beside it would be read too
        Path(alone, Path(file).name).symlink_to(Path(file).resolve())
        place = {"pretrained_model_name_or_path": alone, "gguf_file": Path(file).name}
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                **place, **settings, trust_remote_code=False
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
        except (ValueError, NotImplementedError, KeyError) as error:
            raise UserError(f"transformers cannot read {file}: {error}") from None
    model, told = loaded
    check_loaded(file, told)
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)  # of a model that isn't quantised any more, and may be saved
    keys = read_gguf_header(Path(file)).keys
    set_special_ids((model.config, model.generation_config), keys)
    model._weight_conversions = None  # none, as of a GGUF file, would keep version 5 from splitting stacked experts
    model.save_pretrained(target)
    if not why_no_tokenizer(keys):
        set_cut(tokenizer.backend_tokenizer, keys)
        tokenizer.save_pretrained(target)
    config = Path(target, "config.json")
    config.write_text(json.dumps(as_meant(json.loads(config.read_text())), indent=1) + "\n")
    return transformers.__version__


def set_special_ids(configs: Iterable[Any], keys: Mapping[str, Any]) -> None:
    """Special token ids of the file alone: where it names none, transformers takes those of the first Llama."""
    for config in configs:
        for name, theirs in _SPECIAL_IDS.items():
            setattr(config, name, keys.get(f"tokenizer.ggml.{theirs}"))


def check_loaded(file: str, told: Mapping[str, Iterable[Any]]) -> None:
    """UserError if the loading info of transformers names weights that it did not take from the file."""
    problems = {name: sorted(map(str, values)) for name, values in told.items() if values}
    if problems:
        details = "; ".join(f"{name}: {', '.join(values[:_MAX_TOLD])}" for name, values in problems.items())
        raise UserError(
            f"{file}: transformers does not fill its model with this file, and would draw what it lacks: {details}. "
            "Import the safetensors that it was made from"
        )


def as_meant(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers wrote, with the numbers of the file, and with what the file has no key for.

    A Qwen3-MoE weights its chosen experts to a sum of 1, which versions below 5 don't take for granted.
    """
    missing = {"norm_topk_prob": True} if config.get("model_type") == "qwen3_moe" else {}
    return as_written(dict(config)) | missing


def as_written(value: Any) -> Any:
    """JSON in which a number that is a float32, as all in a GGUF file are, is the shortest one of that float32.

    So 9.999999747378752e-06 is 1e-05 again, as it was before it was written to the file.
    """
    if isinstance(value, dict):
        return {key: as_written(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_written(item) for item in value]
    return float(str(np.float32(value))) if isinstance(value, float) and float(np.float32(value)) == value else value
