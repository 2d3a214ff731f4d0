"""Checkpoints of two ranks, published from a state made by hand, and all ranks that look for the newest."""

import threading
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.config import fingerprint
from pipeline.pretrain.checkpoint import newest_valid, publish
from pipeline.pretrain.writer import Snapshot, write_file
from pipeline.training_state import CheckpointManifest, Topology, checkpoint_name, file_name
from tests.support.hand_state import CUTS, SHAPES, HandState, ThreadRanks, distinct, together

TOPOLOGY = Topology(workers=2, zero_stage=1, ep_size=1, precision="fp32", micro_batch_seqs=4)
IDENTITY = {"config": {"precision": "fp32", "optimizer": {"lr": 0.1}}, "inputs": {"rows": "a", "tokenizer": "b"}}


def alone() -> Any:
    """The one rank of a gang."""
    return ThreadRanks(0, 1, threading.Barrier(1), [None])


def write_staging(directory: Path, step: int, without: str = "") -> tuple[Path, CheckpointManifest]:
    """What two ranks have written, but for one file, and the manifest that is to be published with it."""
    staging = directory / f"staging-{step}"
    records = []
    for rank in range(2):
        snapshot = Snapshot(HandState(distinct(step), CUTS["1"], rank, 2, SHAPES).written(rank))
        snapshot.take()
        if file_name(rank) != without:
            records.append(write_file(staging / file_name(rank), snapshot.header, snapshot.data))
    shapes = {name: list(shape) for name, shape in SHAPES.items()}
    own = fingerprint(IDENTITY)
    return staging, CheckpointManifest(step, own, IDENTITY, TOPOLOGY, shapes, step, 0, {}, [], records, {"torch": "2"})


def published(directory: Path, step: int) -> Path:
    """A checkpoint."""
    publish(*write_staging(directory, step))
    return directory / checkpoint_name(step)


def all_find(directory: Path, workers: int, warnings: list[str]) -> list[Any]:
    """What ``newest_valid`` returns or raises on each rank; ranks but the first may not warn or judge."""

    def find(ranks: ThreadRanks) -> Any:
        warn = warnings.append if ranks.rank == 0 else pytest.fail
        return newest_valid(directory, cast("Any", ranks), warn, lambda *given: ranks.rank and pytest.fail("asked"))

    return together(find, workers)
