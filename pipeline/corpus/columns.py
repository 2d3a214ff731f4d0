"""Columns of text in Parquet and Arrow files, a bounded number of values at a time."""

import io
import mmap
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.config import SourceConfig, is_url
from pipeline.corpus.files import SourceFile, open_source
from pipeline.corpus.ledger import Ledger
from pipeline.corpus.lines import missing_field, readable, refuse_bomb
from pipeline.corpus.pieces import Piece
from pipeline.corpus.text import decode
from pipeline.errors import UserError

_ROWS = 128
_VALUE_BYTES = 32 << 20
"""Values that are in memory at one time: so many rows, or by the average of a row group so many bytes."""
_BUFFER_BYTES = 1 << 20

_BINARY = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
"""Types of text, and the same bytes unread."""

_SIZED = (pa.binary(), pa.large_binary())

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


def read_parquet(file: SourceFile, piece: Piece, config: SourceConfig, ledger: Ledger) -> Iterator[str]:
    """The documents of the row groups of a piece."""
    ledger.files += not piece.start
    with open_source(file) as handle:
        table = open_parquet(file, handle)
        _refuse_ambiguous(file, config, table.schema_arrow)
        columns = _row_groups(file, table, piece, config)
        yield from _texts(file, readable(file, columns), config, ledger)


def _refuse_ambiguous(file: SourceFile, config: SourceConfig, schema: pa.Schema) -> None:
    """UserError unless one column is the one with the text."""
    places = schema.get_all_field_indices(config.text_field)
    if not places:
        raise missing_field(file.name, config, schema.names)
    if len(places) > 1:
        raise UserError(
            f"{file.name} has {len(places)} columns named {config.text_field!r}, and which one holds the text cannot "
            f"be told; rename all but one, or set {config.text_field_setting} to another"
        )


def _row_groups(file: SourceFile, table: pq.ParquetFile, piece: Piece, config: SourceConfig) -> Iterator[Column]:
    field = config.text_field
    stop = table.num_row_groups if piece.stop < 0 else piece.stop
    given = taken = 0
    number = 1 + sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
    for group in range(piece.start, stop):
        about = table.metadata.row_group(group)
        columns = [about.column(number) for number in range(about.num_columns)]
        own = [column for column in columns if column.path_in_schema == field]
        refuse_bomb(
            file,
            config.max_decompression_ratio,
            sum(column.total_uncompressed_size for column in own),
            sum(column.total_compressed_size for column in own),
        )
        taken += sum(column.total_compressed_size for column in own)
        rows = min(_ROWS, max(1, _VALUE_BYTES * about.num_rows // max(1, about.total_byte_size)))
        for batch in table.iter_batches(columns=[field], row_groups=[group], batch_size=rows):
            column = _as_bytes(batch.column(batch.schema.get_field_index(field)))
            given += _num_bytes(column)
            refuse_bomb(file, config.max_decompression_ratio, given, taken)
            yield number, column
            number += batch.num_rows


def read_arrow(file: SourceFile, config: SourceConfig, ledger: Ledger) -> Iterator[str]:
    """The documents of an Arrow IPC file or stream, such as ``datasets`` saves."""
    ledger.files += 1
    with open_source(file) as handle:
        yield from _texts(file, readable(file, _ipc(file, _mapped(file, handle), config)), config, ledger)


def _mapped(file: SourceFile, handle: BinaryIO) -> Any:
    """A local file mapped into memory, since one batch of it may be larger than that; a remote one as it is."""
    if is_url(file.url) or not file.size_bytes:
        return handle
    return pa.BufferReader(pa.py_buffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)))


def _ipc(file: SourceFile, handle: Any, config: SourceConfig) -> Iterator[Column]:
    try:
        reader = pa.ipc.open_file(handle)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        handle.seek(0, io.SEEK_SET)
        reader = batches = pa.ipc.open_stream(handle)
    _refuse_ambiguous(file, config, reader.schema)
    number = 1
    for batch in batches:
        column = _as_bytes(batch.column(batch.schema.get_field_index(config.text_field)))
        column.validate(full=True)
        for start in range(0, len(column), _ROWS):
            yield number + start, column[start : start + _ROWS]
        number += len(column)


def _as_bytes(column: pa.Array) -> pa.Array:
    """Text as bytes, without a look at them: neither format promises that a string column holds UTF-8."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        return pa.DictionaryArray.from_arrays(column.indices, _as_bytes(column.dictionary))
    return column.view(_BINARY[column.type]) if column.type in _BINARY else column


def _num_bytes(column: pa.Array) -> int:
    """Bytes of text in a column, each value of a dictionary as often as it is repeated."""
    repeats = pa.types.is_dictionary(column.type)
    values = column.dictionary if repeats else column
    if values.type not in _SIZED:
        return 0
    lengths = pc.call_function("binary_length", [values])
    return (pc.take(lengths, column.indices) if repeats else lengths).sum().as_py() or 0


def _values(column: pa.Array) -> Iterator[bytes | None]:
    """Text as Python has it; from a dictionary one by one, since all of a batch may be too many bytes for an array."""
    if not pa.types.is_dictionary(column.type):
        yield from column.to_pylist()
        return
    for index in column.indices.to_pylist():
        yield None if index is None else column.dictionary[index].as_py()


def _texts(file: SourceFile, columns: Iterator[Column], config: SourceConfig, ledger: Ledger) -> Iterator[str]:
    for first, column in columns:
        ledger.go_on()
        if pa.types.is_run_end_encoded(column.type):
            column = pc.call_function("run_end_decode", [column])
        values = _as_bytes(column)
        value_type = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        is_text = value_type in _BINARY.values()  # other values may have no counterpart in Python: a far-off time
        for number, value in enumerate(_values(values) if is_text else [None] * len(values), first):
            ledger.records += 1
            if value is None:
                kind = "NoneType" if is_text or pa.types.is_null(values.type) else column.type
                ledger.reject(file.name, number, f"{config.text_field!r} holds {kind}")
            elif (text := decode(value, file.name, number, config, ledger)) is not None:
                yield text
