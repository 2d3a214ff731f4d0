"""What a machine has to offer to a run, looked at before one begins: packages, GPUs, memory, disk, limits, the token.

Each check says what was found and, where something is amiss, what to do.  Nothing is left behind.
"""

import json
import os
import platform
import resource
import secrets
import shutil
import stat
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil

from cluster.auth import AuthError, find_token, is_loopback, redacted, secret_values
from cluster.gpus import GpusFound, find_gpus

Status = Literal["ok", "warning", "failure"]
GIB, MIB = 2**30, 2**20
PYTHON = ">=3.11"
PACKAGES = {
    "torch": ">=2.10",
    "einops": "",
    "fsspec": "",
    "jaxtyping": "",
    "numpy": "",
    "packaging": "",
    "psutil": "",
    "pyarrow": ">=14.0.1",
    "pydantic": ">=2.10",
    "rich": "",
    "safetensors": "",
    "tokenizers": ">=0.22",
    "typer": "",
}
"""What everything needs, and which versions; as in pyproject.toml, which is not where the code was shipped to."""
EXTRAS = {
    "deepspeed": ("train", ">=0.19.8,<0.20"),
    "ray": ("cluster", ">=2.58,<2.61"),
    "wandb": ("track", ">=0.31"),
    "datasets": ("hub", ">=3.2"),
    "transformers": ("hf", ">=4.57"),
    "huggingface_hub": ("hf", ""),
    "gguf": ("hf", ">=0.19"),
    "accelerate": ("hf", ""),
    "gigatoken": ("fast", ">=0.10,<0.11"),
    "lm_eval": ("eval", "==0.4.13"),
}
_WANTED_EXTRAS = {"deepspeed": "nothing can be trained here", "ray": "only --executor local works here"}
_MUST_AGREE = ("python", "torch", "deepspeed", "ray")
"""Ranks of a gang, or nodes of a Ray, do not understand each other if these differ."""
_TOLD = ("torch", "deepspeed", "ray", "pyarrow")

_FULL_BYTES, _LOW_BYTES = 1 * GIB, 10 * GIB
_WRITE_BYTES = 64 * MIB
_SLOW_BYTES_PER_S = 50 * MIB
_LITTLE_MEMORY_BYTES = 4 * GIB
_LITTLE_SHM_BYTES = 1 * GIB
_FEW_FILES = 4096
_ANSWER_S = 3.0


@dataclass(frozen=True)
class Check:
    """One thing that was looked at on one node."""

    name: str
    node: str
    status: Status
    found: str
    todo: str = ""


@dataclass(frozen=True)
class Survey:
    """What a machine told about itself."""

    checks: tuple[Check, ...]
    versions: dict[str, str]
    """Of Python and of the packages that are there."""


def survey(node: str, folders: Mapping[str, Path], is_in_cluster: bool) -> Survey:
    """Look at this machine; ``folders`` are those whose disks matter, by what they are for."""
    versions = installed()
    checks = [
        *package_checks(node, versions),
        *gpu_checks(node, find_gpus()),
        memory_check(node),
        *disk_checks(node, folders),
        shm_check(node),
        files_check(node, resource.getrlimit(resource.RLIMIT_NOFILE)),
        token_check(node, is_in_cluster),
    ]
    return Survey(without_secrets(checks), versions)


def without_secrets(checks: Iterable[Check]) -> tuple[Check, ...]:
    """The checks as they may be shown: an error of a library may quote what it was given."""
    hidden = secret_values()
    return tuple(
        replace(check, found=redacted(check.found, hidden), todo=redacted(check.todo, hidden)) for check in checks
    )


# --- packages ---------------------------------------------------------------------------------------------------------


