"""Files for Ray's cluster launcher, ``ray up FILE``: machines that stand there already, or AWS."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.shapes import ClusterShape, Head, WorkerGroup, node_env, node_labels, refuse

TOKEN_FILE = "/home/dlm/.ray/auth_token"
"""Of the image's user.  ``ray up`` copies the token from the machine that runs it, and no file names it."""
_PORT = 6379
_WORD = re.compile(r"[A-Za-z0-9_.:~/-]+")
_HEAD_TYPE = "head"


@dataclass(frozen=True)
class Launcher:
    """What the launcher has to know beside the shape."""

    provider: Literal["local", "aws"]
    ssh_user: str = "ubuntu"
    ssh_private_key: str = ""
    """A path; ``aws`` makes a key of its own without one."""
    token_path: str = "~/.ray/auth_token"
    """Of the token, on the machine that runs ``ray up``."""
    head_ip: str = ""
    """``local``: the machine of the head."""
    worker_ips: tuple[str, ...] = ()
    """``local``: the machines of the workers."""
    region: str = ""
    """``aws``."""
    head_instance: str = ""
    """``aws``: the type of the head's machine."""
    instances: dict[str, str] = field(default_factory=dict[str, str])
    """``aws``: the type of machine of each group of workers."""
    instance_profile: str = ""
    """``aws``: the ARN of a profile that gives the nodes access to the store, instead of a key."""

    def __post_init__(self) -> None:
        """Refuse values that are none, and values that this provider would ignore."""
        if self.provider not in _PROVIDERS:
            raise refuse("launcher.provider", self.provider, f"{' or '.join(_PROVIDERS)} is needed")
        others = {name for names in _PROVIDERS.values() for name in names} - set(_PROVIDERS[self.provider])
        for name in sorted(others):
            if value := getattr(self, name):
                raise refuse(f"launcher.{name}", value, f"it means nothing with {self.provider}: leave it out")
        words = {name: getattr(self, name) for name in ("ssh_user", "token_path")}
        words |= {name: value for name in _PROVIDERS[self.provider] if isinstance(value := getattr(self, name), str)}
        words |= {f"worker_ips.{place}": ip for place, ip in enumerate(self.worker_ips)}
        words |= {f"instances.{group}": kind for group, kind in self.instances.items()}
        for name, value in words.items():
            if not (name == "instance_profile" and not value) and not _WORD.fullmatch(value):
                raise refuse(f"launcher.{name}", value, f"{self.provider} needs it, one word")
        if self.provider == "local" and not self.ssh_private_key:
            raise refuse("launcher.ssh_private_key", "", "local needs the path of a key that opens all the machines")


_PROVIDERS = {
    "local": ("head_ip", "worker_ips"),
    "aws": ("region", "head_instance", "instances", "instance_profile"),
}
"""Which fields mean something."""


def launcher_file(shape: ClusterShape, launcher: Launcher) -> dict[str, Any]:
    """The file for ``ray up``."""
    if not shape.image:
        raise refuse("image", "", "the nodes run it: build it from cluster/manifests/Dockerfile, and name it here")
    nodes = _local(shape, launcher) if launcher.provider == "local" else _aws(shape, launcher)
    auth = {"ssh_user": launcher.ssh_user}
    if launcher.ssh_private_key:
        auth["ssh_private_key"] = launcher.ssh_private_key
    return {
        "cluster_name": shape.name,
        "max_workers": sum(group.bounds[1] for group in shape.workers),
        "idle_timeout_minutes": 10,
        "auth": auth,
        "docker": {
            "image": shape.image,
            "container_name": "dlm",
            "pull_before_run": True,
            "run_options": _run_options(shape),
        },
        "file_mounts": {TOKEN_FILE: launcher.token_path},
        "setup_commands": [f"chmod 600 {TOKEN_FILE}"],
        "head_setup_commands": [],  # by default those of aws, a newer boto3 than the image has
        **nodes,
    }


def _run_options(shape: ClusterShape) -> list[str]:
    """Of docker; the launcher measures each machine and gives it a third of its memory to share, if none is asked."""
    options = ["--ulimit nofile=65536:65536"]
    if any(group.gpus for group in shape.workers):
        # the launcher adds --runtime=nvidia where it finds it, which shows a container what these say; the image itself
        # does not say it, since in Kubernetes a pod without GPUs would see all of its node
        options += ["--env NVIDIA_VISIBLE_DEVICES=all", "--env NVIDIA_DRIVER_CAPABILITIES=compute,utility"]
    if shape.shm_gb is not None:
        options.append(f"--shm-size={round(shape.shm_gb * 1e9)}b")
    if shape.store.startswith("/"):
        options.append(f"--volume {shlex.quote(f'{shape.store}:{shape.store}')}")
    return options


