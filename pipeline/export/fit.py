"""Which model may be written as which family: a pair that is not the same function is refused, with what would do."""

from collections.abc import Iterator
from dataclasses import dataclass

from dlm_core.models.config import Architecture
from pipeline.errors import UserError
from pipeline.hf_keys import IN_BLOCKS, SHIFTED
from pipeline.hf_names import DITS, FAMILIES, Family, check_family

DIFFUSION: tuple[Family, ...] = ("llada", "dream", "llada_moe", "llada2")
"""Families whose code predicts masks with attention in both directions; the others predict next tokens."""


@dataclass(frozen=True)
class Exported:
    """What of a model decides whether a family can say it."""

    architecture: Architecture
    is_causal: bool
    """Whether it was trained on next tokens."""
    block_size: int
    """Of the blocks that it denoises; 0: whole rows."""
    target_offset: int


def check_fit(family: Family, model: Exported, where: str) -> None:
    """UserError, which calls the setting ``where``, unless the family's code computes what the model was trained to.

    A family of next-token models takes the tensors of a diffusion model too: its README says what they are.
    """
    reason = next(_reasons(family, model), "")
    if not reason:
        return
    fitting = [name for name in FAMILIES if name not in DITS and not any(_reasons(name, model))]
    whole = [name for name in fitting if model.is_causal or name in DIFFUSION]
    change = f"Give {where}" if where.startswith("--") else f"Set {where} to"
    kind = "family" if model.is_causal else "diffusion family"
    remedy = f"{change} {' or '.join(whole)}" if whole else f"No {kind} here is the same function"
    if tensors := [name for name in fitting if name not in whole]:
        remedy += f"; {' and '.join(tensors)} would hold its tensors, for tools that switch the attention themselves"
    raise UserError(f'{where} is "{family}", but {reason}. {remedy}')


def _reasons(family: Family, model: Exported) -> Iterator[str]:
    """What keeps the family from being the model's, in words that go on a sentence."""
    try:
        check_family(family, model.architecture)
    except UserError as error:  # first: what training cannot change
        yield str(error)
    if family in DIFFUSION and model.is_causal:
        yield (
            f'the model was trained on next tokens (autoregressive_nll), and "{family}" predicts masks: train it '
            "on as one first, by a workflow with ar_init and pretrain such as the recipe smollm2_to_diffusion"
        )
    if family not in DIFFUSION:
        return
    wanted = int(family in SHIFTED)
    if model.target_offset != wanted:
        yield (
            f'target_offset is {model.target_offset}, and "{family}" reads its predictions at offset {wanted}: every '
            "token would be that of the position beside it"
        )
    if model.block_size and family not in IN_BLOCKS:
        yield (
            f"block_size is {model.block_size}: the model was trained with blocks that do not see the text after them, "
            f'and "{family}" shows every position the whole text'
        )
