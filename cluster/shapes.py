"""The shape of a cluster, as values: a head, groups of workers, an image, a store.

What a Kubernetes file, a launcher file and a Slurm script have in common; each is rendered from it.
"""

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import urlsplit

from cluster.auth import AUTH_MODE

STABLE = {"dlm.io/stable": "true"}
"""The Ray label of nodes that nobody takes away, the head and groups that are no spot ones.

Coordinators and stages that call ``fit()`` are placed by it: Ray Train pins its controller to their node.
"""
GPU_LABEL = "dlm.io/gpu"
OWN_PREFIXES = ("dlm.io/", "ray.io/")

STOP_GRACE_S = 300
"""How long a stopped job may go on saving; Ray's own default of 3 s ends it in the middle of a checkpoint."""
DRAIN_S = 270
"""How long a node that is told to end goes on while its work moves away; Ray announces that as a preemption.

Within ``STOP_GRACE_S``, after which it is killed.
"""

_STORES = ("s3", "gs")
_DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_MAX_NAME_CHARS = 47
"""KubeRay appends to the name of a RayJob for that of its cluster, and to that one for services and pods."""
_MAX_GROUP_CHARS = 32
_TAKEN_GROUPS = ("head", "headgroup")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_PREFIX = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def refuse(field_name: str, found: object, allowed: str) -> ValueError:
    """The error of a field: its path, what was found, what is allowed or to be done."""
    return ValueError(f"{field_name} is {found!r}: {allowed}")


def _check_whole(field_name: str, found: object, least: int) -> None:
    if type(found) is not int or found < least:
        raise refuse(field_name, found, f"a whole number from {least} is needed")


def _check_gb(field_name: str, found: float, least: float) -> None:
    if type(found) not in (int, float) or not math.isfinite(found) or found < least:
        raise refuse(field_name, found, f"a number of gigabytes from {least:g} is needed")


def _check_labels(field_name: str, labels: Mapping[str, str]) -> None:
    for key, value in labels.items():
        prefix, slash, name = key.rpartition("/")
        if key.startswith(OWN_PREFIXES):
            raise refuse(
                f"{field_name}.{key}", value, f"labels of {' and '.join(OWN_PREFIXES)} are set by us and by Ray"
            )
        if not _LABEL_NAME.fullmatch(name) or (slash and not (_LABEL_PREFIX.fullmatch(prefix) and len(prefix) <= 253)):
            raise refuse(
                f"{field_name}.{key}", value, "a label is named like example.org/name, 63 characters after the slash"
            )
        if type(value) is not str or (value and not _LABEL_NAME.fullmatch(value)):
            raise refuse(f"{field_name}.{key}", value, "letters, digits, '.', '_' and '-' are allowed, 63 characters")


def ray_version() -> str:
    """The Ray of this environment, which ``constraints.txt`` pins, and which the image has from there."""
    try:
        return version("ray")
    except PackageNotFoundError:
        raise ValueError(
            "Ray is not installed here, and a cluster needs its version: pip install 'dlm[cluster]'"
        ) from None


@dataclass(frozen=True)
class Head:
    """The node that holds Ray's own state and runs coordinators."""

    cpus: int = 4
    memory_gb: float = 16.0

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        _check_whole("head.cpus", self.cpus, 1)
        _check_gb("head.memory_gb", self.memory_gb, 2)


