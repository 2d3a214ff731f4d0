"""A gang on Ray: every rank a worker of Ray Train's TorchTrainer, all of them started or none."""

import os
import tempfile
from typing import Any

from cluster.logged import run_logged

_LEAN_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}
_START_TIMEOUT_S = "120"
_COLLECTIVE_TIMEOUT_S = 600
"""Of joining; a stage that watches over its ranks sets its own afterwards."""


def run_gang(function: str, payload: dict[str, Any], size: int, cpus: float, log_dir: str) -> None:
    """Run ``module:function`` on ``size`` ranks and wait; raises if any of them fails.

    No retries here: the coordinator counts them.  Nothing is reported to Ray Train, since ranks write their
    checkpoints to the store themselves; its own bookkeeping goes to a temporary directory.
    """
    os.environ.update(_LEAN_TRAIN)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _START_TIMEOUT_S)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    backend = _backend(size)
    with tempfile.TemporaryDirectory(prefix="dlm-train-") as storage:
        trainer = TorchTrainer(
            _run_rank,
            train_loop_config={"function": function, "payload": payload, "log_dir": log_dir},
            torch_config=TorchConfig(backend=backend, timeout_s=_COLLECTIVE_TIMEOUT_S),
            scaling_config=ScalingConfig(
                num_workers=size, use_gpu=backend == "nccl", resources_per_worker={"CPU": cpus}
            ),
            run_config=RunConfig(
                name="gang",
                storage_path=storage,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
        )
        trainer.fit()


def _backend(size: int) -> str:
    """NCCL if torch can use a GPU for every rank; otherwise gloo, and a stage may refuse what it finds."""
    import torch

    return "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= size else "gloo"


def _run_rank(config: dict[str, Any]) -> None:
    os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
    run_logged(config["function"], config["payload"], config["log_dir"], int(os.environ["RANK"]))
