"""Read the sources, split off held-out documents, write both as Arrow files of text."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.corpus.config import HUB_PREFIX, CorpusConfig, find_files
from pipeline.corpus.read import Ledger, read_source
from pipeline.errors import UserError
from pipeline.stage import StageContext, Stats

SCHEMA = pa.schema([("text", pa.large_string())])
_BATCH_BYTES = 1_000_000


def is_held_out(text: str, fraction: float, split_seed: int) -> bool:
    """Whether a document is held out: a hash of its text below ``fraction``, wherever it stands."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(split_seed).encode()).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


class _Writer:
    """Arrow files of text, a new one whenever ``shard_bytes`` are exceeded (never, if 0)."""

    def __init__(self, out: Path, prefix: str, shard_bytes: int) -> None:
        self.out, self.prefix, self.shard_bytes = out, prefix, shard_bytes
        self.num_docs = self.num_bytes = self.num_shards = 0
        self._pending: list[str] = []
        self._pending_bytes = self._shard_bytes = 0
        self._file: Any = None

    def write(self, text: str) -> None:
        """Append one document."""
        size = len(text.encode())
        self._pending.append(text)
        self._pending_bytes += size
        self.num_docs += 1
        self.num_bytes += size
        if self._pending_bytes >= _BATCH_BYTES:
            self._flush()
        if self.shard_bytes and self._shard_bytes + self._pending_bytes >= self.shard_bytes:
            self.close()

    def _flush(self) -> None:
        if self._file is None:
            path = self.out / f"{self.prefix}-{self.num_shards:05d}.arrow"
            self._file = pa.ipc.new_file(str(path), SCHEMA)
            self.num_shards += 1
        self._file.write_batch(pa.record_batch([pa.array(self._pending, pa.large_string())], schema=SCHEMA))
        self._shard_bytes += self._pending_bytes
        self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        """Finish the current file, if any."""
        if self._pending:
            self._flush()
        if self._file is not None:
            self._file.close()
        self._file, self._shard_bytes = None, 0


def run(config: CorpusConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats:
    """Write train-*.arrow and held_out-*.arrow, rejects.jsonl, and the counts by source."""
    train = _Writer(context.out, "train", config.shard_bytes)
    held_out = _Writer(context.out, "held_out", config.shard_bytes)
    ledgers: dict[str, Ledger] = {}
    for item in config.source:
        ledger = ledgers.setdefault(item, Ledger())
        files = [] if item.startswith(HUB_PREFIX) else find_files(item)
        for text in read_source(item, files, config, ledger):
            if not text.strip():
                ledger.dropped["empty"] += 1
                continue
            try:
                held = is_held_out(text, config.held_out_fraction, config.split_seed)
            except UnicodeEncodeError:
                ledger.dropped["lone surrogate"] += 1
                continue
            (held_out if held else train).write(text)
            if train.num_docs % 200 == 0:
                context.progress(train.num_docs, 0, documents=train.num_docs, mb=train.num_bytes / 1e6)
    train.close()
    held_out.close()
    _check_not_empty(config, train.num_docs, held_out.num_docs, ledgers)
    with (context.out / "rejects.jsonl").open("w") as handle:
        for ledger in ledgers.values():
            handle.writelines(json.dumps(asdict(reject)) + "\n" for reject in ledger.rejects)
    return {
        "train_docs": train.num_docs,
        "train_bytes": train.num_bytes,
        "held_out_docs": held_out.num_docs,
        "held_out_bytes": held_out.num_bytes,
        "sources": {item: _summary(ledger) for item, ledger in ledgers.items()},
    }


def _summary(ledger: Ledger) -> dict[str, Any]:
    return {
        "records": ledger.records,
        "broken": ledger.broken,
        "dropped": dict(ledger.dropped),
        "replaced_by_file": dict(ledger.replaced_by_file),
        "skipped_by_file": dict(ledger.skipped_by_file),
    }


def _check_not_empty(config: CorpusConfig, num_train: int, num_held: int, ledgers: dict[str, Ledger]) -> None:
    if num_train + num_held == 0:
        left_out = sum((ledger.dropped for ledger in ledgers.values()), Counter[str]())
        broken = sum(ledger.broken for ledger in ledgers.values())
        why = [f"{number} {reason}" for reason, number in left_out.items()] + ([f"{broken} broken"] if broken else [])
        raise UserError(
            f"corpus.source {list(config.source)} holds no document with text (left out: {', '.join(why) or 'none'}). "
            "Text that is not UTF-8 is left out under corpus.undecodable=skip; convert it, or set =replace"
        )
    if num_train == 0 or num_held == 0:
        empty = "training" if num_train == 0 else "evaluation"
        raise UserError(
            f"nothing is left for {empty} after the split of {num_train + num_held} documents at "
            f"corpus.held_out_fraction {config.held_out_fraction}. Add documents, or change the fraction (for example "
            "--set corpus.held_out_fraction=0.1); a .txt file gives more documents with a lower "
            "corpus.txt_document_chars"
        )
