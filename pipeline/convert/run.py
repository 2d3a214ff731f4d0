"""Gather the float32 master weights from the ranks' ZeRO shards into one safetensors file."""

import os
from collections.abc import Mapping
from pathlib import Path

from dlm_core.models.config import ModelConfig
from pipeline.artifact import checked, checked_files, load_manifest, read_json
from pipeline.config import from_json
from pipeline.convert.config import ConvertConfig
from pipeline.errors import CorruptionError
from pipeline.stage import StageContext, Stats
from pipeline.weights import WEIGHTS_FILE, ModelRecord, check_tensors, save_weights


def run(config: ConvertConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats:
    """Write model.safetensors and model.json, and read them back before the artifact is committed."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    source = inputs["pretrain"]
    trained = load_manifest(source)
    model_config = from_json(ModelConfig, read_json(checked(source, "model_config.json")))
    checked_files(source, "checkpoint/**/*")
    context.progress(0, 1)
    tensors = _master_weights(source / "checkpoint")
    from dlm_core.models.transformer import Denoiser

    check_tensors(Denoiser(model_config), tensors, str(source))
    record = ModelRecord(
        model_config,
        seq_len=trained.stats["seq_len"],
        objective="masked_nelbo",
        tokenizer=trained.inputs["tokenizer"],
    )
    save_weights(context.out, tensors, record)
    _prove(context.out, tensors)
    return {"num_params": model_config.num_params(), "tensors": len(tensors)}


def _master_weights(checkpoint: Path) -> dict[str, object]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from torch.serialization import add_safe_globals

    add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
    state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="ds")
    assert state is not None
    return {name: tensor.contiguous().clone() for name, tensor in sorted(state.items())}


def _prove(out: Path, tensors: dict[str, object]) -> None:
    """The written file holds exactly the tensors that were gathered, and a model takes them."""
    import torch
    from safetensors.torch import load_file

    for name, tensor in load_file(str(out / WEIGHTS_FILE)).items():
        if not torch.equal(tensor, tensors[name]):  # pyright: ignore[reportArgumentType]
            raise CorruptionError(f"{name} changed on the way to {WEIGHTS_FILE}")
