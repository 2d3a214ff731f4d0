"""The weights that a training begins with: drawn from a seed, or taken from the input ``init``."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import checked
from pipeline.data.special_tokens import SpecialTokens
from pipeline.errors import UserError
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.given import check_same_architecture
from pipeline.tensor_files import TensorFiles
from pipeline.weights import WEIGHTS_FILE, ModelRecord, check_same_vocabulary, load_record, read_denoiser

if TYPE_CHECKING:
    from dlm_core.models.config import ModelConfig
    from dlm_core.models.transformer import Denoiser


def initial_record(config: PretrainConfig, inputs: Mapping[str, Path], special: SpecialTokens) -> ModelRecord | None:
    """What is known of the weights in the input ``init``; None for a training from scratch.

    Raises UserError if they are of another architecture, vocabulary or tokenizer than what is to be trained.
    """
    if "init" not in inputs:
        return None
    record = load_record(inputs["init"])
    check_same_architecture(config.architecture, record.model.architecture, f"in {inputs['init']}")
    check_same_vocabulary(record, inputs["init"], inputs["tokenizer"])
    for name in ("vocab_size", "mask_token_id"):
        found, wanted = getattr(record.model, name), getattr(special, name)
        if found != wanted:
            raise UserError(
                f"{name} of the weights in {inputs['init']} is {found}, that of the tokenizer {inputs['tokenizer']} is "
                f"{wanted}; fit the weights to this tokenizer first (pipeline.ar_init)"
            )
    return record


def first_weights(inputs: Mapping[str, Path]) -> TensorFiles | None:
    """The file of given weights, verified; None where they are to be drawn."""
    return TensorFiles([checked(inputs["init"], WEIGHTS_FILE)]) if "init" in inputs else None


def first_model(model_config: "ModelConfig", inputs: Mapping[str, Path], config: PretrainConfig) -> "Denoiser":
    """A denoiser with its first weights.  Raises CorruptionError for given ones that do not fit."""
    from dlm_core.models.transformer import Denoiser

    if "init" in inputs:
        return read_denoiser(model_config, checked(inputs["init"], WEIGHTS_FILE), str(inputs["init"])).train()
    model = Denoiser(model_config)
    model.init_weights(config.init_seed)
    return model


def first_loss_warning(model: "ModelConfig", sums: Any) -> str:
    """Words about a first loss of given weights that is worse than that of knowing nothing; empty where it is not."""
    loss, num_masked = (float(part.sum()) for part in sums.chunk(2))
    nothing = math.log(model.vocab_size)
    if not num_masked or loss / num_masked <= nothing:
        return ""
    return (
        f"the first loss is {loss / num_masked:.2f} nats a masked token; a model that knows nothing has "
        f"log(vocab_size) = {nothing:.2f}. If it does not fall within some hundred steps, look whether "
        "objective.target_offset, the tokenizer and the mask's row of the embedding are those that the weights need"
    )
