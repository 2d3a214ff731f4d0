"""Which checkpoint of another project is taken, and how its conversion is proved."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from pipeline.artifact import file_sha256
from pipeline.config import execution
from pipeline.errors import NotGivenError, UserError
from pipeline.import_checkpoint.source import HUB_PREFIX, files_read, find_source, license_of
from pipeline.stage import Stage

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")


def _place(value: Any) -> Any:
    """A local path made absolute, so that a plan means the same from anywhere; a name on the hub as it is."""
    if not isinstance(value, str) or not value:
        return value
    if not value.startswith(HUB_PREFIX):
        return str(place_of_file(Path(value).expanduser()))
    if not _HUB_NAME.fullmatch(value.removeprefix(HUB_PREFIX)):
        raise ValueError(
            f"{value!r} names no commit on the hub; write {HUB_PREFIX}OWNER/NAME@COMMIT with the 40 hexadecimal digits "
            "of the commit: a branch moves on, and the plan cannot see it"
        )
    return value


def place_of_file(path: Path) -> Path:
    """A path from anywhere, through every link but itself: in the hub's cache it is one to a file without suffix."""
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


@dataclass(frozen=True)
class ImportConfig:
    """A checkpoint as other projects keep it: safetensors and a config.json, or a GGUF file."""

    path: Annotated[str, BeforeValidator(_place)] = execution("")
    """A directory, a .gguf file, or "hf:OWNER/NAME@COMMIT" on the Hugging Face hub.  Identified by ``external_data``.
    Empty: it is to be given before a run."""
    gguf_file: str = execution("")
    """Name of the .gguf file to take, where ``path`` holds more than that."""
    name: str = ""
    """What the lineage calls it; by default its name on the hub, and nothing for local files."""
    proof: Literal["logits", "tensors"] = execution("logits")
    """What is compared before the weights are committed.  tensors: every number on the disk with those of the source.
    logits: these too, and in a process of its own the logits of transformers' model with those of what was written;
    it holds one of them at a time, in float32."""


def external_data(config: ImportConfig) -> Any:
    """What identifies the checkpoint: its commit on the hub, or the SHA-256 of the files that are read."""
    if not config.path:
        return None
    if config.path.startswith(HUB_PREFIX):
        return {"hub": config.path.removeprefix(HUB_PREFIX), "gguf_file": config.gguf_file}
    path = Path(config.path)
    if gguf := gguf_path(config, path):
        return {"files": {gguf.name: file_sha256(gguf)}}
    source = find_source(path)
    files = {file.name: file_sha256(file) for file in files_read(source)}
    return {"files": files, "license": license_of(path)}


def gguf_path(config: ImportConfig, path: Path) -> Path | None:
    """The .gguf file that is asked for, if one is; UserError if it is not there."""
    if path.suffix == ".gguf" and config.gguf_file:
        raise UserError(
            f"import_checkpoint.gguf_file is {config.gguf_file!r}, but path names {path} already; leave one of them out"
        )
    file = path / config.gguf_file if config.gguf_file else path
    if file.suffix != ".gguf":
        if config.gguf_file:
            raise UserError(f"import_checkpoint.gguf_file is {config.gguf_file!r}; the name of a .gguf file is wanted")
        return None
    if not file.is_file():
        raise UserError(f"import_checkpoint: there is no file {file}")
    return file


def check_ready(config: ImportConfig, step: str) -> None:
    """NotGivenError if there is no checkpoint yet: a plan can be looked at without, but not run."""
    if not config.path:
        raise NotGivenError(
            f"{step}.path is empty: the checkpoint does not come with the recipe. Give a directory, a .gguf file, or "
            f"--set {step}.path={HUB_PREFIX}OWNER/NAME@COMMIT"
        )


STAGE = Stage(
    name="import_checkpoint",
    kind="task",
    config=ImportConfig,
    module="pipeline.import_checkpoint.run",
    code_version=3,
    external="pipeline.import_checkpoint.config:external_data",
    ready=check_ready,
)
