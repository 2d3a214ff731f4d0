"""Documents judged, split and written: train.arrow, held_out.arrow, and hash and size of every document."""

import hashlib
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.corpus.config import SourceConfig
from pipeline.corpus.filters import build_judge
from pipeline.corpus.ledger import Ledger
from pipeline.corpus.text import Document
from pipeline.data.documents import SPLITS, DocumentWriter

INDEX = np.dtype([("hash_low", "<u8"), ("hash_high", "<u8"), ("num_bytes", "<u8")])
"""One entry a document: 128 bits of a hash of its text, by which duplicates are found, and its size."""
_INDEX_HASH_BYTES = 16
_HEAD_CHARS = 1 << 20
"""What the quality hooks see of a giant document."""


class SplitHash:
    """The two hashes of a text, given at once or in parts."""

    def __init__(self, split_seed: int) -> None:
        self._side = hashlib.blake2b(digest_size=8, key=str(split_seed).encode())
        self._same = hashlib.blake2b(digest_size=_INDEX_HASH_BYTES)

    def update(self, data: bytes) -> None:
        """Take in more of the text, as UTF-8."""
        self._side.update(data)
        self._same.update(data)

    def is_held_out(self, fraction: float) -> bool:
        """Whether the text is held out: a hash of it below ``fraction``, wherever it stands."""
        return int.from_bytes(self._side.digest(), "little") < fraction * 2**64

    def index(self) -> bytes:
        """What identical texts share."""
        return self._same.digest()


class _Side:
    """One split of a shard; without documents it leaves no file."""

    def __init__(self, out: Path, name: str) -> None:
        self._out, self._name = out, name
        self._writer: DocumentWriter | None = None
        self._index = array("B")

    def open(self, index: bytes, num_bytes: int) -> DocumentWriter:
        """The file, for one document of the given hash and size."""
        self._index.frombytes(index + num_bytes.to_bytes(8, "little"))
        if self._writer is None:
            self._writer = DocumentWriter(self._out / f"{self._name}.arrow")
        return self._writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            np.save(self._out / f"{self._name}.index.npy", np.frombuffer(self._index, INDEX))


class ShardWriter:
    """Takes the documents of a shard."""

    def __init__(self, out: Path, config: SourceConfig, ledger: Ledger) -> None:
        self._out, self._config, self._ledger = out, config, ledger
        self._judge = build_judge(config.filters, config.filters_setting)
        self._sides = {name: _Side(out, name) for name in SPLITS}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        for side in self._sides.values():
            side.close()

    def write(self, document: Document) -> None:
        """Write one document on its side, or count why it is left out."""
        if not isinstance(document, str):
            self._write_giant(document)
            return
        if not document or document.isspace():
            self._drop("empty")
            return
        try:
            data = document.encode()
        except UnicodeEncodeError:
            self._drop("lone surrogate")
            return
        if reason := self._judge(len(document), document):
            self._drop(reason)
            return
        hashed = SplitHash(self._config.split_seed)
        hashed.update(data)
        self._side(hashed).open(hashed.index(), len(data)).write(data)

    def _side(self, hashed: SplitHash) -> _Side:
        return self._sides["held_out" if hashed.is_held_out(self._config.held_out_fraction) else "train"]

    def _drop(self, reason: str) -> None:
        self._ledger.drop(reason)

    def _write_giant(self, parts: Iterator[str]) -> None:
        """Which side it goes to is known at its end only: until then it waits in a file without a name."""
        hashed = SplitHash(self._config.split_seed)
        num_chars = 0
        is_empty, head = True, ""
        with tempfile.TemporaryFile(dir=self._out) as waiting:
            for part in parts:
                self._ledger.go_on()
                data = part.encode()
                hashed.update(data)
                waiting.write(data)
                num_chars += len(part)
                is_empty = is_empty and (not part or part.isspace())
                head = head or part[:_HEAD_CHARS]
            if is_empty:
                self._drop("empty")
            elif reason := self._judge(num_chars, head):
                self._drop(reason)
            else:
                num_bytes = waiting.tell()
                waiting.seek(0)
                self._side(hashed).open(hashed.index(), num_bytes).write_stream(waiting)
