"""A gang of a real, tiny training whose store is an object store; every rank may have a machine of its own."""

import gc
import os
import socket
import sys
from pathlib import Path
from typing import Any

from pipeline.artifact import load_manifest
from pipeline.config import to_json
from pipeline.pretrain.config import STAGE, PretrainConfig
from pipeline.stage import stage_fingerprint
from tests.support import faults
from tests.support.tiny_run import _ENVIRONMENT, Artifacts, Gang, rank_context
from workflows.copies import upload_artifact
from workflows.lease import acquire_lease
from workflows.store import Store, open_writable_store
from workflows.worker import Piece, run_piece

OUT, STATE = "artifacts/pretrain/x/attempts/1", "artifacts/pretrain/x/state"


def store_with_inputs(url: str, made: Artifacts) -> Store:
    """A store that has the rows and the tokenizer."""
    store = open_writable_store(url)
    for name, path in made.inputs().items():
        upload_artifact(path, store.root / "artifacts" / name / "attempts" / "1")
    return store


def piece_of(store: Store, config: PretrainConfig, made: Artifacts, log_dir: Path) -> Piece:
    """What the coordinator tells the workers of the gang, which takes the lease anew."""
    lease = acquire_lease(store.root / "lease", "test")
    fingerprints = {name: load_manifest(path).fingerprint for name, path in made.inputs().items()}
    return Piece(
        what="whole",
        stage="pipeline.pretrain",
        step="pretrain",
        config=to_json(config),
        store=store.url,
        store_id=store.store_id,
        inputs={name: f"artifacts/{name}/attempts/1" for name in fingerprints},
        out=OUT,
        state=STATE,
        work=f"runs/r/work/{lease.epoch:03d}",
        log_dir=str(log_dir),
        fingerprint=stage_fingerprint(STAGE, config, fingerprints),
        run_id="r",
        lease=lease.folder.key,
        lease_epoch=lease.epoch,
        lease_token=lease.token,
        cancel="runs/r/cancel",
    )


def start(piece: Piece, machines: Path, environment: dict[str, str], fault: str = "", **given: Any) -> Gang:
    """Start every rank on a machine of its own: a directory for what it keeps, and first of its ranks."""
    workers = piece.config["workers"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks, logs = [], []
    for rank in range(workers):
        log = Path(piece.log_dir) / f"rank-{rank}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        own = {**environment, "RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        own |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own |= {"DLM_CACHE": str(machines / str(rank))}
        process = rank_context().Process(target=_rank, args=(to_json(piece), own, log, fault, given), daemon=True)
        process.start()
        ranks.append(process)
        logs.append(log)
    return Gang(ranks, logs, machines / "out")


def _rank(payload: dict[str, Any], own: dict[str, str], log: Path, fault: str, given: dict[str, Any]) -> None:
    with log.open("wb") as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
    gc.freeze()
    os.environ.update(_ENVIRONMENT | own)
    if fault:
        getattr(faults, fault)(**given)
    run_piece(payload, lambda: "")
    sys.stdout.flush()
    os._exit(0)
