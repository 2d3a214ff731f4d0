"""``dlm inspect``: what weights are, without loading them."""

import shlex
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from dlm_core.models.config import Architecture
from pipeline.config import flatten, to_json
from pipeline.lineage import on_one_line, told
from pipeline.pretrain.given import architecture_setting
from workflows import inspection
from workflows.commands.common import (
    DEFAULT_STORE,
    JsonOption,
    StoreOption,
    find_store,
    page_width,
    print_json,
    print_line,
)
from workflows.display import columns
from workflows.inspection import Found

_NEXT_TOKEN = "autoregressive_nll"
_ATTENTION = {
    _NEXT_TOKEN: "causal: every position sees itself and those before it",
    "masked_nelbo": "full: every position sees all others",
    "block_nelbo": "block-causal: a block of {} tokens sees itself and the blocks before it",
}
_OFFSETS = ("0: position l predicts token l", "1, shifted: position l - 1 predicts token l")
_OFFSET_OF_NEXT_TOKEN = "{}, of a next-token model: position l predicts token l + 1"
_SHOWN_VALUE = 100


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="Interchange weights, a training, a directory of transformers, a .gguf or .safetensors file; or RUN "
            "or RUN:STEP of the store.",
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with its shape and dtype.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Print what weights are: architecture, parameters, mask token, shift, where they come from, their tensors."""
    found = inspection.look_at(inspection.place_of(path, find_store(store)).path)
    if as_json:
        print_json(inspection.as_json(found))
        return
    pairs = [(on_one_line(name), value) for name, value in _pairs(found)]
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        print_line(f"{name:{width}}  {on_one_line(value)}")
    if found.record is not None:
        for number, origin in enumerate(found.record.lineage, 1):
            details = "; ".join(f"{name} {words}" for name, words in told(origin, hash_chars=12))
            print_line(f"{'lineage':{width}}  {number}. {origin.kind}: {details}")
        print_line(f"\nas a setting: --set {shlex.quote(architecture_setting(found.record.model.architecture))}")
    for notice in found.notices:
        print_line(f"note: {on_one_line(notice)}")
    if tensors:
        rows = [
            (on_one_line(name), on_one_line(dtype), " ".join(map(str, shape)))
            for name, (dtype, shape) in found.tensors.items()
        ]
        for line in columns(("tensor", "dtype", "shape"), rows, page_width()):
            print_line(line)


def _pairs(found: Found) -> Iterator[tuple[str, str]]:
    yield "kind", f"{found.kind}, of the stage {found.stage}" if found.stage else found.kind
    if found.family:
        yield "family", found.family
    if found.record is not None:
        yield from _of_record(found)
    elif found.tensors:
        yield "parameters", f"{found.num_params:,} in all tensors"
    for name, value in found.known.items():
        if value not in (None, "", []):
            yield name, _short(value)
    if found.dtypes:
        yield "dtype", ", ".join(found.dtypes)
    yield "tokenizer", found.tokenizer or "none"
    yield "tensors", f"{len(found.tensors)}" if found.tensors else "unknown"


def _of_record(found: Found) -> Iterator[tuple[str, str]]:
    record = found.record
    assert record is not None
    model, a = record.model, record.model.architecture
    active = f", {model.num_active_params():,} active for a token" if a.moe else ""
    head = "the head is the embedding" if a.tied_head else "and as many in the head"
    yield "parameters", f"{model.num_params():,}{active}; {model.vocab_size * a.d_model:,} in the embedding, {head}"
    yield "architecture", ", ".join(f"{name} {value}" for name, value in _told(a).items())
    yield "vocabulary", f"{model.vocab_size:,} rows"
    yield "mask token", "none yet" if model.mask_token_id is None else str(model.mask_token_id)
    offset = _OFFSET_OF_NEXT_TOKEN if record.objective == _NEXT_TOKEN else _OFFSETS[record.target_offset]
    yield "target_offset", offset.format(record.target_offset)
    yield "objective", record.objective
    within = ", within its document" if record.within_documents else ""
    yield "attention", _ATTENTION[record.objective].format(record.block_size) + within
    yield "seq_len", f"{record.seq_len}"


def _told(a: Architecture) -> dict[str, Any]:
    """The sizes, and all else that is not as by default."""
    sizes = ("d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff")
    default = flatten(to_json(Architecture()))
    return {
        name: value
        for name, value in flatten(to_json(a)).items()
        if value is not None and (name in sizes or value != default.get(name))
    }


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _SHOWN_VALUE else f"{text[: _SHOWN_VALUE - 1]}…"
