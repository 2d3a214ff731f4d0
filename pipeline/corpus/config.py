"""Where the text comes from and how it is split."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from pipeline.artifact import file_sha256
from pipeline.config import execution
from pipeline.errors import UserError
from pipeline.stage import Stage

STDLIB = "stdlib"
HUB_PREFIX = "hf:"
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def _sources(value: Any) -> Any:
    """A single source as a tuple of one; paths made absolute, so that a plan means the same from anywhere."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, tuple | list):
        return items
    return tuple(_absolute(item) if isinstance(item, str) else item for item in items)


def _absolute(item: str) -> str:
    if not item.strip():
        raise ValueError("an entry is empty; name a file, a folder, a glob or a dataset")
    is_path = item != STDLIB and not item.startswith(HUB_PREFIX)
    return os.path.abspath(os.path.expanduser(item)) if is_path else item


@dataclass(frozen=True)
class CorpusConfig:
    """Text in, documents out, a few of them held out for evaluation."""

    source: Annotated[tuple[str, ...], BeforeValidator(_sources)] = execution((STDLIB,))
    """Files, folders or globs of .txt .md .py .jsonl(.gz/.zst) .parquet; "stdlib", the sources of Python's own
    standard library; or "hf:NAME", "hf:NAME:SUBSET", any name that datasets.load_dataset takes."""
    text_field: str = "text"
    """Field with the text, in .jsonl, .parquet and datasets."""
    hub_split: str = "train"
    hub_revision: str = ""
    """Commit of the dataset on the hub; pin it to make the corpus reproducible."""
    undecodable: Literal["strict", "replace", "skip"] = "strict"
    """What happens to a document that is not UTF-8: stop, replace the bad bytes, or leave it out."""
    max_bad_ratio: float = 0.01
    """Share of records of a source that may be broken (quarantined) before the stage fails."""
    txt_document_chars: int = 4096
    """A .txt file is cut at blank lines into documents of about this length; 0 keeps each file whole."""
    held_out_fraction: float = 0.02
    """Share of documents held out, chosen by a hash of their text."""
    split_seed: int = 0
    shard_bytes: int = 8_000_000
    """Text of a shard of the training documents."""

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source is empty; name at least one file, folder, glob or dataset")
        if not 0.0 < self.held_out_fraction < 1.0:
            raise ValueError(f"held_out_fraction is {self.held_out_fraction}; it must lie between 0 and 1")
        if not 0.0 <= self.max_bad_ratio <= 1.0:
            raise ValueError(f"max_bad_ratio is {self.max_bad_ratio}; it must lie in [0, 1]")
        if self.txt_document_chars < 0:
            raise ValueError(f"txt_document_chars is {self.txt_document_chars}; it must be 0 or more")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes is {self.shard_bytes}; it must be at least 1")


@dataclass(frozen=True)
class SourceFile:
    """One input file: the name it is reported and identified by, and where it is now."""

    name: str
    path: Path


def find_files(item: str) -> list[SourceFile]:
    """Files of one entry of ``source``, in sorted order; UserError if there are none or they cannot be listed."""
    if item == STDLIB:
        return list(_stdlib_files())
    try:
        base, found = _list(Path(item))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"corpus.source: {item!r} cannot be read: {error}") from None
    if not found:
        raise UserError(f"corpus.source: {item!r} holds no file of a known kind ({' '.join(SUFFIXES)})")
    unknown = [p for p in found if not _known(p)]
    if unknown:
        raise UserError(f"corpus.source: {unknown[0]} is of no known kind ({' '.join(SUFFIXES)})")
    return [SourceFile(p.relative_to(base).as_posix(), p) for p in found]


def _list(path: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files of a path or glob."""
    if path.is_dir():
        return path, sorted(_walk(path))
    if path.is_file():
        return path.parent, [path]
    patterned = [number for number, part in enumerate(path.parts) if set(part) & set("*?[")]
    if not patterned:
        raise UserError(
            f"corpus.source: there is no file or folder {str(path)!r}. Give a path, a glob, {STDLIB!r}, or "
            f"{HUB_PREFIX}NAME for a dataset of the Hugging Face hub"
        )
    base = Path(*path.parts[: patterned[0]])
    pattern = str(Path(*path.parts[patterned[0] :]))
    return base, [p for p in sorted(base.glob(pattern)) if p.is_file()]


def _walk(root: Path) -> Iterator[Path]:
    """Files of a known kind below a folder; hidden folders, and stores of runs and artifacts, are left out."""
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and not _is_store(here / name)]
        yield from (here / name for name in names if _known(here / name) and (here / name).is_file())


def _is_store(folder: Path) -> bool:
    return (folder / "artifacts").is_dir() and (folder / "runs").is_dir()


def _known(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def _stdlib_files() -> Iterator[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not {"site-packages", "dist-packages", "__pycache__"} & set(relative.parts):
            yield SourceFile(relative.as_posix(), path)


def external_data(config: CorpusConfig) -> Any:
    """What identifies the input files: names and SHA-256 of their bytes (for the hub, name and revision)."""
    found: list[Any] = []
    for item in config.source:
        if item.startswith(HUB_PREFIX):
            found.append({"dataset": item, "split": config.hub_split, "revision": config.hub_revision})
            continue
        digest = hashlib.sha256()
        files = find_files(item)
        for file in files:
            try:
                digest.update(os.fsencode(f"{file.name}\0{file_sha256(file.path)}\n"))
            except OSError as error:
                raise UserError(f"corpus.source: {file.path} cannot be read: {error.strerror}") from None
        found.append({"files": len(files), "sha256": digest.hexdigest()})
    return found


STAGE = Stage(
    name="corpus",
    kind="task",
    config=CorpusConfig,
    module="pipeline.corpus.run",
    external="pipeline.corpus.config:external_data",
)