def installed() -> dict[str, str]:
    """Versions of Python and of our packages on this machine."""
    found = {"python": platform.python_version()}
    for name in [*PACKAGES, *EXTRAS]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def package_checks(node: str, versions: Mapping[str, str]) -> list[Check]:
    """What is missing or of a wrong version, and a line about the rest."""
    from packaging.specifiers import SpecifierSet

    def is_allowed(name: str, bounds: str) -> bool:
        return SpecifierSet(bounds).contains(versions[name], prereleases=True)

    def wrong(name: str, bounds: str, status: Status, install: str) -> Check:
        return Check("packages", node, status, f"{name} {versions[name]}, allowed is {bounds}", install)

    checks: list[Check] = []
    if not is_allowed("python", PYTHON):
        checks.append(wrong("python", PYTHON, "failure", "use another interpreter"))
    for name, bounds in PACKAGES.items():
        if name not in versions:
            checks.append(Check("packages", node, "failure", f"{name} is not installed", "pip install dlm"))
        elif not is_allowed(name, bounds):
            checks.append(wrong(name, bounds, "failure", f"pip install '{name}{bounds}'"))
    for name, (extra, bounds) in EXTRAS.items():
        if name in versions and not is_allowed(name, bounds):
            status: Status = "failure" if name in _WANTED_EXTRAS else "warning"
            checks.append(wrong(name, bounds, status, f"pip install 'dlm[{extra}]'"))
        elif name not in versions and name in _WANTED_EXTRAS:
            found = f"{name} is not installed: {_WANTED_EXTRAS[name]}"
            checks.append(Check("packages", node, "warning", found, f"pip install 'dlm[{extra}]'"))
    if not checks:
        told = ", ".join(f"{name} {versions[name]}" for name in _TOLD if name in versions)
        others = len([name for name in versions if name not in (*_TOLD, "python")])
        checks.append(Check("packages", node, "ok", f"Python {versions['python']}, {told} and {others} others"))
    return checks


def agreement_checks(versions: Mapping[str, Mapping[str, str]]) -> list[Check]:
    """Versions that are not the same on all nodes, by node."""
    checks: list[Check] = []
    for name in ["python", *PACKAGES, *EXTRAS]:
        nodes: dict[str, list[str]] = {}
        for node, found in versions.items():
            nodes.setdefault(found.get(name, "none"), []).append(node)
        if len(nodes) > 1:
            status: Status = "failure" if name in _MUST_AGREE else "warning"
            told = "; ".join(f"{number} on {', '.join(who)}" for number, who in sorted(nodes.items()))
            todo = "use one image, or one environment, for all nodes (cluster/manifests/Dockerfile)"
            checks.append(Check("same versions", "all", status, f"{name}: {told}", todo))
    if not checks and len(versions) > 1:
        checks.append(Check("same versions", "all", "ok", f"the same packages on {len(versions)} nodes"))
    return checks


# --- the machine ------------------------------------------------------------------------------------------------------


def gpu_checks(node: str, found: GpusFound) -> list[Check]:
    """One check a kind of GPU, and one for each that torch cannot use."""
    if found.listing_error:
        todo = "mend the driver; in a container, start it with --gpus all and the NVIDIA container toolkit"
        return [Check("gpu", node, "failure", f"the driver does not list its GPUs: {found.listing_error}", todo)]
    if not found.listed:
        return [Check("gpu", node, "ok", "none")]
    if not found.cuda and not found.torch_error:
        told = f"{len(found.listed)} GPUs, and torch {found.torch_build} is a build without CUDA"
        return [Check("gpu", node, "failure", told, "install torch from https://download.pytorch.org/whl/cu130")]
    todo = f"install a torch for driver {found.listed[0].driver}, or a newer driver"
    if found.torch_error or not found.usable:
        error = found.torch_error or "it lists no device"
        return [Check("gpu", node, "failure", f"torch can use none of {len(found.listed)} GPUs: {error}", todo)]
    checks = [
        Check("gpu", node, "failure", f"torch cannot use {gpu.name}: {gpu.error}", todo)
        for gpu in found.usable
        if gpu.error
    ]
    divided = sum(gpu.has_mig for gpu in found.listed)
    if divided:
        told = f"{divided} of {len(found.listed)} GPUs are divided (MIG): torch sees one instance, and NCCL joins none"
        checks.append(Check("gpu", node, "warning", told, "nvidia-smi -mig 0 for trainings by several workers"))
    elif len(found.usable) != len(found.listed):
        told = f"the driver lists {len(found.listed)} GPUs, torch {len(found.usable)}"
        checks.append(Check("gpu", node, "warning", told, "look at CUDA_VISIBLE_DEVICES and what the scheduler gave"))
    kinds = sorted({(gpu.name, gpu.memory_mib, gpu.driver) for gpu in found.listed})
    for name, memory_mib, driver in kinds:
        count = sum((gpu.name, gpu.memory_mib, gpu.driver) == (name, memory_mib, driver) for gpu in found.listed)
        told = f"{count} x {name}, {memory_mib / 1024:.0f} GiB, driver {driver}, CUDA {found.cuda} in torch"
        checks.append(Check("gpu", node, "ok", told))
    return checks


