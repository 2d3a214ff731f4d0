"""A batch script for Slurm: it starts Ray on the nodes of the job and resumes a run there; requeued, it goes on."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from cluster.shapes import STOP_GRACE_S, ClusterShape, Head, WorkerGroup, node_env, node_labels, refuse, resume_command

_BODY = Path(__file__).parent / "slurm_body.sh"
_HEAD_TRIES = 180
"""Looks at the head, a second apart, until it counts as not started."""
_NODES_S = 180
"""How long the run waits for nodes that have not joined."""
_STOP_S = 20
"""How long Ray may take to end once the run has."""
_TIME = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}|\d+")
_WORD = re.compile(r"[A-Za-z0-9_.,-]+")
_MIB = 2**20


@dataclass(frozen=True)
class Slurm:
    """What Slurm has to know beside the shape."""

    environment: str
    """The directory of a Python environment with dlm in it, the same on every node."""
    token_path: str
    """The file of the Ray token, mode 600, the same on every node."""
    partition: str = ""
    account: str = ""
    time_limit: str = ""
    """As Slurm writes it: 2-00:00:00, 12:00:00, minutes; empty for that of the partition."""
    max_requeues: int = 20

    def __post_init__(self) -> None:
        """Refuse what would break the script or end it at once."""
        for name in ("environment", "token_path"):
            value = getattr(self, name)
            if not value.startswith("/") or not value.isprintable():
                raise refuse(f"slurm.{name}", value, "an absolute path is needed, which every node sees")
        for name in ("partition", "account"):
            if (value := getattr(self, name)) and not _WORD.fullmatch(value):
                raise refuse(f"slurm.{name}", value, "one word is needed, or several with commas")
        if self.time_limit and not _TIME.fullmatch(self.time_limit):
            raise refuse("slurm.time_limit", self.time_limit, "days-hours:minutes:seconds or minutes are needed")
        if type(self.max_requeues) is not int or self.max_requeues < 0:
            raise refuse("slurm.max_requeues", self.max_requeues, "a whole number from 0 is needed")


def slurm_script(shape: ClusterShape, slurm: Slurm, run: str) -> str:
    """The script for ``sbatch``."""
    group = _only_group(shape)
    values = {
        "environment": slurm.environment,
        "token_file": slurm.token_path,
        "labels": ",".join(f"{key}={value}" for key, value in node_labels(shape, group).items()),
        "num_cpus": group.cpus,
        "num_gpus": group.gpus,
        "memory_bytes": round(group.memory_gb * 1e9),
        "head_tries": _HEAD_TRIES,
        "nodes_s": _NODES_S,
        "stop_s": _STOP_S,
        "max_requeues": slurm.max_requeues,
    }
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH --{option}" for option in _options(shape, slurm, group)),
        "",
        "# First, with the store and the data as the nodes see them: "
        f"dlm plan RECIPE --freeze {run} --store {shape.store}",
        "set -euo pipefail",
        *(f"{name}={shlex.quote(str(value))}" for name, value in values.items()),
        *(f"export {name}={shlex.quote(value)}" for name, value in node_env(shape).items()),
        f"command=({resume_command(run, shape.store)})",
    ]
    return "\n".join(lines) + "\n" + _BODY.read_text(encoding="utf-8")


def _only_group(shape: ClusterShape) -> WorkerGroup:
    """The one kind of node that a job has; what a job cannot be is refused."""
    if len(shape.workers) != 1:
        raise refuse(
            "workers", [group.name for group in shape.workers], "a Slurm job has nodes of one kind: give one group"
        )
    (group,) = shape.workers
    if group.bounds[0] < 1:
        raise refuse(f"workers.{group.name}.count", group.bounds[0], "a Slurm job has at least one node")
    if group.is_elastic and group.count != group.bounds[1]:
        allowed = f"Slurm gives as many nodes as it has, up to max_count {group.bounds[1]}: make them equal"
        raise refuse(f"workers.{group.name}.count", group.count, allowed)
    if group.is_spot:
        raise refuse(
            f"workers.{group.name}.is_spot", True, "Slurm takes whole jobs away: name such a partition instead"
        )
    if shape.head != Head():
        raise refuse("head", shape.head, "in a Slurm job the head shares the first node with workers: leave it out")
    for name in ("image", "shm_gb"):
        if value := getattr(shape, name):
            raise refuse(name, value, "the job runs on the nodes themselves: leave it out")
    return group


def _options(shape: ClusterShape, slurm: Slurm, group: WorkerGroup) -> list[str]:
    low, high = group.bounds
    kind = f"{group.gpu_kind}:" if group.gpu_kind else ""
    options = [
        f"job-name={shape.name}",
        f"nodes={low}-{high}" if group.is_elastic else f"nodes={group.count}",
        "ntasks-per-node=1",
        f"cpus-per-task={group.cpus}",
        *([f"gpus-per-node={kind}{group.gpus}"] if group.gpus else []),
        f"mem={int(group.memory_gb * 1e9 / _MIB)}M",
        *([f"partition={slurm.partition}"] if slurm.partition else []),
        *([f"account={slurm.account}"] if slurm.account else []),
        *([f"time={slurm.time_limit}"] if slurm.time_limit else []),
        "exclusive",
        "requeue",
        *(["no-kill"] if group.is_elastic else []),
        f"signal=B:TERM@{STOP_GRACE_S}",
        "open-mode=append",
        f"output={shape.name}-%j.log",
    ]
    return options
