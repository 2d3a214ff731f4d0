"""Read the sources piece by piece, split off held-out documents, write both as Arrow files of text."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import from_json
from pipeline.corpus.config import CorpusConfig, for_source
from pipeline.corpus.gather import REJECTS, add_counts, gather_split, join_rejects, open_shards
from pipeline.corpus.identity import how_a_shard_is_read
from pipeline.corpus.ledger import Ledger
from pipeline.corpus.pieces import Piece
from pipeline.corpus.plan import plan_shards
from pipeline.corpus.read import read_piece
from pipeline.corpus.split import ShardWriter
from pipeline.data.documents import SPLITS
from pipeline.errors import UserError
from pipeline.stage import Shard, StageContext, Stats, Stopped


def list_shards(config: CorpusConfig, inputs: Mapping[str, Path], context: StageContext) -> list[Shard]:
    """Runs of small files and ranges of large ones."""
    return plan_shards(config)


def run_shard(config: CorpusConfig, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> Stats:
    """Write the documents of one piece with their hashes, and its rejects; its counts."""
    own = for_source(config, shard["source"])
    piece = from_json(Piece, shard["piece"], where=shard["name"])
    with (context.out / REJECTS).open("w") as rejects:
        ledger = Ledger(rejects, partial(_stop_if_asked, context, shard["name"]))
        with ShardWriter(context.out, own, ledger) as writer:
            for document in read_piece(piece, own, ledger, shard["is_first"]):
                writer.write(document)
    _refuse_changed_filters(config, shard)
    start = 0 if piece.dataset else piece.start
    return {"source": shard["source"], "start": start, **ledger.counts()}


def _refuse_changed_filters(config: CorpusConfig, shard: Shard) -> None:
    """UserError if the files of the hooks are no longer those that the shard would be shared under."""
    own = shard.get("identity", {})
    if own and own | how_a_shard_is_read(config, shard["source"]) != own:
        raise UserError(
            f"a hook of {for_source(config, shard['source']).filters_setting}.quality has changed since the run was "
            "planned. Start a new run once it is complete"
        )


def _stop_if_asked(context: StageContext, name: str) -> None:
    if context.should_stop():
        raise Stopped(f"stopped while reading {name}")


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
    for name, counts in sources.items():
        if not config.source[name].is_held_out:
            _check_can_be_trained_on(name, counts)
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


def _check_can_be_trained_on(name: str, counts: Mapping[str, Any]) -> None:
    if counts["train_docs"] == 0:
        raise UserError(
            f"corpus.source.{name} has no document left for training (of {counts['records']} records: "
            f"{_left_out([counts], counts['held_out_docs'])}). Add documents, or take the source out; copies of "
            f"documents of an earlier source are kept under corpus.source.{name}.filters.drop_duplicates=false"
        )


def _left_out(sources: Collection[Mapping[str, Any]], num_held_out: int = 0) -> str:
    """What became of the documents that are not trained on, in words."""
    dropped = sum((counts["dropped"] for counts in sources), Counter[str]())
    numbers = {**dropped, "broken": sum(counts["broken"] for counts in sources), "held out": num_held_out}
    return ", ".join(f"{number} {what}" for what, number in numbers.items() if number) or "none"


def _check_not_empty(config: CorpusConfig, totals: Mapping[str, int], sources: Mapping[str, dict[str, Any]]) -> None:
    num_train, num_held = totals["train_docs"], totals["held_out_docs"]
    if num_train + num_held == 0:
        paths = [path for source in config.source.values() for path in source.paths]
        raise UserError(
            f"corpus.source {paths} holds no document with text (left out: {_left_out(sources.values())}). "
            "Text that is not UTF-8 is left out under corpus.undecodable=skip (convert it, or set =replace), other "
            "documents by corpus.filters"
        )
    if num_train == 0 or num_held == 0:
        empty = "training" if num_train == 0 else "evaluation"
        raise UserError(
            f"nothing is left for {empty} after the split of {num_train + num_held} documents at "
            f"corpus.held_out_fraction {config.held_out_fraction}: each goes to one side by a hash of its text. Add "
            f"documents, {'lower' if num_train == 0 else 'raise'} the fraction or take another corpus.split_seed; a "
            ".txt file gives more documents with a lower corpus.txt_document_chars"
        )
