"""A .gguf file as float32 safetensors, in a process of its own that may take the memory of the whole model."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError


def dequantise(file: str, target: str) -> str:
    """Write config.json, weights and tokenizer; the version of transformers, whose arithmetic it is."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    place = {"pretrained_model_name_or_path": str(Path(file).parent), "gguf_file": Path(file).name}
    settings: dict[str, Any] = {"dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep the blocks where they have kernels for them
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**place, **settings, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise UserError(f"transformers cannot read {file}: {error}") from None
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)  # of a model that isn't quantised any more, and may be saved
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    config = Path(target, "config.json")
    config.write_text(json.dumps(as_written(json.loads(config.read_text())), indent=1) + "\n")
    return transformers.__version__


def as_written(value: Any) -> Any:
    """JSON in which a number that is a float32, as all in a GGUF file are, is the shortest one of that float32.

    So 9.999999747378752e-06 is 1e-05 again, as it was before it was written to the file.
    """
    if isinstance(value, dict):
        return {key: as_written(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_written(item) for item in value]
    return float(str(np.float32(value))) if isinstance(value, float) and float(np.float32(value)) == value else value