@dataclass(frozen=True)
class WorkerGroup:
    """Nodes of one kind."""

    name: str
    count: int
    cpus: int
    memory_gb: float
    """Of a node, in units of 10^9 bytes."""
    gpus: int = 0
    """Of a node."""
    gpu_kind: str = ""
    """As the platform names it; empty for any."""
    min_count: int | None = None
    """With ``max_count``, the bounds of an elastic group; without, it has ``count`` nodes."""
    max_count: int | None = None
    is_spot: bool = False
    """Whether nodes may be taken away at short notice."""
    labels: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        """Refuse a group that cannot be, naming the field."""
        if not _DNS_LABEL.fullmatch(self.name) or len(self.name) > _MAX_GROUP_CHARS or self.name in _TAKEN_GROUPS:
            raise refuse(
                "workers.name",
                self.name,
                f"lower-case letters, digits and '-' are allowed, from a letter on, {_MAX_GROUP_CHARS} characters, "
                f"and not {' or '.join(_TAKEN_GROUPS)}",
            )
        where = f"workers.{self.name}"
        _check_whole(f"{where}.count", self.count, 0)
        _check_whole(f"{where}.cpus", self.cpus, 1)
        _check_whole(f"{where}.gpus", self.gpus, 0)
        _check_gb(f"{where}.memory_gb", self.memory_gb, 1)
        if (self.min_count is None) != (self.max_count is None):
            raise refuse(f"{where}.min_count", self.min_count, f"max_count is {self.max_count}; set both, or neither")
        if self.min_count is not None:
            _check_whole(f"{where}.min_count", self.min_count, 0)
            _check_whole(f"{where}.max_count", self.max_count, 1)
        low, high = self.bounds
        if not low <= self.count <= high:
            raise refuse(f"{where}.count", self.count, f"it starts between min_count {low} and max_count {high}")
        if self.gpu_kind and not _LABEL_NAME.fullmatch(self.gpu_kind):
            raise refuse(f"{where}.gpu_kind", self.gpu_kind, "one word is needed, as the platform names this GPU")
        if self.gpu_kind and not self.gpus:
            raise refuse(f"{where}.gpu_kind", self.gpu_kind, "the group has no GPU: set gpus, or leave gpu_kind out")
        if type(self.is_spot) is not bool:
            raise refuse(f"{where}.is_spot", self.is_spot, "true or false is needed")
        _check_labels(f"{where}.labels", self.labels)

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most nodes."""
        if self.min_count is None or self.max_count is None:
            return self.count, self.count
        return self.min_count, self.max_count

    @property
    def is_elastic(self) -> bool:
        """Whether the number of nodes may change."""
        low, high = self.bounds
        return low < high


@dataclass(frozen=True)
class ClusterShape:
    """A whole cluster."""

    name: str
    store: str
    """Where runs and artifacts live: a directory that every node sees at this path, ``s3://`` or ``gs://``."""
    workers: tuple[WorkerGroup, ...] = ()
    head: Head = Head()
    image: str = ""
    """Made from ``manifests/Dockerfile``, with a tag; a Slurm job runs without one."""
    shm_gb: float | None = None
    """Shared memory of a node, for Ray's objects and NCCL; left out, a third of its memory."""
    labels: dict[str, str] = field(default_factory=dict[str, str])
    """Ray labels of every node."""
    ray_version: str = field(default_factory=ray_version)

    def __post_init__(self) -> None:
        """Refuse a cluster that cannot be, naming the field."""
        if not _DNS_LABEL.fullmatch(self.name) or len(self.name) > _MAX_NAME_CHARS:
            allowed = "lower-case letters, digits and '-' are allowed, from a letter on"
            raise refuse("name", self.name, f"{allowed}, {_MAX_NAME_CHARS} characters")
        check_store(self.store)
        names = [group.name for group in self.workers]
        if twice := [name for name in names if names.count(name) > 1]:
            raise refuse("workers.name", twice[0], "two groups have this name: each needs its own")
        if self.image and (not _IMAGE.fullmatch(self.image) or ":" not in self.image.rpartition("/")[2]):
            raise refuse("image", self.image, "registry/name:tag is needed; without a tag nodes may differ in code")
        if self.shm_gb is not None:
            _check_gb("shm_gb", self.shm_gb, 0.1)
            for where, memory_gb in [("head", self.head.memory_gb), *((g.name, g.memory_gb) for g in self.workers)]:
                if self.shm_gb >= memory_gb:
                    raise refuse("shm_gb", self.shm_gb, f"it is part of a node's memory, and {where} has {memory_gb:g}")
        _check_labels("labels", self.labels)
        if self.ray_version != (installed := ray_version()):
            allowed = f"the Ray here is {installed}, and all nodes and clients need the same; leave it out"
            raise refuse("ray_version", self.ray_version, allowed)

    @property
    def is_elastic(self) -> bool:
        """Whether any group may grow or shrink."""
        return any(group.is_elastic for group in self.workers)


def check_store(store: str) -> None:
    """Refuse what another node would not find, and what would show a password."""
    url = urlsplit(store)
    if not store.isprintable() or any(character.isspace() for character in store):
        raise refuse("store", store, "spaces and control characters are not allowed")
    if "@" in url.netloc:
        raise ValueError("store has a user or a key before its @: give credentials by environment, never in an address")
    if store.startswith("/"):
        return
    if url.scheme not in _STORES or not url.netloc:
        allowed = ", ".join(f"{scheme}://BUCKET/PATH" for scheme in _STORES)
        raise refuse(
            "store", store, f"every node has to find it: {allowed}, or an absolute path that all of them share"
        )


def resume_command(run: str, store: str) -> str:
    """What runs inside a cluster, at the first start and at every retry: they are the same.

    The run was written down before (``dlm plan --freeze``); a coordinator that dies is started again in place.
    """
    if not _RUN.fullmatch(run):
        raise refuse("run", run, "letters, digits, '.', '_' and '-' are allowed, from a letter or digit on")
    check_store(store)
    return shlex.join(["python", "-m", "workflows.supervise", run, "--store", store, "--address", "auto"])


def node_env(shape: ClusterShape) -> dict[str, str]:
    """The environment of every node; nothing in it is secret.

    ``python -m`` takes what is installed, not what lies in the directory that it is called in; a job that was submitted
    has its code on PYTHONPATH.
    """
    return {
        **AUTH_MODE,
        "PYTHONSAFEPATH": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S),
        "RAY_USAGE_STATS_ENABLED": "0",
        "DLM_STORE": shape.store,
    }


def node_labels(shape: ClusterShape, group: WorkerGroup | None = None) -> dict[str, str]:
    """Ray labels of the nodes of a group, or of the head."""
    if group is None:
        return STABLE | shape.labels
    kind = {GPU_LABEL: group.gpu_kind} if group.gpu_kind else {}
    return ({} if group.is_spot else STABLE) | kind | shape.labels | group.labels


def shm_gb(shape: ClusterShape, node: Head | WorkerGroup) -> float:
    """Shared memory of a node."""
    return shape.shm_gb if shape.shm_gb is not None else round(node.memory_gb / 3, 1)
