"""Read the sources piece by piece, split off held-out documents, write both as Arrow files of text."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import from_json
from pipeline.corpus.config import CorpusConfig, for_source
from pipeline.corpus.gather import COUNTS, REJECTS, add_counts, gather_split, join_rejects, open_shards
from pipeline.corpus.ledger import Ledger
from pipeline.corpus.pieces import Piece
from pipeline.corpus.plan import plan_shards
from pipeline.corpus.read import read_piece
from pipeline.corpus.split import SPLITS, ShardWriter
from pipeline.errors import UserError
from pipeline.stage import Shard, StageContext, Stats, Stopped

_STOP_CHECK_DOCS = 4096


def list_shards(config: CorpusConfig, inputs: Mapping[str, Path], context: StageContext) -> list[Shard]:
    """Runs of small files and ranges of large ones."""
    return plan_shards(config)


def run_shard(config: CorpusConfig, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> Stats:
    """Write the documents of one piece with their hashes, its rejects and its counts."""
    own = for_source(config, shard["source"])
    piece = from_json(Piece, shard["piece"], where=shard["name"])
    with (context.out / REJECTS).open("w") as rejects:
        ledger = Ledger(rejects)
        with ShardWriter(context.out, own, ledger) as writer:
            for number, document in enumerate(read_piece(piece, own, ledger, shard["is_first"])):
                if number % _STOP_CHECK_DOCS == 0 and context.should_stop():
                    raise Stopped(f"stopped while reading {shard['name']}")
                writer.write(document)
    start = 0 if piece.dataset else piece.start
    counts = {"source": shard["source"], "start": start, **ledger.counts()}
    (context.out / COUNTS).write_text(json.dumps(counts))
    return counts


def finish(
    config: CorpusConfig, inputs: Mapping[str, Path], shard_dirs: Sequence[Path], context: StageContext
) -> Stats:
    """Name the files of the shards, find duplicates over all of them, join the rejects, add up the counts."""
    shards = open_shards(shard_dirs)
    sources = add_counts(config.source, shards)
    first_broken = join_rejects(shards, context.out)
    totals: dict[str, int] = {}
    for split in SPLITS:
        num_docs, num_bytes = gather_split(shards, split, config, context.out, sources)
        totals |= {f"{split}_docs": num_docs, f"{split}_bytes": num_bytes}
    for name, counts in sources.items():
        _check_not_broken(config, name, counts, first_broken.get(name, {}))
    _check_not_empty(config, totals, sources)
    return {**totals, "sources": {name: _plain(counts) for name, counts in sources.items()}}


def _plain(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, Counter) else value for key, value in counts.items()}


def _check_not_broken(config: CorpusConfig, name: str, counts: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    if counts["broken"] > config.max_bad_ratio * counts["records"]:
        raise UserError(
            f"corpus.source.{name}: {counts['broken']} of {counts['records']} records are broken, more than "
            f"corpus.max_bad_ratio {config.max_bad_ratio} allows. The first: {first['file']}, line {first['line']}: "
            f"{first['reason']}"
        )


def _check_not_empty(config: CorpusConfig, totals: Mapping[str, int], sources: Mapping[str, dict[str, Any]]) -> None:
    num_train, num_held = totals["train_docs"], totals["held_out_docs"]
    if num_train + num_held == 0:
        left_out = sum((counts["dropped"] for counts in sources.values()), Counter[str]())
        broken = sum(counts["broken"] for counts in sources.values())
        why = [f"{number} {reason}" for reason, number in left_out.items()] + ([f"{broken} broken"] if broken else [])
        paths = [path for source in config.source.values() for path in source.paths]
        raise UserError(
            f"corpus.source {paths} holds no document with text (left out: {', '.join(why) or 'none'}). "
            "Text that is not UTF-8 is left out under corpus.undecodable=skip (convert it, or set =replace), other "
            "documents by corpus.filters"
        )
    if num_train == 0 or num_held == 0:
        empty = "training" if num_train == 0 else "evaluation"
        raise UserError(
            f"nothing is left for {empty} after the split of {num_train + num_held} documents at "
            f"corpus.held_out_fraction {config.held_out_fraction}. Add documents, or change the fraction (for example "
            "--set corpus.held_out_fraction=0.1); a .txt file gives more documents with a lower "
            "corpus.txt_document_chars"
        )
