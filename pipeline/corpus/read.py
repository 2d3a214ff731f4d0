"""Documents out of one piece of a source, the broken records counted and set aside with file and line."""

from collections.abc import Iterator

from pipeline.corpus.columns import read_arrow, read_parquet
from pipeline.corpus.config import SourceConfig
from pipeline.corpus.files import TEXT_SUFFIXES, refuse_changed
from pipeline.corpus.hub import read_hub
from pipeline.corpus.ledger import Ledger
from pipeline.corpus.lines import read_jsonl, text_of
from pipeline.corpus.pieces import Piece
from pipeline.corpus.text import Document, read_text


def read_piece(piece: Piece, config: SourceConfig, ledger: Ledger, is_first: bool) -> Iterator[Document]:
    """All documents of a piece.

    Raises UserError for a file that cannot be read or has changed, and where ``is_first`` (the beginning of a
    source) has no field with the text.
    """
    if piece.dataset:
        ledger.files += 1
        for number, record in enumerate(read_hub(piece, config), 1):
            ledger.go_on()
            ledger.records += 1
            if (text := text_of(record, piece.dataset, number, config, ledger, is_first)) is not None:
                yield text
    for file in piece.files:
        if file.name.endswith(TEXT_SUFFIXES):
            yield from read_text(file, config, ledger)
        elif file.name.endswith(".parquet"):
            yield from read_parquet(file, piece, config, ledger)
        elif file.name.endswith(".arrow"):
            yield from read_arrow(file, config, ledger)
        else:
            yield from read_jsonl(file, piece, config, ledger, is_first)
        refuse_changed(file)
