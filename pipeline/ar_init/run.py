"""Copy weights tensor by tensor, fit their vocabulary to a tokenizer with a mask, turn dense networks into experts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.tensor_shapes import tensor_shapes
from dlm_core.upcycling import even_weight_sum, upcycled
from pipeline.ar_init.config import ArInitConfig
from pipeline.artifact import checked, load_manifest, write_json
from pipeline.config import to_json
from pipeline.data.special_tokens import SpecialTokens, load_special_tokens
from pipeline.errors import UserError
from pipeline.stage import StageContext, Stats
from pipeline.tensor_files import TensorFiles
from pipeline.weights import (
    WEIGHTS_FILE,
    ModelRecord,
    Origin,
    check_same_vocabulary,
    check_shapes,
    load_record,
    save_record,
    weights_writer,
)

REPORT_FILE = "report.json"
_TABLES = ("embedding.weight", "head.weight", "head.bias")


def run(config: ArInitConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats:
    """Write the weights, model.json and report.json: what was copied, made and left out."""
    source, record = inputs["weights"], load_record(inputs["weights"])
    special = load_special_tokens(inputs["tokenizer"])
    model = initialised_model(config, record, inputs, special)
    files = TensorFiles([checked(source, WEIGHTS_FILE)])
    check_shapes(record.model, files.shapes, str(source))
    shapes = tensor_shapes(model)
    made: dict[str, str] = {}
    with weights_writer(context.out, shapes) as writer:
        for number, name in enumerate(shapes):
            context.progress(number, len(shapes))
            for values, how in _parts(config, name, files, model, record.model):
                writer.append(name, values)
                if how:
                    made[name] = how
    copied = [name for name in shapes if name not in made]
    left_out = sorted(set(files.names) - set(shapes))
    details = {"made": made, "copied": len(copied), "left_out": left_out, "mask_token_id": special.mask_token_id}
    lineage = [*record.lineage, Origin("initialised", details)]
    fingerprint = load_manifest(inputs["tokenizer"]).fingerprint
    save_record(context.out, replace(record, model=model, tokenizer=fingerprint, lineage=lineage))
    write_json(context.out / REPORT_FILE, {"copied": copied, "made": made, "left_out": left_out})
    return {"num_params": model.num_params(), **details, "architecture": to_json(model.architecture)}


def initialised_model(
    config: ArInitConfig, record: ModelRecord, inputs: Mapping[str, Path], special: SpecialTokens
) -> ModelConfig:
    """What the weights become; UserError where they do not speak the tokenizer's vocabulary, or cannot be upcycled."""
    check_same_vocabulary(record, inputs["weights"], inputs["tokenizer"])
    if special.vocab_size < record.model.vocab_size:
        raise UserError(
            f"the tokenizer {inputs['tokenizer']} wants {special.vocab_size} rows, the weights in {inputs['weights']} "
            f"have {record.model.vocab_size}; no row is taken away. Give the tokenizer that was made of these weights"
        )
    if config.mask_row == "keep" and special.mask_token_id >= record.model.vocab_size:
        raise UserError(
            f"ar_init.mask_row is keep, but the mask token {special.mask_token_id} is a new row, of which the weights "
            'have nothing; set ar_init.mask_row="mean"'
        )
    has_learned_it = record.objective != "autoregressive_nll" and record.model.mask_token_id == special.mask_token_id
    if config.mask_row == "mean" and has_learned_it:
        raise UserError(
            f"ar_init.mask_row is mean, but the weights in {inputs['weights']} were trained as {record.objective} with "
            f'the mask token {special.mask_token_id}: its row would be lost. Set ar_init.mask_row="keep"'
        )
    architecture = record.model.architecture
    try:
        architecture = architecture if config.upcycle is None else upcycled(architecture, config.upcycle)
    except ValueError as error:
        raise UserError(f"ar_init.upcycle does not fit the weights in {inputs['weights']}: {error}") from None
    return ModelConfig(architecture, special.vocab_size, special.mask_token_id)


def _parts(
    config: ArInitConfig, name: str, files: TensorFiles, model: ModelConfig, source: ModelConfig
) -> Iterator[tuple[np.ndarray, str]]:
    """The values of a tensor, in one or several parts, and how they were made where they were not copied."""
    if name in _TABLES:
        yield from _fitted(config, files.read(name), model)
        return
    prefix, _, rest = name.partition("feed_forward.")
    if not rest or name in files.shapes:
        yield files.read(name), ""
        return
    assert config.upcycle is not None, f"{name} is in no file"
    yield from _of_experts(config, model.architecture, f"{prefix}feed_forward.", rest, files)


def _fitted(config: ArInitConfig, table: np.ndarray, model: ModelConfig) -> Iterator[tuple[np.ndarray, str]]:
    """A table of the vocabulary, changed in place, then the rows that the tokenizer wants beyond it."""
    num_rows, mask = len(table), model.mask_token_id
    assert mask is not None
    num_new, is_replaced = model.vocab_size - num_rows, mask < num_rows and config.mask_row == "mean"
    if not num_new and not is_replaced:
        yield table, ""
        return
    others = np.delete(np.arange(num_rows), mask) if mask < num_rows else np.arange(num_rows)
    mean = _mean(table, others)
    new = f"rows {num_rows} to {model.vocab_size - 1}" if num_new > 1 else f"row {num_rows}" if num_new else ""
    how = f"the mean of {len(others)} rows in {' and '.join(filter(None, (new, f'row {mask}' if is_replaced else '')))}"
    if is_replaced:
        table[mask] = mean
    yield table, how
    if num_new:
        yield np.repeat(mean[None], num_new, axis=0), how


def _mean(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean of rows, added up in float64 some at a time."""
    total = np.zeros(table.shape[1:], np.float64)
    for start in range(0, len(rows), 4096):
        total += table[rows[start : start + 4096]].sum(axis=0, dtype=np.float64)
    return (total / len(rows)).astype(np.float32)


def _of_experts(
    config: ArInitConfig, a: Architecture, prefix: str, rest: str, files: TensorFiles
) -> Iterator[tuple[np.ndarray, str]]:
    """A tensor of a sparse network, made from the dense one of its layer."""
    moe = a.moe
    assert moe is not None
    if rest == "gate.weight":
        layer = int(prefix.split(".")[1])
        drawn = np.random.default_rng([config.init_seed, layer]).standard_normal(
            (moe.num_experts, a.d_model), np.float32
        )
        yield np.float32(config.router_std) * drawn, f"drawn from N(0, {config.router_std}^2)"
        return
    if rest == "gate.e_score_correction_bias":
        yield np.zeros(moe.num_experts, np.float32), "zero"
        return
    dense = {"experts.gate_up_proj": "gate_up.weight", "experts.down_proj": "down.weight"}[rest]
    scale = 1.0 / even_weight_sum(moe) if rest == "experts.down_proj" else 1.0
    values = files.read(prefix + dense) * np.float32(scale)
    how = f"{moe.num_experts} copies of {prefix}{dense}" + (f" times {scale:g}" if scale != 1.0 else "")
    for _ in range(moe.num_experts):
        yield values[None], how
