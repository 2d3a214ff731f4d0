"""What a run was submitted with besides its settings: the code, the state of git, the command, who gave it.

The code lies in the store once, as ``code/<sha256>.zip``; a run names it.  No secret is written down.
"""

import getpass
import hashlib
import importlib.util
import io
import os
import re
import socket
import subprocess
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster.auth import redacted, secret_values
from pipeline.config import flatten
from pipeline.errors import UserError
from workflows.plan import Plan
from workflows.store import Store

OWN_PACKAGES = ("cluster", "dlm_core", "pipeline", "workflows")
_AT_MOST_BYTES = 100_000_000
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of every file in a snapshot, so that the same code gives the same bytes."""
_GIT_S = 10.0
_SECRET_NAME = re.compile(
    r"passw(or)?d|secret|credential|(api|access|auth|private|bearer|hub|hf)_?(token|key)", re.IGNORECASE
)
_USER_IN_URL = re.compile(r"://[^/\s:@]*:[^/\s@]+@")


def packages_of(plan: Plan) -> tuple[str, ...]:
    """Top-level packages that a plan needs: ours, those of its stages and that of a recipe by import path."""
    recipe = [plan.recipe.partition(":")[0]] if ":" in plan.recipe else []
    others = [step.stage for step in plan.steps] + recipe
    return tuple(sorted({*OWN_PACKAGES, *(name.partition(".")[0] for name in others)}))


def _files(package: str) -> Iterator[tuple[str, Path]]:
    """Path in the snapshot -> file, of a package or of a module that is a file by itself."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"package {package} is not there any more; put the folder that holds it on PYTHONPATH")
    if spec.submodule_search_locations is None:
        if spec.origin is not None and Path(spec.origin).is_file():
            yield Path(spec.origin).name, Path(spec.origin)
        return
    for location in spec.submodule_search_locations:
        root = Path(location)
        for path in root.rglob("*"):
            parts = path.relative_to(root).parts
            is_made = any(part.startswith(".") or part == "__pycache__" for part in parts)
            if path.is_file() and not is_made:
                yield Path(package, *parts).as_posix(), path


@cache
def code_zip(packages: tuple[str, ...]) -> bytes:
    """The files of packages as a zip whose bytes follow from them alone: sorted, not compressed, without times."""
    found = dict(pair for package in packages for pair in _files(package))
    size_bytes = sum(path.stat().st_size for path in found.values())
    if size_bytes > _AT_MOST_BYTES:
        raise UserError(
            f"the packages {', '.join(packages)} hold {size_bytes:,} bytes, more than {_AT_MOST_BYTES:,}: a run keeps "
            "a copy of its code. Move data out of them"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, path in sorted(found.items()):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, path.read_bytes())
    return buffer.getvalue()


@cache
def code_digest(packages: tuple[str, ...]) -> str:
    """SHA-256 of the snapshot of packages, as they are on this machine."""
    return hashlib.sha256(code_zip(packages)).hexdigest()


def store_code(store: Store, packages: tuple[str, ...]) -> str:
    """Put the snapshot of packages into the store, unless it is there, and return its SHA-256."""
    digest = code_digest(packages)
    place = store.root / "code" / f"{digest}.zip"
    if not place.exists():
        place.create(code_zip(packages))
    return digest


def _git(*arguments: str) -> bytes:
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, *arguments]
    return subprocess.run(command, env=env, capture_output=True, check=True, timeout=_GIT_S).stdout


@cache
def git_state() -> dict[str, Any] | None:
    """Commit, branch and changes of the checkout that this code is; None where it is none, or git does not answer."""
    try:
        if not _git("ls-files", "--", Path(__file__).name):
            return None  # installed within somebody's checkout
        lines = _git("status", "--porcelain=v2", "--branch").decode(errors="replace").splitlines()
        parts = [line.split(" ", 2) for line in lines if line.startswith("# ")]
        header = {name: value for _, name, value in parts}
        is_dirty = any(not line.startswith("# ") for line in lines)
        changes = _git("diff", "--binary", "HEAD") if is_dirty else b""
    except (OSError, subprocess.SubprocessError):
        return None
    return {
        "commit": header.get("branch.oid", ""),
        "branch": header.get("branch.head", ""),
        "is_dirty": is_dirty,
        "diff_sha256": hashlib.sha256(changes).hexdigest() if is_dirty else "",
    }


def user() -> str:
    """Who runs this, and on which machine."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())  # a number without a name, as in a container
    return f"{name}@{socket.gethostname()}"


def version() -> str:
    """Of dlm; "absent" where it is not installed."""
    try:
        return metadata.version("dlm")
    except metadata.PackageNotFoundError:
        return "absent"


def code_archive(plan: Plan, folder: Path) -> Path:
    """The code that a plan needs as a file of this machine, for a job that runs it elsewhere."""
    target = folder / "code.zip"
    target.write_bytes(code_zip(packages_of(plan)))
    return target


def origin(store: Store, plan: Plan, command: Sequence[str]) -> dict[str, Any]:
    """What is written down beside a plan that is frozen; the code is put into the store."""
    packages = packages_of(plan)
    return {
        "command": shown_command(command),
        "user": user(),
        "dlm": version(),
        "code": {"sha256": store_code(store, packages), "packages": list(packages)},
        "git": git_state(),
    }


def shown_command(words: Iterable[str]) -> list[str]:
    """A command as it may be shown: without secrets."""
    secrets = secret_values()
    return [_USER_IN_URL.sub("://***@", redacted(word, secrets)) for word in words]


def refuse_secrets(plan: Plan) -> None:
    """UserError for a setting that is or holds a secret: plans are kept, shown and copied."""
    secrets = secret_values()
    for step in plan.steps:
        for path, value in flatten(step.config).items():
            text = value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else ""  # pyright: ignore
            is_named = bool(text) and _SECRET_NAME.search(path.rpartition(".")[2]) is not None
            if is_named or _USER_IN_URL.search(text) or redacted(text, secrets) != text:
                raise UserError(
                    f"{step.name}.{path} holds a secret, and settings are written to the store: leave it out, and give "
                    "it in the environment of the process that needs it"
                )
