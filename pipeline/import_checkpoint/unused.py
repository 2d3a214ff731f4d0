"""Tensors of a checkpoint that no weight of ours is made of: told by their names, so that headers are enough."""

from collections.abc import Collection
from dataclasses import replace

from dlm_core.models.config import Architecture
from pipeline.errors import UserError
from pipeline.hf_names import Family, packed_tensors
from pipeline.repack import are_equal
from pipeline.tensor_files import TensorFiles

_WITHOUT_FUNCTION = {
    ".rotary_emb.inv_freq": "frequencies that config.json tells",
    ".rotary_emb.cos_cached": "angles that config.json tells",
    ".rotary_emb.sin_cached": "angles that config.json tells",
    ".attention.masked_bias": "a constant of masked attention",
    ".attention.bias": "a constant mask",
    ".position_ids": "the numbers from 0 on",
    "sampling_eps_min": "a setting of its training",
    "sampling_eps_max": "a setting of its training",
}
"""Ends of names of buffers that some versions keep beside the weights, and what they are."""


def unused(family: Family, a: Architecture, names: Collection[str]) -> dict[str, str]:
    """Those of the tensors of a checkpoint that are left out, and why."""
    wanted = {name for packed in packed_tensors(family, a) for name in packed.theirs}
    left_out = {
        name: why
        for name in names
        for end, why in _WITHOUT_FUNCTION.items()
        if name.endswith(end) and name not in wanted
    }
    return left_out | {head: "the embedding once more" for head, _ in _tied(family, a, names)}


def check_tied(family: Family, a: Architecture, theirs: TensorFiles) -> None:
    """UserError unless a head that is left out is the embedding."""
    for head, embedding in _tied(family, a, theirs.names):
        if not are_equal(theirs, head, embedding):
            raise UserError(
                f"config.json ties the head to the embedding, but {head} is not {embedding} once more: versions of "
                "transformers disagree about which is meant. In a copy of config.json untie them to keep both, or take "
                f"{head} out of the files"
            )


def _tied(family: Family, a: Architecture, names: Collection[str]) -> list[tuple[str, str]]:
    """Head and embedding, where there is a head that a tied one leaves without a place."""
    if not a.tied_head:
        return []
    wanted = {name for packed in packed_tensors(family, a) for name in packed.theirs}
    untied = packed_tensors(family, replace(a, tied_head=False))
    theirs_of = {packed.ours: packed.theirs[0] for packed in untied if packed.role == "same"}
    head, embedding = theirs_of["head.weight"], theirs_of["embedding.weight"]
    return [(head, embedding)] if head in names and head not in wanted and embedding in names else []
