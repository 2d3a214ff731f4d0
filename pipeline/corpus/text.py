"""Text out of bytes: decoded by the policy of the user, streamed where a file is large, cut at blank lines."""

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from pipeline.corpus.config import CorpusConfig
from pipeline.corpus.files import SourceFile, open_source
from pipeline.corpus.ledger import Ledger
from pipeline.errors import UserError

CHUNK_BYTES = 4 << 20
"""A larger file, and a piece without a blank line of more characters than this, is never in memory as a whole."""
_BLANK_LINE = re.compile(r"\n\r?\n")

Document = str | Iterator[str]
"""A text, or a giant one as its parts, to be read once and before the next document is asked for."""


def decode(data: bytes, file: str, line: int, config: CorpusConfig, ledger: Ledger) -> str | None:
    """Text of bytes that begin in some line of a file; None for one that is to be left out."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        errors = _errors_for(data[error.start], file, line, config, ledger)
    return None if errors is None else data.decode(errors=errors)


def _errors_for(byte: int, file: str, line: int, config: CorpusConfig, ledger: Ledger) -> str | None:
    """How to decode a document that is not UTF-8 (None: not at all), noted in the ledger."""
    if config.undecodable == "strict":
        raise UserError(
            f"{file}, line {line}: byte 0x{byte:02x} is not UTF-8. Set corpus.undecodable=replace or =skip, or "
            "convert the file"
        )
    if config.undecodable == "skip":
        ledger.skip_undecodable(file, line, f"byte 0x{byte:02x} is not UTF-8")
        return None
    ledger.replace_undecodable(file)
    return "replace"


def read_text(file: SourceFile, config: CorpusConfig, ledger: Ledger) -> Iterator[Document]:
    """The documents of a text file: the whole, or with ``txt_document_chars`` the pieces of a .txt."""
    ledger.files += 1
    ledger.records += 1
    ledger.go_on()
    is_cut = file.name.endswith(".txt") and config.txt_document_chars
    with open_source(file) as handle:
        first = handle.read(CHUNK_BYTES)
        if len(first) < CHUNK_BYTES:
            text = decode(first.removeprefix(codecs.BOM_UTF8), file.name, 1, config, ledger)
            if text is not None:
                yield from cut_at_blank_lines([text], config.txt_document_chars) if is_cut else [text]
            return
        errors: str | None = "strict"
        if bad := _first_bad_byte(handle, first, ledger):
            errors = _errors_for(bad[1], file.name, bad[0], config, ledger)
        if errors is not None:
            handle.seek(0)
            chunks = _decoded(handle, errors)
            yield from cut_at_blank_lines(chunks, config.txt_document_chars) if is_cut else [chunks]


def _first_bad_byte(handle: BinaryIO, first: bytes, ledger: Ledger) -> tuple[int, int] | None:
    """Line and value of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, block = 1, first
    try:
        while block:
            ledger.go_on()
            line += decoder.decode(block).count("\n")
            block = handle.read(CHUNK_BYTES)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return line + error.object.count(b"\n", 0, error.start), error.object[error.start]
    return None


def _decoded(handle: BinaryIO, errors: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
    while block := handle.read(CHUNK_BYTES):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def cut_at_blank_lines(chunks: Iterable[str], document_chars: int) -> Iterator[Document]:
    """Pieces of at least ``document_chars`` characters that end at a blank line; joined they are the text."""
    source = iter(chunks)
    buffer, start = "", 0
    giant_chars = document_chars + CHUNK_BYTES

    def giant(tail: str) -> Iterator[str]:
        nonlocal buffer, start
        blank = None
        while not blank:
            yield tail[:-2]  # a blank line may begin in the last two characters
            chunk = next(source, None)
            if chunk is None:
                yield tail[-2:]
                buffer, start = "", 0
                return
            tail = tail[-2:] + chunk
            blank = _BLANK_LINE.search(tail)
        yield tail[: blank.end()]
        buffer, start = tail, blank.end()

    while True:
        if blank := _BLANK_LINE.search(buffer, start + document_chars):
            yield buffer[start : blank.end()]
            start = blank.end()
        elif len(buffer) - start > giant_chars:
            yield giant(buffer[start:])
        elif (chunk := next(source, None)) is not None:
            buffer, start = buffer[start:] + chunk, 0
        else:
            break
    if start < len(buffer):
        yield buffer[start:]


def count_lines(file: SourceFile, stop: int) -> int:
    """Lines that start in the first ``stop`` bytes of a file."""
    found, left = min(stop, 1), stop - 1
    with open_source(file) as handle:
        while left > 0 and (block := handle.read(min(CHUNK_BYTES, left))):
            found += block.count(b"\n")
            left -= len(block)
    return found
