"""Checkpoints made up of random numbers, written in blocks: another project's files, and those of a training."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlm_core.models.config import ModelConfig
from dlm_core.models.tensor_shapes import tensor_shapes
from pipeline.artifact import MANIFEST, Manifest, record_files, write_json
from pipeline.hf_config import SpecialIds, write_config
from pipeline.hf_names import Family
from pipeline.repack import INDEX_FILE, their_shapes
from pipeline.tensor_files import BLOCK_ELEMENTS, TensorWriter
from pipeline.training_state import (
    EMA,
    MASTER,
    CheckpointManifest,
    Topology,
    checkpoint_name,
    file_name,
    tensor_name,
    write_manifest,
)
from pipeline.weights import ModelRecord

FILE_BYTES = 500_000_000
STEPS = (10, 20)
_KEPT = (MASTER, EMA, "exp_avg", "exp_avg_sq")


def write_family(family: Family, model: ModelConfig, directory: Path) -> None:
    """Another project's directory of a model: config.json, an index, and files in bfloat16."""
    files: list[dict[str, tuple[str, Sequence[int]]]] = [{}]
    room = FILE_BYTES
    for name, shape in their_shapes(family, model).items():
        size = 2 * int(np.prod(shape))
        if files[-1] and size > room:
            files.append({})
            room = FILE_BYTES
        files[-1][name] = "BF16", shape
        room -= size
    index: dict[str, str] = {}
    for number, tensors in enumerate(files):
        path = directory / f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        _write(path, tensors, seed=number)
        index |= dict.fromkeys(tensors, path.name)
    write_json(directory / INDEX_FILE, {"weight_map": index})
    record = ModelRecord(model, seq_len=2048, objective="autoregressive_nll", target_offset=1)
    write_json(directory / "config.json", write_config(family, record, SpecialIds(), "bfloat16"))


def _write(path: Path, tensors: dict[str, tuple[str, Sequence[int]]], seed: int) -> None:
    generator = np.random.default_rng(seed)
    with TensorWriter(path, tensors, {"format": "pt"}) as out:
        for name, (_, shape) in tensors.items():
            for numel in _blocks(int(np.prod(shape))):
                out.append(name, generator.random(numel, np.float32) - 0.5)


def _blocks(numel: int) -> Iterator[int]:
    for start in range(0, numel, BLOCK_ELEMENTS):
        yield min(BLOCK_ELEMENTS, numel - start)


def write_training(model: ModelConfig, artifact: Path, workers: int) -> None:
    """What ``pretrain`` leaves of a model, cut as ZeRO 1 does; its two checkpoints share their files on the disk."""
    shapes = {name: list(shape) for name, shape in tensor_shapes(model).items()}
    first, second = (artifact / "checkpoints" / checkpoint_name(step) for step in STEPS)
    first.mkdir(parents=True)
    second.mkdir()
    for rank, stretches in enumerate(_stretches(shapes, workers)):
        _write(first / file_name(rank), {name: ("F32", [numel]) for name, numel in stretches}, seed=rank)
        os.link(first / file_name(rank), second / file_name(rank))
    topology = Topology(workers, zero_stage=1, ep_size=1, precision="bf16", micro_batch_seqs=1)
    for step, checkpoint in zip(STEPS, (first, second), strict=True):
        records = record_files(checkpoint)
        write_manifest(
            checkpoint, CheckpointManifest(step, "0" * 64, {}, topology, shapes, step, 0, {}, [], records, {})
        )
    write_json(artifact / "model_config.json", model)
    stats: dict[str, Any] = {
        "seq_len": 64,
        "objective": "masked_nelbo",
        "block_size": 0,
        "target_offset": 0,
        "within_documents": False,
        "average_steps": list(STEPS),
        "tokens": 0,
        "lineage": [],
    }
    files = record_files(artifact)
    write_json(artifact / MANIFEST, Manifest("pretrain", "0" * 64, 1, {}, {"tokenizer": "0" * 64}, files, stats))


def _stretches(shapes: dict[str, list[int]], workers: int) -> Iterator[list[tuple[str, int]]]:
    """Name and size of what each rank holds: all parameters in a row, cut into equal parts."""
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    share = -(-sum(sizes.values()) // workers)
    for rank in range(workers):
        held: list[tuple[str, int, int]] = []
        place = 0
        for name, size in sizes.items():
            low, high = max(place, rank * share), min(place + size, (rank + 1) * share)
            if low < high:
                held.append((name, low - place, high - low))
            place += size
        yield [(tensor_name((which, name, start, numel)), numel) for which in _KEPT for name, start, numel in held]