def _limit(file: str) -> int | None:
    """A limit of the container that this process is in."""
    path = Path("/sys/fs/cgroup") / file
    text = path.read_text().split()[0] if path.exists() else "max"
    return int(text) if text.isdigit() else None


def memory_check(node: str) -> Check:
    """Cores and memory, of the container where there is one."""
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory()
    total = min(memory.total, _limit("memory.max") or memory.total)
    free = min(memory.available, total)
    told = f"{cores} cores, {total / GIB:.3g} GiB of memory, {free / GIB:.3g} free"
    if free < _LITTLE_MEMORY_BYTES:
        todo = "end what uses it, or give the container more: a worker holds the whole model in float32"
        return Check("memory", node, "warning", told, todo)
    return Check("memory", node, "ok", told)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def disk_checks(node: str, folders: Mapping[str, Path]) -> list[Check]:
    """Free space and speed of the disks under folders, each disk once."""
    used_for: dict[int, list[str]] = {}
    paths: dict[int, Path] = {}
    for purpose, folder in folders.items():
        path = existing(folder)
        device = path.stat().st_dev
        used_for.setdefault(device, []).append(purpose)
        paths.setdefault(device, path)
    return [disk_check(node, ", ".join(used_for[device]), path) for device, path in paths.items()]


def disk_check(node: str, purpose: str, folder: Path) -> Check:
    """Free space and the speed of writing with fsync."""
    free = shutil.disk_usage(folder).free
    told = f"{purpose}: {free / GIB:.3g} GiB free in {folder}"
    todo = "make room, or put it elsewhere (--store, DLM_CACHE, TMPDIR)"
    if free < _FULL_BYTES:
        return Check("disk", node, "failure", told, todo)
    try:
        speed = write_speed(folder)
    except OSError as error:
        return Check("disk", node, "failure", f"{told}; cannot be written: {error.strerror}", todo)
    told += f", {speed / 1e6:.0f} MB/s with fsync"
    if free < _LOW_BYTES:
        return Check("disk", node, "warning", told, todo)
    if speed < _SLOW_BYTES_PER_S:
        return Check("disk", node, "warning", told, "checkpoints will take long: use a faster disk, or fewer of them")
    return Check("disk", node, "ok", told)


