"""Documents on disk: Arrow IPC files of text, and beside each the numbers of its documents that are left out.

    {split}-{source}-{number:05d}.arrow             text: large_string, starts_document: bool
    {split}-{source}-{number:05d}.duplicates.npy    int64, ascending; absent if there are none

A row is a document, or one part of about a megabyte of a giant one, so that nothing has to hold a document of a
gigabyte in memory.  Every file is verified against its manifest before its first byte is parsed.
"""

import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from pipeline.artifact import Manifest, checked, load_manifest
from pipeline.data.arrays import binary_to_arrow, to_arrow, to_numpy
from pipeline.errors import CorruptionError, is_bad_format

SCHEMA = pa.schema([("text", pa.large_string()), ("starts_document", pa.bool_())])
SPLITS = ("train", "held_out")
PART_BYTES = 1 << 20
_BATCH_BYTES = 1 << 20
_SUFFIX = ".arrow"
_DUPLICATES_SUFFIX = ".duplicates.npy"


class DocumentWriter:
    """Writes one file of documents."""

    def __init__(self, path: Path) -> None:
        self._writer = pa.ipc.new_file(str(path), SCHEMA)
        self._texts: list[bytes] = []
        self._starts: list[bool] = []
        self._pending_bytes = 0

    def write(self, data: bytes) -> None:
        """Append one document, given as UTF-8."""
        if len(data) > PART_BYTES:
            self.write_stream(io.BytesIO(data))
        else:
            self._add(data, True)

    def write_stream(self, stream: BinaryIO) -> None:
        """Append one document as the UTF-8 that a stream gives until its end."""
        starts, rest = True, b""
        while block := stream.read(PART_BYTES):
            part = rest + block
            end = _last_boundary(part)
            part, rest = part[:end], part[end:]
            self._add(part, starts)
            starts = False
        if rest or starts:
            self._add(rest, starts)

    def _add(self, part: bytes, starts: bool) -> None:
        self._texts.append(part)
        self._starts.append(starts)
        self._pending_bytes += len(part)
        if self._pending_bytes >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        text = binary_to_arrow(self._texts).view(pa.large_string())
        self._writer.write_batch(pa.record_batch([text, to_arrow(np.array(self._starts))], schema=SCHEMA))
        self._texts, self._starts, self._pending_bytes = [], [], 0

    def close(self) -> None:
        """Complete the file."""
        if self._texts:
            self._flush()
        self._writer.close()


def _last_boundary(data: bytes) -> int:
    """Length of the longest start of some UTF-8 that ends with a whole character."""
    start = len(data) - 1
    while start > 0 and data[start] & 0xC0 == 0x80:
        start -= 1
    width = 1 if data[start] < 0xC0 else 2 if data[start] < 0xE0 else 3 if data[start] < 0xF0 else 4
    return len(data) if start + width == len(data) else start


def text_files(directory: Path, split: str) -> dict[str, list[str]]:
    """Source -> names of its files of one split ("train", "held_out"), both in order."""
    found: dict[str, list[str]] = {}
    for name in sorted(record.path for record in load_manifest(directory).files):
        if name.startswith(f"{split}-") and name.endswith(_SUFFIX):
            found.setdefault(name.split("-")[1], []).append(name)
    return found


def duplicates_file(name: str) -> str:
    """Name of the list of left-out documents of a file of text."""
    return name.removesuffix(_SUFFIX) + _DUPLICATES_SUFFIX


def text_hashes(directory: Path) -> dict[str, list[str]]:
    """File of text -> the SHA-256 of all that decides what reading it gives: its own, and that of what is left out."""
    sha256 = {record.path: record.sha256 for record in load_manifest(directory).files}
    texts = [name for name in sha256 if name.endswith(_SUFFIX)]
    return {name: [sha256[name], sha256.get(duplicates_file(name), "")] for name in texts}


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a file of text, a megabyte or so."""

    texts: list[str]
    starts_document: list[bool]


def read_rows(directory: Path, name: str) -> Iterator[Rows]:
    """The rows of one file in batches, without those of documents that are left out.

    Raises CorruptionError if a file is damaged or is no file of documents.
    """
    manifest = load_manifest(directory)
    path = checked(directory, name, manifest)
    left_out = _left_out(directory, name, manifest)
    num_docs = 0
    for batch in _batches(path):
        starts = batch.column(1)
        if num_docs == 0 and len(starts) and not starts[0].as_py():
            raise CorruptionError(f"{path} begins in the middle of a document")
        if len(left_out):
            numbers = num_docs - 1 + np.cumsum(to_numpy(starts))
            num_docs = int(numbers[-1]) + 1 if len(numbers) else num_docs
            batch = batch.filter(to_arrow(~np.isin(numbers, left_out)))
        else:
            num_docs += starts.true_count
        if batch.num_rows:
            yield Rows(batch.column(0).to_pylist(), batch.column(1).to_pylist())


def _left_out(directory: Path, name: str, manifest: Manifest) -> np.ndarray:
    duplicates = duplicates_file(name)
    if not any(record.path == duplicates for record in manifest.files):
        return np.empty(0, np.int64)
    path = checked(directory, duplicates, manifest)
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, OSError) as error:
        if not is_bad_format(error):
            raise
        raise CorruptionError(f"{path} is not a list of left-out documents: {error}") from error
    if found.dtype != np.int64 or found.ndim != 1:
        raise CorruptionError(f"{path} holds {found.dtype} of {found.ndim} dimensions, not a list of numbers")
    return found


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            if not reader.schema.equals(SCHEMA):
                raise ValueError(f"its columns are {reader.schema.to_string(show_schema_metadata=False)}")
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                batch.validate(full=True)
                if any(column.null_count for column in batch.columns):
                    raise ValueError("it holds nulls")
                yield batch
    except (ValueError, OSError, pa.ArrowException) as error:
        if not is_bad_format(error):
            raise
        raise CorruptionError(f"{path} is not a valid file of documents: {error}") from error


def read_documents(directory: Path, name: str) -> Iterator[Iterable[str]]:
    """The documents of one file, each as its parts; a document's parts are gone once the next is asked for."""

    def numbered() -> Iterator[tuple[int, str]]:
        number = 0
        for rows in read_rows(directory, name):
            for text, starts in zip(rows.texts, rows.starts_document, strict=True):
                number += starts
                yield number, text

    for _, parts in itertools.groupby(numbered(), key=lambda row: row[0]):
        yield (text for _, text in parts)
