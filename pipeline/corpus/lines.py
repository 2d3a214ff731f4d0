"""Lines of JSON, plain or compressed: one document each, with bounded memory whatever the file holds."""

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa

from pipeline.corpus.config import SourceConfig
from pipeline.corpus.files import SourceFile, open_source
from pipeline.corpus.ledger import Ledger
from pipeline.corpus.pieces import Piece
from pipeline.corpus.text import count_lines, decode
from pipeline.errors import UserError

T = TypeVar("T")

_LISTED_FIELDS = 12
_BUFFER_BYTES = 1 << 20
_FREE_BYTES = 1 << 20
"""Decompressed bytes that say nothing about a bomb yet: a short file may compress very well."""


def readable(file: SourceFile, items: Iterator[T]) -> Iterator[T]:
    """What an iterator over a file gives; UserError where its bytes make no sense."""
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except UserError:
            raise
        except (EOFError, OSError, ValueError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise UserError(f"{file.url} cannot be read: {error}. Fetch the file again") from None
        yield item


def refuse_bomb(file: SourceFile, max_ratio: float, given: int, taken: int) -> None:
    """UserError if far more bytes are given by a file than were taken from it."""
    ratio = given / max(1, taken)
    if given > _FREE_BYTES and ratio > max_ratio:
        raise UserError(
            f"{file.url} decompresses to more than {ratio:.0f} times its size, above "
            f"corpus.max_decompression_ratio {max_ratio:g}: a decompression bomb, or very repetitive text. "
            "Raise the setting if the file is meant to be so"
        )


class _Inflated(io.RawIOBase):
    """A compressed file read as what it holds; UserError once it gives far more than it has."""

    def __init__(self, file: SourceFile, max_ratio: float) -> None:
        self._file, self._max_ratio = file, max_ratio
        self._raw = open_source(file)
        kind = "gzip" if file.name.endswith(".gz") else "zstd"
        self._stream = pa.CompressedInputStream(pa.PythonFile(self._raw, mode="r"), kind)
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._given += len(data)
        refuse_bomb(self._file, self._max_ratio, self._given, self._raw.tell())
        return len(data)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _open_lines(file: SourceFile, config: SourceConfig) -> BinaryIO:
    if file.name.endswith((".gz", ".zst")):
        return io.BufferedReader(_Inflated(file, config.max_decompression_ratio), _BUFFER_BYTES)
    return open_source(file)


def _lines(file: SourceFile, piece: Piece, config: SourceConfig) -> Iterator[bytes | None]:
    """The lines that start in the range of a piece; None for one that is too long."""
    limit = config.max_line_bytes
    with _open_lines(file, config) as handle:
        position = piece.start
        if position:
            handle.seek(position - 1)
            position += _skip_line(handle) - 1
        while piece.stop < 0 or position < piece.stop:
            line = handle.readline(limit + 1)
            if not line:
                return
            position += len(line)
            if len(line) > limit and not line.endswith(b"\n"):
                position += _skip_line(handle)
                yield None
            else:
                yield line


def _skip_line(handle: BinaryIO) -> int:
    """Bytes up to the end of the line and with it."""
    skipped = 0
    while block := handle.readline(_BUFFER_BYTES):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


def read_jsonl(file: SourceFile, piece: Piece, config: SourceConfig, ledger: Ledger, is_first: bool) -> Iterator[str]:
    """The documents of the lines of JSON that start in the range of a piece."""
    ledger.files += not piece.start
    for number, line in enumerate(readable(file, _lines(file, piece, config)), 1):
        ledger.go_on()
        ledger.lines += 1
        if line is None:
            ledger.records += 1
            ledger.reject(file.name, number, f"longer than corpus.max_line_bytes {config.max_line_bytes}")
            continue
        if number == 1 and not piece.start:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.isspace() or not line:
            continue
        ledger.records += 1
        try:
            decoded = line.decode()
        except UnicodeDecodeError:
            before = count_lines(file, piece.start) if config.undecodable == "strict" else 0
            decoded = decode(line, file.name, before + number, config, ledger)
            if decoded is None:
                continue
        try:
            record = json.loads(decoded)
        except (ValueError, RecursionError) as error:
            ledger.reject(file.name, number, f"not JSON: {error}")
            continue
        if (text := text_of(record, file.name, number, config, ledger, is_first)) is not None:
            yield text


def text_of(record: Any, file: str, line: int, config: SourceConfig, ledger: Ledger, is_first: bool) -> str | None:
    """The text of a record; None for one that is set aside."""
    if not isinstance(record, dict):
        ledger.reject(file, line, f"a JSON object is needed, found {type(record).__name__}")
        return None
    if config.text_field not in record:
        if is_first and ledger.records == 1:
            raise missing_field(file, config, list(record))
        ledger.reject(file, line, f"no field {config.text_field!r}")
        return None
    text = record[config.text_field]
    if not isinstance(text, str):
        ledger.reject(file, line, f"field {config.text_field!r} holds {type(text).__name__}, not text")
        return None
    return text


def missing_field(file: str, config: SourceConfig, fields: list[str]) -> UserError:
    """The error for a source whose text is in another field."""
    listed = ", ".join(fields[:_LISTED_FIELDS])
    return UserError(f"{file} has no field {config.text_field!r}; set {config.text_field_setting} to one of: {listed}")
