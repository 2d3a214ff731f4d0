"""``python -m cluster.manifests KIND``: prints a file for a cluster, made from flags or from one JSON file."""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests.kuberay import ray_cluster, ray_job
from cluster.manifests.launcher import launcher_file
from cluster.manifests.request import Request, make_request, read_request
from cluster.manifests.slurm import slurm_script

DOCKERFILE = Path(__file__).parent / "Dockerfile"
KINDS = {
    "dockerfile": "the image of every node",
    "kuberay": "a RayCluster of KubeRay, for dlm submit",
    "rayjob": "a RayJob of KubeRay that resumes a run, at every retry too",
    "launcher": "a file for ray up",
    "slurm": "a script for sbatch that resumes a run, requeued too",
}
_GROUP = {
    "workers": ("count", int, "nodes of the group"),
    "min-workers": ("min_count", int, "fewest nodes of an elastic group"),
    "max-workers": ("max_count", int, "most nodes of an elastic group"),
    "cpus": ("cpus", int, "cores of a node"),
    "gpus": ("gpus", int, "GPUs of a node"),
    "gpu-kind": ("gpu_kind", str, "kind of GPU, as the platform names it"),
    "memory-gb": ("memory_gb", float, "memory of a node"),
}
_SHAPE = {"name": "name of the cluster", "store": "where runs live", "image": "registry/name:tag"}
_PLATFORM = {
    "kubernetes": ("namespace", "platform", "token_secret", "env_secret", "store_claim", "service_account"),
    "launcher": (
        "provider", "ssh_user", "ssh_private_key", "token_path", "head_ip", "region", "head_instance",
        "instance_profile",
    ),
    "slurm": ("environment", "token_path", "partition", "account", "time_limit"),
}  # fmt: skip
_SECTION_OF = {"kuberay": "kubernetes", "rayjob": "kubernetes", "launcher": "launcher", "slurm": "slurm"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.manifests", description=__doc__, allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, what in KINDS.items():
        flags = kinds.add_parser(kind, help=what, description=what, allow_abbrev=False)
        flags.add_argument("--out", type=Path, help="write this file instead of printing")
        if kind == "dockerfile":
            continue
        if kind in ("rayjob", "slurm"):
            flags.add_argument("--run", required=True, help="the run that is resumed")
        flags.add_argument("--json", type=Path, help="the whole request (shape, kubernetes, launcher, slurm)")
        for name, what_for in _SHAPE.items():
            flags.add_argument(f"--{name}", dest=f"shape.{name}", default=argparse.SUPPRESS, help=what_for)
        for name, (field, type_, what_for) in _GROUP.items():
            flags.add_argument(f"--{name}", dest=f"group.{field}", type=type_, default=argparse.SUPPRESS, help=what_for)
        flags.add_argument("--spot", dest="group.is_spot", action="store_true", default=argparse.SUPPRESS)
        section = _SECTION_OF[kind]
        for name in _PLATFORM[section]:
            flags.add_argument(f"--{name.replace('_', '-')}", dest=f"{section}.{name}", default=argparse.SUPPRESS)
        if kind == "launcher":
            flags.add_argument("--instance", dest="instance", default=argparse.SUPPRESS, help="type of the workers")
            flags.add_argument("--worker-ip", dest="launcher.worker_ips", action="append", default=argparse.SUPPRESS)
    return parser


def _request(flags: dict[str, Any], file: Path | None) -> Request:
    """The request of a JSON file, or of flags: one group of workers, called ``workers``."""
    if file is not None:
        if flags:
            name = next(iter(flags)).rpartition(".")[2].replace("_", "-")
            raise ValueError(f"--json holds the whole request, and {name} is given by a flag too: write it into {file}")
        if not file.is_file():
            raise ValueError(f"--json is {file}, which is no file")
        return read_request(file.read_text(encoding="utf-8"))
    values: dict[str, Any] = {"shape": {}}
    for path, value in flags.items():
        section, _, name = path.rpartition(".")
        if section and section != "group":
            values.setdefault(section, {})[name] = value
    group = {path.partition(".")[2]: value for path, value in flags.items() if path.startswith("group.")}
    if group:
        values["shape"]["workers"] = [{"name": "workers", **group}]
    if "instance" in flags:
        values.setdefault("launcher", {})["instances"] = {"workers": flags["instance"]}
    return make_request(values)


def _section(request: Request, name: str) -> Any:
    section = getattr(request, name)
    if section is None:
        raise ValueError(f"{name} is missing: this platform has to know more than the shape")
    return section


def _render(kind: str, request: Request, run: str) -> str:
    shape = request.shape
    if kind == "slurm":
        return slurm_script(shape, _section(request, "slurm"), run)
    if kind == "launcher":
        made = launcher_file(shape, _section(request, "launcher"))
    elif kind == "rayjob":
        made = ray_job(shape, request.kubernetes, run)
    else:
        made = ray_cluster(shape, request.kubernetes)
    return _before(kind, shape.store, run) + yaml.safe_dump(made, sort_keys=False, width=120)


def _before(kind: str, store: str, run: str) -> str:
    """A comment with what has to be done before."""
    if kind != "rayjob":
        return ""
    return (
        f"# First, with the store and the data as the nodes see them: dlm plan RECIPE --freeze {run} --store {store}\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print or write the file; 2 with a message if what was asked for cannot be."""
    flags = vars(_parser().parse_args(arguments))
    kind, out, file, run = (flags.pop(name, None) for name in ("kind", "out", "json", "run"))
    try:
        text = (
            DOCKERFILE.read_text(encoding="utf-8")
            if kind == "dockerfile"
            else _render(kind, _request(flags, file), run)
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
