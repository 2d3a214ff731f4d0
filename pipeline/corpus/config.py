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
from pipeline.errors import UserError
from pipeline.stage import Stage

STDLIB = "stdlib"
HUB_PREFIX = "hf:"
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class CorpusConfig:
    """Text in, documents out, a few of them held out for evaluation."""

    source: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = (STDLIB,)
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
    """Files of one entry of ``source``, in sorted order; UserError if there are none."""
    if item == STDLIB:
        return list(_stdlib_files())
    path = Path(item).expanduser()
    if any(character in item for character in "*?[") and not path.exists():
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
        found = [p for p in sorted(anchor.glob(pattern)) if p.is_file()]
        base = anchor
    elif path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.is_file() and _known(p)]
        base = path
    elif path.is_file():
        found, base = [path], path.parent
    else:
        raise UserError(
            f"corpus.source: there is no file or folder {item!r}. Give a path, a glob, {STDLIB!r}, or "
            f"{HUB_PREFIX}NAME for a dataset of the Hugging Face hub"
        )
    if not found:
        raise UserError(f"corpus.source: {item!r} holds no file of a known kind ({' '.join(SUFFIXES)})")
    unknown = [p for p in found if not _known(p)]
    if unknown:
        raise UserError(f"corpus.source: {unknown[0]} is of no known kind ({' '.join(SUFFIXES)})")
    return [SourceFile(p.relative_to(base).as_posix(), p) for p in found]


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
            digest.update(os.fsencode(f"{file.name}\0{file_sha256(file.path)}\n"))
        found.append({"files": len(files), "sha256": digest.hexdigest()})
    return found


STAGE = Stage(
    name="corpus",
    kind="task",
    config=CorpusConfig,
    module="pipeline.corpus.run",
    external="pipeline.corpus.config:external_data",
)
