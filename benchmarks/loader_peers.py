"""What a reader would otherwise load rows with: datasets behind torch's DataLoader, and a plain memory map."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

TOKENS, DOCUMENTS = "input_ids", "doc_ids"


def save_dataset(directory: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Save [rows, seq_len] arrays as the dataset that ``map`` leaves of tokenized text: lists of int32."""
    import datasets
    from datasets.table import InMemoryTable

    datasets.disable_progress_bars()
    lists: dict[str, pa.Array] = {}
    for name, column in columns.items():
        ends = np.arange(0, column.size + 1, column.shape[1], dtype=np.int32)
        lists[name] = pa.ListArray.from_arrays(pa.array(ends), pa.array(column.reshape(-1).astype(np.int32)))
    datasets.Dataset(InMemoryTable(pa.table(lists))).save_to_disk(str(directory))


def shuffled(directory: Path, batch_rows: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of a dataset in torch format, in the order of a seeded sampler, epoch after epoch."""
    import datasets

    dataset: Any = datasets.load_from_disk(str(directory)).with_format("torch")
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    loader = DataLoader(dataset, batch_size=batch_rows, sampler=sampler, drop_last=True)
    while True:
        yield from loader


def mixed(
    directories: Mapping[str, Path], weights: Mapping[str, float], batch_rows: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of shuffled datasets interleaved by their weights, over and over."""
    import datasets

    datasets.disable_progress_bars()
    parts: list[Any] = [datasets.load_from_disk(str(directories[name])).shuffle(seed=seed) for name in weights]
    mixture: Any = datasets.interleave_datasets(
        parts, probabilities=list(weights.values()), seed=seed, stopping_strategy="all_exhausted"
    )
    loader = DataLoader(mixture.with_format("torch"), batch_size=batch_rows, drop_last=True)
    while True:
        yield from loader


def memory_mapped(path: Path, batch_rows: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Rows of an .npy file by fancy indexing with a permutation, as int64, epoch after epoch."""
    rows = np.load(path, mmap_mode="r")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for first in range(0, len(order) - batch_rows + 1, batch_rows):
            yield {TOKENS: torch.from_numpy(rows[order[first : first + batch_rows]].astype(np.int64))}
