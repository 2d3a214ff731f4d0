"""The files of a checkpoint in another project's layout: which are read, and which never are.

Read are JSON, safetensors and, as data that is passed on, the files of the tokenizer.  Code beside them (*.py) and
pickles (*.bin, *.pt, *.pth) are never opened.  Of an export of this project every file that is read is held against its
manifest.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifact import MANIFEST, Manifest
from pipeline.errors import CorruptionError, UserError
from pipeline.hf_config import CONFIG, GENERATION, read_object
from pipeline.hf_directory import check_exported, export_manifest
from pipeline.tensor_files import TensorFiles

HUB_PREFIX = "hf:"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER = "tokenizer.json"
PASSED_ON = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", GENERATION)
_TEMPLATE_SUFFIXES = (".json", ".jinja")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_README_LINES = 100
_LICENSE = re.compile(r"""license:\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^\s'"#](?:[^#]|(?<!\s)#)*)\s*(?:#.*)?""")
"""A line of YAML with a text in it: quoted as JSON is, in single quotes, or plain up to a comment."""


@dataclass(frozen=True)
class SourceFiles:
    """A directory whose files fit together by their names."""

    directory: Path
    weights: tuple[Path, ...]
    index: Mapping[str, str] | None
    """File name of every tensor, where there are several files."""
    passed_on: tuple[Path, ...]
    """Of the tokenizer and of generation: copied as they are."""
    manifest: Manifest | None = None
    """Of an export of this project."""


def find_source(directory: Path) -> SourceFiles:
    """The files of a checkpoint; UserError naming what is missing, nothing of it being loaded yet."""
    if not directory.is_dir():
        raise UserError(f"import_checkpoint.path: there is no directory {directory}")
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory} has no {CONFIG}; it is no checkpoint in the layout of transformers")
    passed_on = [directory / name for name in PASSED_ON if (directory / name).is_file()]
    templates = sorted(directory.glob("chat_template*"))
    passed_on += [path for path in templates if path.suffix in _TEMPLATE_SUFFIXES and path.is_file()]
    weights, index = _weights(directory)
    return SourceFiles(directory, tuple(weights), index, tuple(passed_on), export_manifest(directory))


def _weights(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    found = sorted(path for path in directory.glob("*.safetensors") if path.is_file())
    if (directory / INDEX).is_file():
        index = read_index(directory / INDEX)
        weights = [directory / name for name in sorted(set(index.values()))]
        if missing := [path.name for path in weights if not path.is_file()]:
            raise UserError(f"{directory} lacks {', '.join(missing)}, which {INDEX} names; get the whole checkpoint")
        if (directory / SINGLE).is_file() and directory / SINGLE not in weights:
            raise UserError(
                f"{directory} has {SINGLE} and an {INDEX} that names other files; take out the one that is not meant"
            )
        return weights, index
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], None
    if len(found) == 1:
        return found, None
    if found:
        raise UserError(
            f"{directory} has {len(found)} safetensors files and no {INDEX} that says which belong together; get the "
            "whole checkpoint"
        )
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise UserError(
            f"{directory} has its weights in {pickles[0]}, a pickle: loading one runs code, so it is never loaded. "
            "Convert it to safetensors with the tools of its project"
        )
    raise UserError(f"{directory} has no *.safetensors; there are no weights to import")


def read_index(path: Path) -> dict[str, str]:
    """File name of every tensor; CorruptionError unless it is a table of plain names."""
    index = read_object(path).get("weight_map")
    match index:
        case dict() if index and all(isinstance(name, str) for name in index.values()):
            if any(Path(name).name != name or not name.endswith(".safetensors") for name in index.values()):
                raise CorruptionError(f"{path}: weight_map names files that are no *.safetensors beside it")
            return index
        case _:
            raise CorruptionError(f"{path} has no weight_map from tensors to files")


def check_index(source: SourceFiles, files: TensorFiles) -> None:
    """CorruptionError unless every file holds just the tensors that the index looks for in it."""
    if source.index is None:
        return
    for name in sorted({*source.index, *files.names}):
        promised = source.index.get(name)
        found = files.path(name).name if name in files.names else None
        if promised != found:
            raise CorruptionError(
                f"{source.directory}: {INDEX} has {name} in {promised or 'no file'}, but it is in {found or 'none'}; "
                "the files are of different checkpoints, or damaged"
            )


def files_read(source: SourceFiles) -> list[Path]:
    """Every file that has a part in the result."""
    index = [source.directory / INDEX] if source.index is not None else []
    manifest = [source.directory / MANIFEST] if source.manifest is not None else []
    return [source.directory / CONFIG, *index, *source.weights, *source.passed_on, *manifest]


def check_files(source: SourceFiles) -> None:
    """CorruptionError unless the files of an export of this project have the bytes that were proved."""
    if source.manifest is None:
        return
    for path in files_read(source):
        if path.name != MANIFEST:
            check_exported(path, source.manifest)


def license_of(directory: Path) -> str | None:
    """The licence that a model card names in its head, if there is one."""
    card = directory / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:_MAX_README_LINES]
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            return None
        if match := _LICENSE.fullmatch(line.rstrip()):
            return _unquoted(match[1])
    return None


def _unquoted(text: str) -> str | None:
    if text.startswith("'"):
        return text[1:-1].replace("''", "'")
    try:
        return str(json.loads(text)) if text.startswith('"') else text.rstrip()
    except ValueError:  # an escape that JSON hasn't
        return None