def write_speed(folder: Path) -> float:
    """Bytes a second that reach the disk of a folder."""
    block = os.urandom(MIB)
    with tempfile.TemporaryFile(dir=folder) as file:
        start_s = time.perf_counter()
        for _ in range(_WRITE_BYTES // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _WRITE_BYTES / (time.perf_counter() - start_s)


def shm_check(node: str, folder: Path = Path("/dev/shm")) -> Check:
    """Shared memory, which Ray keeps objects in, and NCCL and loaders what they exchange."""
    size = shutil.disk_usage(folder).total if folder.is_dir() else 0
    told = f"{size / GIB:.3g} GiB in {folder}"
    if size < _LITTLE_SHM_BYTES:
        todo = "docker run --shm-size=8g, or shm_gb in the shape of the cluster"
        return Check("shared memory", node, "warning", told, todo)
    return Check("shared memory", node, "ok", told)


def files_check(node: str, limits: tuple[int, int]) -> Check:
    """How many files a process may have open."""
    soft, hard = (value if value != resource.RLIM_INFINITY else sys.maxsize for value in limits)
    if soft < _FEW_FILES:
        upper = "no upper limit" if hard == sys.maxsize else f"at most {hard}"
        return Check("open files", node, "warning", f"{soft}, {upper}", "ulimit -n 65536 before Ray or dlm is started")
    return Check("open files", node, "ok", "no limit" if soft == sys.maxsize else f"{soft}")


# --- the token --------------------------------------------------------------------------------------------------------


def token_check(node: str, is_in_cluster: bool, env: Mapping[str, str] = os.environ) -> Check:
    """Where the token of Ray is found and who may read it."""
    try:
        token = find_token(env)
    except AuthError as error:
        status: Status = "failure" if is_in_cluster else "warning"
        return Check("token", node, status, "there is one that is not taken", str(error))
    if token is None and is_in_cluster:
        todo = "start the cluster with RAY_AUTH_MODE=token and a token: (umask 077 && ray get-auth-token --generate)"
        return Check("token", node, "warning", "none: this cluster asks nobody who it is", todo)
    if token is None:
        return Check("token", node, "ok", "none, and none is needed before there is a cluster of other machines")
    file = Path(token.source)
    mode = f", mode {stat.S_IMODE(file.stat().st_mode):04o}" if file.is_file() else ""
    return Check("token", node, "ok", f"in {token.source}{mode}")


def admission_check(node: str, address: str) -> Check:
    """Whether the cluster whose GCS is at an address lets in who has no token, or another one."""
    answers = {"no token": knock(address), "a wrong token": knock(address, secrets.token_hex(16))}
    if let_in := [who for who, answer in answers.items() if answer == "lets in"]:
        todo = "anybody who reaches it runs what he likes: start the cluster with RAY_AUTH_MODE=token and a token"
        status: Status = "warning" if is_loopback(address) else "failure"
        return Check("admission", node, status, f"{address} lets in who has {' or '.join(let_in)}", todo)
    if others := {answer for answer in answers.values() if answer != "refuses"}:
        todo = "look at gcs_server.out in the logs of the head"
        return Check("admission", node, "warning", f"{address} was asked without its token: {min(others)}", todo)
    return Check("admission", node, "ok", f"{address} refuses who has {' or '.join(answers)}")


def knock(address: str, token: str = "") -> str:
    """What the GCS of a cluster says to somebody with a token, or without one: "lets in", "refuses" or an error."""
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    messages: Any = gcs_service_pb2  # protobuf makes its classes at run time
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address) as channel:
        service = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            service.GetAllNodeInfo(messages.GetAllNodeInfoRequest(), timeout=_ANSWER_S, metadata=metadata)
        except grpc.RpcError as error:
            return "refuses" if error.code() is grpc.StatusCode.UNAUTHENTICATED else f"answers {error.code().name}"
    return "lets in"


def listening_hosts(port: int) -> list[str]:
    """Addresses of this machine on which somebody listens at a port."""
    return sorted(
        {
            found.laddr.ip
            for found in psutil.net_connections("tcp")
            if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port
        }
    )


def dashboard_check(node: str, hosts: Sequence[str], port: int) -> Check:
    """Whether a dashboard that others reach takes jobs from anybody."""
    open_hosts = [host for host in hosts if not is_loopback(f"[{host}]" if ":" in host else host)]
    if not hosts:
        return Check("dashboard", node, "ok", f"nobody listens at port {port} of this machine")
    if not open_hosts:
        return Check("dashboard", node, "ok", f"at {hosts[0]}:{port}, for this machine alone")
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(open_hosts[0], open_hosts[0])
    answer = _asked_without_token(f"http://{host}:{port}/api/jobs/")
    told = f"listens on {open_hosts[0]}:{port}"
    if answer == "takes it":
        todo = "anybody who reaches it runs what he likes: restart Ray with RAY_AUTH_MODE=token, on 127.0.0.1"
        return Check("dashboard", node, "failure", f"{told} and asks for no token", todo)
    return Check("dashboard", node, "ok", f"{told} and {answer}")


def _asked_without_token(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_ANSWER_S) as response:
            return "takes it" if isinstance(json.loads(response.read()), list) else "is no dashboard of Ray"
    except urllib.error.HTTPError as error:
        return "asks for a token" if error.code in (401, 403) else f"answers {error.code}"
    except ValueError:
        return "is no dashboard of Ray"
    except OSError as error:
        return f"does not answer ({error})"