def _start(shape: ClusterShape, what: str, sizes: Mapping[str, object]) -> list[str]:
    """The commands that start Ray: an environment and one line, in which nothing is secret."""
    env = node_env(shape) | {"RAY_AUTH_TOKEN_PATH": TOKEN_FILE}
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
    options = " ".join(shlex.quote(f"--{name}={value}") for name, value in sizes.items())
    return ["ray stop", f"export {exports}; ulimit -n 65536; ray start {what} {options}".rstrip()]


_AS_HEAD = f"--head --port={_PORT} --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"
_AS_WORKER = f"--address=$RAY_HEAD_IP:{_PORT}"


def _local(shape: ClusterShape, launcher: Launcher) -> dict[str, Any]:
    """Machines by address: one kind of worker, always all of them; what they are is said where Ray starts."""
    if len(shape.workers) != 1:
        names = [group.name for group in shape.workers]
        raise refuse("workers", names, "the launcher knows one group on machines of its own: describe exactly one")
    (group,) = shape.workers
    if group.is_elastic or group.count != len(launcher.worker_ips):
        allowed = (
            f"launcher.worker_ips names {len(launcher.worker_ips)} machines: count is their number, without bounds"
        )
        raise refuse(f"workers.{group.name}.count", group.count, allowed)
    if group.is_spot:
        raise refuse(f"workers.{group.name}.is_spot", True, "machines of your own are not taken away: leave it out")
    return {
        "provider": {"type": "local", "head_ip": launcher.head_ip, "worker_ips": list(launcher.worker_ips)},
        "head_start_ray_commands": _start(shape, _AS_HEAD, _sizes(shape, shape.head)),
        "worker_start_ray_commands": _start(shape, _AS_WORKER, _sizes(shape, group)),
    }


def _sizes(shape: ClusterShape, node: Head | WorkerGroup) -> dict[str, object]:
    group = node if isinstance(node, WorkerGroup) else None
    labels = ",".join(f"{key}={value}" for key, value in node_labels(shape, group).items())
    gpus = {"num-gpus": group.gpus} if group else {}
    return {"num-cpus": node.cpus, **gpus, "memory": round(node.memory_gb * 1e9), "labels": labels}


def _aws(shape: ClusterShape, launcher: Launcher) -> dict[str, Any]:
    """A type of node a group; Ray gets sizes and labels of each from here."""
    wanted, named = {group.name for group in shape.workers}, set(launcher.instances)
    if wanted != named:
        different = ", ".join(sorted(wanted ^ named))
        raise refuse("launcher.instances", dict(launcher.instances), f"each group needs a type of machine: {different}")
    head = {
        "resources": _resources(shape.head),
        "labels": node_labels(shape),
        "node_config": _machine(launcher, launcher.head_instance, is_spot=False),
        "min_workers": 0,
        "max_workers": 0,
    }
    types = {_HEAD_TYPE: head} | {group.name: _aws_type(shape, launcher, group) for group in shape.workers}
    return {
        "provider": {"type": "aws", "region": launcher.region, "cache_stopped_nodes": False},
        "head_node_type": _HEAD_TYPE,
        "available_node_types": types,
        "head_start_ray_commands": _start(shape, _AS_HEAD, {}),
        "worker_start_ray_commands": _start(shape, _AS_WORKER, {}),
    }


def _aws_type(shape: ClusterShape, launcher: Launcher, group: WorkerGroup) -> dict[str, Any]:
    low, high = group.bounds
    if group.is_elastic and group.count != low:
        allowed = f"ray up starts with min_count {low} and adds nodes when they are wanted: make them equal"
        raise refuse(f"workers.{group.name}.count", group.count, allowed)
    return {
        "resources": _resources(group),
        "labels": node_labels(shape, group),
        "node_config": _machine(launcher, launcher.instances[group.name], group.is_spot),
        "min_workers": low,
        "max_workers": high,
    }


def _resources(node: Head | WorkerGroup) -> dict[str, int]:
    gpus = {"GPU": node.gpus} if isinstance(node, WorkerGroup) and node.gpus else {}
    return {"CPU": node.cpus, **gpus, "memory": round(node.memory_gb * 1e9)}


def _machine(launcher: Launcher, instance: str, is_spot: bool) -> dict[str, Any]:
    machine: dict[str, Any] = {"InstanceType": instance}
    if launcher.instance_profile:
        machine["IamInstanceProfile"] = {"Arn": launcher.instance_profile}
    if is_spot:
        machine["InstanceMarketOptions"] = {"MarketType": "spot"}
    return machine
