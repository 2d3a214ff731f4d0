"""Columns of text in Parquet and Arrow files, a bounded number of values at a time."""

import io
import mmap
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.config import CorpusConfig, is_url
from pipeline.corpus.files import SourceFile, open_source
from pipeline.corpus.ledger import Ledger
from pipeline.corpus.lines import missing_field, readable
from pipeline.corpus.pieces import Piece
from pipeline.corpus.text import decode
from pipeline.errors import UserError

_ROWS = 128
_VALUE_BYTES = 32 << 20
"""Values that are in memory at one time: so many rows, or by the average of a row group so many bytes."""
_BUFFER_BYTES = 1 << 20

Column = tuple[int, pa.Array]
"""Values, and the number of the first of them in the file."""


def open_parquet(file: SourceFile, handle: BinaryIO) -> pq.ParquetFile:
    """A Parquet file with its footer read; UserError if it is none."""
    try:
        return pq.ParquetFile(handle, buffer_size=_BUFFER_BYTES)
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{file.url} is not a Parquet file: {error}") from None


def read_parquet(file: SourceFile, piece: Piece, config: CorpusConfig, ledger: Ledger) -> Iterator[str]:
    """The documents of the row groups of a piece."""
    ledger.files += not piece.start
    with open_source(file) as handle:
        table = open_parquet(file, handle)
        if config.text_field not in table.schema_arrow.names:
            raise missing_field(file.name, config, table.schema_arrow.names)
        columns = _row_groups(table, piece, config.text_field)
        yield from _texts(file, readable(file, columns), config, ledger)


def _row_groups(table: pq.ParquetFile, piece: Piece, field: str) -> Iterator[Column]:
    stop = table.num_row_groups if piece.stop < 0 else piece.stop
    number = 1 + sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
    for group in range(piece.start, stop):
        about = table.metadata.row_group(group)
        rows = min(_ROWS, max(1, _VALUE_BYTES * about.num_rows // max(1, about.total_byte_size)))
        for batch in table.iter_batches(columns=[field], row_groups=[group], batch_size=rows):
            yield number, batch.column(0)
            number += batch.num_rows


def read_arrow(file: SourceFile, config: CorpusConfig, ledger: Ledger) -> Iterator[str]:
    """The documents of an Arrow IPC file or stream, such as ``datasets`` saves."""
    ledger.files += 1
    with open_source(file) as handle:
        yield from _texts(file, readable(file, _ipc(file, _mapped(file, handle), config)), config, ledger)


def _mapped(file: SourceFile, handle: BinaryIO) -> Any:
    """A local file mapped into memory, since one batch of it may be larger than that; a remote one as it is."""
    if is_url(file.url) or not file.size_bytes:
        return handle
    return pa.BufferReader(pa.py_buffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)))


def _ipc(file: SourceFile, handle: Any, config: CorpusConfig) -> Iterator[Column]:
    try:
        reader = pa.ipc.open_file(handle)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        handle.seek(0, io.SEEK_SET)
        reader = batches = pa.ipc.open_stream(handle)
    if config.text_field not in reader.schema.names:
        raise missing_field(file.name, config, reader.schema.names)
    number = 1
    for batch in batches:
        column = _as_bytes(batch.column(config.text_field))
        column.validate(full=True)
        for start in range(0, len(column), _ROWS):
            yield number + start, column[start : start + _ROWS]
        number += len(column)


def _as_bytes(column: pa.Array) -> pa.Array:
    """Text as bytes, without a look at them: neither format promises that a string column holds UTF-8."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column.validate(full=True)
        return column.dictionary_decode()
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    return column.view(binary[kind]) if kind in binary else column


def _texts(file: SourceFile, columns: Iterator[Column], config: CorpusConfig, ledger: Ledger) -> Iterator[str]:
    for first, column in columns:
        for number, value in enumerate(_as_bytes(column).to_pylist(), first):
            ledger.records += 1
            if not isinstance(value, bytes | str):
                ledger.reject(file.name, number, f"{config.text_field!r} holds {type(value).__name__}")
                continue
            text = value if isinstance(value, str) else decode(value, file.name, number, config, ledger)
            if text is not None:
                yield text
