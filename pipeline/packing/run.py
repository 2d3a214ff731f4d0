"""Pack each shard of training documents into rows: an index, and the tokens in the order of the rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipeline.artifact import checked, checked_record, link_or_copy, load_manifest
from pipeline.data.packing import RowPlan, plan_rows
from pipeline.data.rows import INDEX_SUFFIX, ShardRecord, stored_tokens, write_index
from pipeline.data.shards import Segments, ShardWriter, TokenStream, open_stream
from pipeline.data.special_tokens import load_special_tokens
from pipeline.errors import UserError
from pipeline.packing.config import PackingConfig
from pipeline.stage import Shard, StageContext, Stats

_TOKENS, _INDEX = "tokens.arrow", "index.arrow"
_TOKENS_AT_ONCE = 1 << 22


def list_shards(config: PackingConfig, inputs: Mapping[str, Path], context: StageContext) -> list[Shard]:
    """One shard of rows for each shard of training tokens."""
    manifest = load_manifest(inputs["tokens"])
    if manifest.inputs.get("tokenizer") != load_manifest(inputs["tokenizer"]).fingerprint:
        raise UserError(
            f"the tokens in {inputs['tokens']} were made with another tokenizer than {inputs['tokenizer']}; give the "
            "one that made them"
        )
    num_tokens = manifest.stats["train_tokens"]
    if num_tokens < config.seq_len:
        raise UserError(
            f"seq_len is {config.seq_len}, but the training corpus has only {num_tokens} tokens. Add text to "
            "corpus.source or lower packing.seq_len"
        )
    pad_token_id = load_special_tokens(inputs["tokenizer"]).pad_token_id
    files = {record.path: record.sha256 for record in manifest.files}
    shards: list[Shard] = []
    for shard in manifest.stats["shards"]:
        if shard["split"] == "train":
            identity = {"tokens": files[f"{shard['name']}.arrow"], "pad_token_id": pad_token_id}
            shards.append({"name": shard["name"], "source": shard["source"], "identity": identity})
    return shards


def run_shard(config: PackingConfig, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> Stats:
    """Write the index of one shard's rows, and its tokens in their order unless that is the one they have."""
    stream = open_stream([checked(inputs["tokens"], f"{shard['name']}.arrow")])
    plan = plan_rows(stream.doc_lengths, config.seq_len, config.policy, config.block_size)
    write_index(context.out / _INDEX, plan)
    if not keeps_order(config):
        with ShardWriter(context.out / _TOKENS, stream.vocab_size) as writer:
            for segments in rows_in_order(stream, plan, config.seq_len, shard["identity"]["pad_token_id"]):
                writer.write(segments)
    docs = len(stream.doc_starts) - 1
    return {"rows": plan.num_rows, "docs": docs, "tokens": stream.num_tokens, "vocab_size": stream.vocab_size}


def keeps_order(config: PackingConfig) -> bool:
    """Whether rows are the documents' own tokens one after another, so that nothing has to be written again."""
    return config.policy == "concatenate" and config.block_size == 1


def rows_in_order(stream: TokenStream, plan: RowPlan, seq_len: int, pad_token_id: int) -> Iterator[Segments]:
    """The stored tokens of each row as one segment."""
    stored = stored_tokens(plan)
    padding = np.full(int(np.abs(plan.length).max(initial=0)), pad_token_id, dtype=stream[:0].dtype)
    place = stream.doc_starts[plan.document] + plan.offset
    at_once = max(1, _TOKENS_AT_ONCE // seq_len)
    for first in range(0, plan.num_rows, at_once):
        rows = slice(first, min(first + at_once, plan.num_rows))
        parts: list[np.ndarray] = []
        for row in range(rows.start, rows.stop):
            segments = slice(plan.row_starts[row], plan.row_starts[row + 1])
            for start, length in zip(place[segments].tolist(), plan.length[segments].tolist(), strict=True):
                parts.append(stream[start : start + length] if length > 0 else padding[:-length])
            if plan.length[segments.stop - 1] < 0:
                parts.pop()  # at the end of a row
        yield Segments(np.concatenate(parts), stored[rows], np.zeros(rows.stop - rows.start, dtype=np.int64))


def finish(
    config: PackingConfig, inputs: Mapping[str, Path], shard_dirs: Sequence[Path], context: StageContext
) -> Stats:
    """Gather the shards under the names of their token shards."""
    files = {record.path: record for record in load_manifest(inputs["tokens"]).files}
    records: list[ShardRecord] = []
    vocab_sizes: set[int] = set()
    for shard, directory in zip(list_shards(config, inputs, context), shard_dirs, strict=True):
        stats = load_manifest(directory).stats
        name = shard["name"]
        own = checked_record(inputs["tokens"], files[f"{name}.arrow"]) if keeps_order(config) else directory / _TOKENS
        link_or_copy(own, context.out / f"{name}.arrow")
        link_or_copy(directory / _INDEX, context.out / f"{name}{INDEX_SUFFIX}")
        vocab_sizes.add(stats["vocab_size"])
        records.append(ShardRecord(name, shard["source"], stats["rows"], stats["docs"], stats["tokens"]))
    num_tokens = sum(record.tokens for record in records)
    (vocab_size,) = vocab_sizes
    num_rows = sum(record.rows for record in records)
    return {
        "seq_len": config.seq_len,
        "vocab_size": vocab_size,
        "tokenizer": load_manifest(inputs["tokenizer"]).fingerprint,
        "rows": num_rows,
        "tokens": num_tokens,
        "padding_share": 1 - num_tokens / (num_rows * config.seq_len),
        "shards": [asdict(record) for record in records],
    }
