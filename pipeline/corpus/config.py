"""Where the text comes from, what is left out of it, and how it is split."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator

from pipeline.config import execution
from pipeline.corpus.filters import Filters
from pipeline.errors import NotGivenError
from pipeline.stage import Stage

STDLIB = "stdlib"
HUB_PREFIX = "hf:"
DEFAULT_NAME = "text"
"""The name of a source that was given without one."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_DATASET = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*(:.+)?")
_TEXT_FIELD, _HUB_SPLIT, _HUB_REVISION, _HELD_OUT_FRACTION = "text", "train", "", 0.02
"""Defaults: a setting with another value that no source heeds is refused."""


def is_url(item: str) -> bool:
    """Whether an entry of ``paths`` is for fsspec rather than a local path."""
    return "://" in item


def _paths(value: Any) -> Any:
    """A single path as a tuple of one; local ones made absolute, so that a plan means the same from anywhere."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, tuple | list):
        return items
    return tuple(_absolute(item) if isinstance(item, str) else item for item in items)


def _absolute(item: str) -> str:
    if not item.strip():
        raise ValueError("an entry is empty; name a file, a folder, a glob, a URL or a dataset")
    if item.startswith("file://"):
        item = item.removeprefix("file://")
    if item.startswith(HUB_PREFIX):
        return _dataset(item)
    if is_url(item):
        return _url(item)
    if item == STDLIB:
        return item
    return os.path.abspath(os.path.expanduser(item))


def _dataset(item: str) -> str:
    if not _DATASET.fullmatch(item.removeprefix(HUB_PREFIX)):
        raise ValueError(
            f"{item!r} names no dataset of the hub; write {HUB_PREFIX}NAME, {HUB_PREFIX}OWNER/NAME or "
            f"{HUB_PREFIX}OWNER/NAME:SUBSET. Name the files or the folder of a local dataset without {HUB_PREFIX}"
        )
    return item


def _url(item: str) -> str:
    try:
        parts = urlsplit(item)
    except ValueError as error:
        raise ValueError(f"{item!r} is no URL: {error}") from None
    is_web = parts.scheme in ("http", "https")  # what stands before the @ of others may be the name of a place
    if parts.password is not None or (is_web and "@" in parts.netloc):
        secret = "user name, token or password" if is_web else "password"
        raise ValueError(
            f"the URL of {parts.hostname!r} holds a {secret}, which plans and manifests would show; give it to "
            "fsspec by its configuration files or by environment variables"
        )
    if "::" in item:
        raise ValueError(f"{item!r} is a chain of file systems, which cannot be checked for changes; unpack or copy it")
    return item


@dataclass(frozen=True)
class Source:
    """Files and datasets that are counted, filtered and later weighted together."""

    paths: Annotated[tuple[str, ...], BeforeValidator(_paths)] = field(metadata={"execution": True})
    """Files, folders or globs of .txt .md .py .jsonl(.gz/.zst) .parquet .arrow, local or as fsspec URLs
    (s3://bucket/x/*.jsonl.gz); "stdlib", the sources of Python's own standard library; or "hf:NAME" and
    "hf:NAME:SUBSET", datasets of the Hugging Face hub."""
    text_field: str = ""
    """Field with the text, in .jsonl, .parquet, .arrow and datasets; empty: corpus.text_field."""
    filters: Filters | None = None
    """What is left out; null: corpus.filters."""
    held_out_fraction: float | None = None
    """Share of its documents held out, 0 for none, 1 for all; null: corpus.held_out_fraction."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty; name at least one file, folder, glob, URL or dataset")
        if self.held_out_fraction is not None and not 0.0 <= self.held_out_fraction <= 1.0:
            raise ValueError(f"held_out_fraction is {self.held_out_fraction}; it must lie in [0, 1]")

    @property
    def is_held_out(self) -> bool:
        """Whether all of it is for evaluation."""
        return self.held_out_fraction == 1.0


def _source(value: Any) -> Any:
    """A source given by its paths alone."""
    return {"paths": value} if isinstance(value, str | tuple | list) else value


def _sources(value: Any) -> Any:
    """Paths without a name are the source "text"."""
    return {DEFAULT_NAME: value} if isinstance(value, str | tuple | list) else value


def _default_source() -> dict[str, Source]:
    return {DEFAULT_NAME: Source((STDLIB,))}


