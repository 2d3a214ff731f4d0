"""A gang on Ray: every rank a worker of Ray Train's TorchTrainer, all of them started or none."""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.executor import GPUS_ENV
from cluster.logged import run_logged
from cluster.nodes import Demand, drain_notice, has_gpus, nodes, ranks_that_fit

_LEAN_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}
_START_TIMEOUT_S = "120"
_COLLECTIVE_TIMEOUT_S = 600
"""Of joining; a stage that watches over its ranks sets its own afterwards."""
_MORE_WAIT_S = 15.0
"""Time that fewer ranks than wanted wait for more to fit: a lost node may be replaced, another call may just end."""
_LOOK_EVERY_S = 0.5

GANG_LOG = "gang.log"
"""What drives a gang writes it, on the machine of the coordinator."""
_STARTING = "starting"


def has_room(log: Path) -> bool:
    """Whether a gang has found room, and its ranks are being started: they hold the cores that look taken then."""
    return log.exists() and any(line.startswith(_STARTING) for line in log.read_text(errors="replace").splitlines())


def demand_name(log_dir: str) -> str:
    """What the demand of a gang is called while it waits for room."""
    return f"dlm demand {log_dir}"


def run_gang(
    function: str,
    payload: dict[str, Any],
    sizes: Sequence[int],
    cpus: float,
    log_dir: str,
    *,
    wants_gpus: bool,
    may_grow: bool,
) -> None:
    """Run ``module:function`` on as many ranks of ``sizes`` as fit and wait; raises if any of them fails.

    No retries here: the coordinator counts them.  Nothing is reported to Ray Train, since ranks write their
    checkpoints to the store themselves; its own bookkeeping goes to a temporary directory.
    """
    os.environ.update(_LEAN_TRAIN)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _START_TIMEOUT_S)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from cluster.gloo import NodeAddressConfig

    demand = Demand(demand_name(log_dir))
    try:
        size, on_gpus = _wait_for_room(sizes, cpus, wants_gpus, may_grow, demand)
    finally:  # also when it is cancelled
        demand.withdraw()
    kind = "one GPU each" if on_gpus else "without GPUs"
    print(f"{_STARTING} {size} of at most {sizes[-1]} ranks, {kind}", flush=True)  # noqa: T201
    with tempfile.TemporaryDirectory(prefix="dlm-train-") as storage:
        trainer = (TorchTrainer if may_grow else _own_trainer())(
            _run_rank,
            train_loop_config={"function": function, "payload": payload, "log_dir": log_dir, "on_gpus": on_gpus},
            torch_config=NodeAddressConfig(backend="nccl" if on_gpus else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
            scaling_config=ScalingConfig(
                num_workers=size, use_gpu=on_gpus, resources_per_worker={"CPU": cpus}, placement_strategy="PACK"
            ),
            run_config=RunConfig(
                name="gang",
                storage_path=storage,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
        )
        trainer.fit()


def _own_trainer() -> type[Any]:
    """TorchTrainer for a Ray without a dashboard, which ends with us.

    Ray Train's cleaner of placement groups asks the dashboard whether the controller lives, and would hold up the end
    of every gang by 12 s.  The executor removes the groups of a controller that died.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class OwnTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)]

    return OwnTrainer


def _wait_for_room(
    sizes: Sequence[int], cpus: float, wants_gpus: bool, may_grow: bool, demand: Demand
) -> tuple[int, bool]:
    """The largest size there is room for, and whether on GPUs.

    What others hold, or a node that may come back, is waited for a while as long as fewer ranks would do, and without
    end if none would: the coordinator ends the wait.  Room that the demand holds is the gang's as soon as it is
    withdrawn; should another one be faster, the ranks that Ray Train starts wait for theirs, and after a while fail.
    """
    settle_s = time.monotonic() + _MORE_WAIT_S
    while True:
        found = nodes()
        on_gpus = wants_gpus or has_gpus(found)
        gpus = 1.0 if on_gpus else 0.0
        if demand.is_met(sizes[-1], cpus, gpus):  # asked after the look: what it holds looks taken
            return sizes[-1], on_gpus
        room = ranks_that_fit(found, cpus, gpus, free=True)
        wanted = sizes[-1] if may_grow else min(sizes[-1], ranks_that_fit(found, cpus, gpus, free=False))
        fitting = [size for size in sizes if size <= room]
        is_all = bool(fitting) and not any(fitting[-1] < size <= wanted for size in sizes)
        if is_all or (fitting and time.monotonic() >= settle_s):
            return fitting[-1], on_gpus
        if may_grow:  # what merely waits is no demand for an autoscaler
            demand.ask(sizes[-1], cpus, gpus)
        time.sleep(_LOOK_EVERY_S)


def _run_rank(config: dict[str, Any]) -> None:
    import ray
    import torch.distributed

    os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
    os.environ[GPUS_ENV] = "1" if config["on_gpus"] else "0"
    own = ray.get_runtime_context().get_node_id()
    gang: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gang, own)
    run_logged(
        config["function"], config["payload"], config["log_dir"], int(os.environ["RANK"]), drain_notice(set(gang))
    )
