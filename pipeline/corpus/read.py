"""Documents out of files of each kind, the broken ones counted and set aside with file and line."""

import codecs
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.config import HUB_PREFIX, CorpusConfig, SourceFile
from pipeline.errors import UserError

_LISTED_FIELDS = 12
_BLANK_LINE = re.compile(r"\n\r?\n")


@dataclass
class Reject:
    """A record that was left out, and why."""

    file: str
    line: int
    reason: str


@dataclass
class Ledger:
    """What happened to the records of one source."""

    records: int = 0
    broken: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> number of documents left out without being broken (empty, undecodable)."""
    replaced_by_file: Counter[str] = field(default_factory=Counter)
    """File -> documents in which undecodable bytes were replaced."""
    skipped_by_file: Counter[str] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)

    def reject(self, file: str, line: int, reason: str) -> None:
        """Note one broken record."""
        self.broken += 1
        self.rejects.append(Reject(file, line, reason))


def read_source(item: str, files: list[SourceFile], config: CorpusConfig, ledger: Ledger) -> Iterator[str]:
    """All documents of one entry of ``source``; UserError once too large a share of it is broken."""
    if item.startswith(HUB_PREFIX):
        yield from _read_hub(item.removeprefix(HUB_PREFIX), config, ledger)
    for file in files:
        yield from _read_file(file, config, ledger)
    if ledger.broken > config.max_bad_ratio * ledger.records:
        first = ledger.rejects[0]
        raise UserError(
            f"{item}: {ledger.broken} of {ledger.records} records are broken, more than "
            f"corpus.max_bad_ratio {config.max_bad_ratio} allows. The first: {first.file}, line {first.line}: "
            f"{first.reason}"
        )


def _read_file(file: SourceFile, config: CorpusConfig, ledger: Ledger) -> Iterator[str]:
    name = file.path.name
    if name.endswith(".parquet"):
        yield from _read_parquet(file, config, ledger)
    elif name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        yield from _read_jsonl(file, config, ledger)
    else:
        text = _decode(file.path.read_bytes(), file.name, 1, config, ledger)
        ledger.records += 1
        if text is None:
            return
        if name.endswith(".txt") and config.txt_document_chars:
            yield from cut_at_blank_lines(text, config.txt_document_chars)
        else:
            yield text


def cut_at_blank_lines(text: str, document_chars: int) -> Iterator[str]:
    """Pieces of at least ``document_chars`` characters that end at a blank line; joined they are the text."""
    start = 0
    while start < len(text):
        blank = _BLANK_LINE.search(text, start + document_chars)
        end = blank.end() if blank else len(text)
        yield text[start:end]
        start = end


def _decode(data: bytes, file: str, line: int, config: CorpusConfig, ledger: Ledger) -> str | None:
    if line == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if config.undecodable == "strict":
            raise UserError(
                f"{file}, line {line + data.count(10, 0, error.start)}: byte 0x{data[error.start]:02x} is not "
                "UTF-8. Set corpus.undecodable=replace or =skip, or convert the file"
            ) from None
        if config.undecodable == "skip":
            ledger.skipped_by_file[file] += 1
            ledger.dropped["undecodable"] += 1
            return None
        ledger.replaced_by_file[file] += 1
        return data.decode(errors="replace")


def _open_lines(path: Path) -> BinaryIO:
    if path.name.endswith(".gz"):
        return io.BufferedReader(gzip.open(path, "rb"))  # type: ignore[arg-type]
    if path.name.endswith(".zst"):
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _read_jsonl(file: SourceFile, config: CorpusConfig, ledger: Ledger) -> Iterator[str]:
    try:
        with _open_lines(file.path) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                ledger.records += 1
                decoded = _decode(line, file.name, number, config, ledger)
                if decoded is None:
                    continue
                try:
                    record = json.loads(decoded)
                except (ValueError, RecursionError) as error:
                    ledger.reject(file.name, number, f"not JSON: {error}")
                    continue
                if (text := _text_of(record, file.name, number, config, ledger)) is not None:
                    yield text
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{file.path} cannot be read: {error}. Fetch the file again") from None


def _text_of(record: Any, file: str, line: int, config: CorpusConfig, ledger: Ledger) -> str | None:
    if not isinstance(record, dict):
        ledger.reject(file, line, f"a JSON object is needed, found {type(record).__name__}")
        return None
    if config.text_field not in record:
        if ledger.records == 1:
            raise _missing_field(file, config, list(record))
        ledger.reject(file, line, f"no field {config.text_field!r}")
        return None
    text = record[config.text_field]
    if not isinstance(text, str):
        ledger.reject(file, line, f"field {config.text_field!r} holds {type(text).__name__}, not text")
        return None
    return text


def _missing_field(file: str, config: CorpusConfig, fields: list[str]) -> UserError:
    listed = ", ".join(fields[:_LISTED_FIELDS])
    return UserError(f"{file} has no field {config.text_field!r}; set corpus.text_field to one of: {listed}")


def _read_parquet(file: SourceFile, config: CorpusConfig, ledger: Ledger) -> Iterator[str]:
    try:
        table = pq.ParquetFile(file.path)
    except (OSError, ValueError) as error:
        raise UserError(f"{file.path} is not a Parquet file: {error}") from None
    if config.text_field not in table.schema_arrow.names:
        raise _missing_field(file.name, config, table.schema_arrow.names)
    number = 0
    try:
        for batch in table.iter_batches(columns=[config.text_field], batch_size=1024):
            for value in _without_decoding(batch.column(0)).to_pylist():
                number += 1
                ledger.records += 1
                if not isinstance(value, bytes | str):
                    ledger.reject(file.name, number, f"{config.text_field!r} holds {type(value).__name__}")
                    continue
                text = value if isinstance(value, str) else _decode(value, file.name, number, config, ledger)
                if text is not None:
                    yield text
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file.path} cannot be read: {error}. Fetch the file again") from None


def _without_decoding(column: pa.Array) -> pa.Array:
    """Text as bytes: Parquet does not promise that a string column holds UTF-8."""
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return column.cast(pa.large_binary()) if is_text else column


def _read_hub(name: str, config: CorpusConfig, ledger: Ledger) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"corpus.source {HUB_PREFIX}{name} needs the package datasets: pip install 'dlm[hub]'"
        ) from None
    path, _, subset = name.partition(":")
    try:
        rows = datasets.load_dataset(
            path, subset or None, split=config.hub_split, revision=config.hub_revision or None, streaming=True
        )
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise UserError(f"datasets.load_dataset cannot open {name!r}: {error}") from None
    for number, record in enumerate(rows, 1):
        ledger.records += 1
        if (text := _text_of(record, name, number, config, ledger)) is not None:
            yield text