@dataclass(frozen=True)
class CorpusConfig:
    """Text in, documents out, a few of them held out for evaluation."""

    source: Annotated[dict[str, Annotated[Source, BeforeValidator(_source)]], BeforeValidator(_sources)] = field(
        default_factory=_default_source, metadata={"execution": True}
    )
    """Name -> source; a path or a list of paths is the source "text".  Empty: it is to be given before a run, as for
    recipes whose text does not come with them.  It is identified by ``external_data`` and not with the fields here, so
    that the shards of a source stay good when another is added beside it."""
    text_field: str = _TEXT_FIELD
    """Field with the text, in .jsonl, .parquet, .arrow and datasets."""
    filters: Filters = field(default_factory=Filters)
    """What is left out of the sources that have no filters of their own."""
    hub_split: str = _HUB_SPLIT
    hub_revision: str = _HUB_REVISION
    """Commit of the dataset on the hub, as its 40 hexadecimal digits: a branch moves on, and the plan cannot see it."""
    undecodable: Literal["strict", "replace", "skip"] = "strict"
    """What happens to a document that is not UTF-8: stop, replace the bad bytes, or leave it out."""
    max_bad_ratio: float = 0.01
    """Share of records of a source that may be broken (quarantined) before the stage fails."""
    max_line_bytes: int = 64_000_000
    """A longer line of a .jsonl file is broken; it bounds the memory that a line can take."""
    max_decompression_ratio: float = execution(200.0)
    """A .jsonl.gz, a .jsonl.zst, or a row group of a .parquet that gives more bytes than this for each of its own is
    refused, past the first megabyte.  An .arrow file is not guarded: its batches are decompressed whole."""
    txt_document_chars: int = 4096
    """A .txt file is cut at blank lines into documents of about this length; 0 keeps each file whole."""
    held_out_fraction: float = _HELD_OUT_FRACTION
    """Share of documents held out, chosen by a hash of their text, of the sources that have none of their own."""
    split_seed: int = 0
    shard_bytes: int = 64_000_000
    """About how much input a shard reads; it decides where shards end."""

    def __post_init__(self) -> None:
        if unusable := [name for name in self.source if not _NAME.fullmatch(name)]:
            raise ValueError(
                f"the source name {unusable[0]!r} cannot stand in file names; a name is a letter and up to 63 "
                "letters, digits and underscores"
            )
        if not self.text_field:
            raise ValueError("text_field is empty; name the field with the text")
        if not 0.0 < self.held_out_fraction < 1.0:
            raise ValueError(f"held_out_fraction is {self.held_out_fraction}; it must lie between 0 and 1")
        if not 0.0 <= self.max_bad_ratio <= 1.0:
            raise ValueError(f"max_bad_ratio is {self.max_bad_ratio}; it must lie in [0, 1]")
        if self.max_line_bytes < 1:
            raise ValueError(f"max_line_bytes is {self.max_line_bytes}; it must be at least 1")
        if self.max_decompression_ratio < 1.0:
            raise ValueError(f"max_decompression_ratio is {self.max_decompression_ratio}; it must be at least 1")
        if self.txt_document_chars < 0:
            raise ValueError(f"txt_document_chars is {self.txt_document_chars}; it must be 0 or more")
        if not 0 <= self.split_seed < 2**63:
            raise ValueError(f"split_seed is {self.split_seed}; it must lie in [0, 2**63)")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes is {self.shard_bytes}; it must be at least 1")
        _refuse_unheeded(self)


def _refuse_unheeded(config: CorpusConfig) -> None:
    """ValueError for a setting of the whole corpus that no source heeds."""
    sources = config.source.values()
    if not sources:
        return
    if config.text_field != _TEXT_FIELD and all(source.text_field for source in sources):
        raise ValueError("text_field does nothing, since every source has its own; leave it out, or theirs")
    if config.filters != Filters() and all(source.filters for source in sources):
        raise ValueError("filters do nothing, since every source has its own; leave them out, or theirs")
    if config.held_out_fraction != _HELD_OUT_FRACTION and all(s.held_out_fraction is not None for s in sources):
        raise ValueError(
            f"held_out_fraction is {config.held_out_fraction} and does nothing, since every source has its own; leave "
            f"it out, or theirs. Where a recipe has set it, {_HELD_OUT_FRACTION} is as good as leaving it out"
        )
    if all(source.is_held_out for source in sources):
        raise ValueError("every source has held_out_fraction 1: nothing is left for training; lower one of them")
    if all(source.held_out_fraction == 0.0 for source in sources):
        raise ValueError("every source has held_out_fraction 0: nothing is left for evaluation; raise one of them")
    if any(path.startswith(HUB_PREFIX) for source in sources for path in source.paths):
        return
    for key, default in (("hub_split", _HUB_SPLIT), ("hub_revision", _HUB_REVISION)):
        if getattr(config, key) != default:
            raise ValueError(
                f"{key} does nothing, since no source is a dataset of the hub ({HUB_PREFIX}NAME); leave it out"
            )


@dataclass(frozen=True)
class SourceConfig(CorpusConfig):
    """The configuration with the text field, filters and split that one source has, and where these are set."""

    text_field_setting: str = ""
    filters_setting: str = ""

    def __post_init__(self) -> None:
        """It was checked as that of the corpus."""


def for_source(config: CorpusConfig, name: str) -> SourceConfig:
    """How one source is read."""
    source, corpus = config.source[name], "corpus"
    own = f"corpus.source.{name}"
    held_out = config.held_out_fraction if source.held_out_fraction is None else source.held_out_fraction
    heeded = {
        "text_field": source.text_field or config.text_field,
        "filters": source.filters or config.filters,
        "held_out_fraction": held_out,
    }
    return SourceConfig(
        **{item.name: getattr(config, item.name) for item in fields(config)} | heeded,
        text_field_setting=f"{own if source.text_field else corpus}.text_field",
        filters_setting=f"{own if source.filters else corpus}.filters",
    )


def filters_of(config: CorpusConfig) -> Mapping[str, Filters]:
    """The filters of each source."""
    return {name: for_source(config, name).filters for name in config.source}


def check_ready(config: CorpusConfig, step: str) -> None:
    """NotGivenError if there is no text yet: a plan can be looked at and sized without, but not run."""
    if not config.source:
        raise NotGivenError(
            f"{step}.source is empty: the text that is to be trained on does not come with the recipe. Give a file, a "
            f"folder, a glob, a URL or a dataset, as in --set {step}.source=PATH or --set {step}.source=hf:NAME"
        )


STAGE = Stage(
    name="corpus",
    kind="map",
    config=CorpusConfig,
    module="pipeline.corpus.run",
    code_version=3,
    external="pipeline.corpus.identity:external_data",
    ready=check_ready,
    not_of_shards=("text_field", "filters", "max_bad_ratio"),
)
