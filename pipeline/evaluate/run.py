"""Held-out NELBO, nats a token and bits a byte, beside unigram entropy and xz of the same documents.

Every shard of rows writes the loss summed by (replicate, document); the masks of a row depend only on
(noise_seed, replicate, row), so neither the number of shards nor the batch size changes a digit of the masks.
"""

import itertools
import json
import lzma
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifact import checked_files, load_manifest, write_json
from pipeline.data.documents import read_rows, text_files
from pipeline.data.shards import TokenStream, open_stream
from pipeline.data.special_tokens import load_special_tokens
from pipeline.errors import NumericsError, UserError
from pipeline.evaluate.config import EvaluateConfig
from pipeline.evaluate.rows import HeldOutRows
from pipeline.stage import Shard, StageContext, Stats
from pipeline.weights import check_tokenizer, load_denoiser, load_record

_LOSSES = "losses.npz"
XZ_PRESET = 9


def _held_out(inputs: Mapping[str, Path]) -> TokenStream:
    return open_stream(checked_files(inputs["tokens"], "held_out-*.arrow"))


def list_shards(config: EvaluateConfig, inputs: Mapping[str, Path], context: StageContext) -> list[Shard]:
    """Contiguous ranges of rows."""
    record = load_record(inputs["weights"])
    check_tokenizer(record, inputs["tokenizer"])
    made_with = {name: load_manifest(inputs["tokens"]).inputs[name] for name in ("tokenizer", "corpus")}
    for name, fingerprint in made_with.items():
        if fingerprint != load_manifest(inputs[name]).fingerprint:
            raise UserError(f"the tokens in {inputs['tokens']} were made with another {name} than {inputs[name]}")
    num_rows = HeldOutRows(_held_out(inputs), record.seq_len).num_rows
    edges = np.linspace(0, num_rows, min(config.num_shards, num_rows) + 1).astype(int).tolist()
    return [{"name": f"rows-{start:08d}", "start": start, "stop": stop} for start, stop in itertools.pairwise(edges)]


def run_shard(config: EvaluateConfig, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> Stats | None:
    """Loss sums [replicate, document] of the rows of one shard."""
    import torch

    from dlm_core.corpus_bound import stratified_counts

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    model, record = load_denoiser(inputs["weights"])
    special = load_special_tokens(inputs["tokenizer"])
    rows = HeldOutRows(_held_out(inputs), record.seq_len)
    lengths = torch.full((rows.num_rows,), rows.seq_len)
    lengths[-1] = rows.stream.num_tokens - (rows.num_rows - 1) * rows.seq_len
    counts = [stratified_counts(config.noise_seed, replicate, lengths) for replicate in range(config.num_replicates)]
    sums = torch.zeros(config.num_replicates, len(rows.stream.doc_starts) - 1, dtype=torch.float64)
    with torch.inference_mode():
        for start in range(shard["start"], shard["stop"], config.batch_rows):
            indices = list(range(start, min(start + config.batch_rows, shard["stop"])))
            for replicate in range(config.num_replicates):
                doc_ids, losses = _row_losses(model, rows, indices, replicate, counts[replicate], config, special)
                sums[replicate].index_add_(0, doc_ids, losses)
    np.savez(context.out / _LOSSES, sums=sums.numpy())
    return None


def _row_losses(
    model: Any, rows: HeldOutRows, indices: list[int], replicate: int, counts: Any, config: EvaluateConfig, special: Any
) -> tuple[Any, Any]:
    """Weighted cross-entropy of every masked token of some rows, with the document each belongs to."""
    import torch

    from dlm_core.corpus_bound import exact_count_weight
    from dlm_core.corruption import mask_exact_count
    from dlm_core.cross_entropy import token_cross_entropy

    drawn = [rows.row(i, special.pad_token_id) for i in indices]
    x0 = torch.from_numpy(np.stack([tokens for tokens, _ in drawn]))
    lengths = torch.tensor([length for _, length in drawn])
    counts = counts[indices]
    valid = torch.arange(rows.seq_len) < lengths[:, None]
    xt = mask_exact_count(
        x0,
        counts[:, None],
        torch.tensor(indices),
        noise_seed=config.noise_seed,
        step=replicate,
        mask_token_id=special.mask_token_id,
        maskable=valid,
    )
    doc_ids = torch.zeros_like(x0)
    for place, (index, length) in enumerate(zip(indices, lengths.tolist(), strict=True)):
        doc_ids[place, :length] = torch.from_numpy(rows.doc_ids(index))
    select = ((xt == special.mask_token_id) & valid).flatten().nonzero().squeeze(1)
    cross_entropy = token_cross_entropy(model(xt, select), x0.flatten()[select]).double()
    weight = exact_count_weight(lengths, counts)[select // rows.seq_len]
    return doc_ids.flatten()[select], cross_entropy * weight


def finish(
    config: EvaluateConfig, inputs: Mapping[str, Path], shard_dirs: Sequence[Path], context: StageContext
) -> Stats:
    """Add the shards up and put the yardsticks beside the bound."""
    import torch

    from dlm_core.corpus_bound import estimate_bound, unigram_entropy

    stream = _held_out(inputs)
    sums = sum(np.load(directory / _LOSSES)["sums"] for directory in sorted(shard_dirs))
    doc_tokens = torch.from_numpy(np.diff(stream.doc_starts))
    bound = estimate_bound(torch.from_numpy(np.asarray(sums)), doc_tokens)
    if not math.isfinite(bound.nelbo):
        raise NumericsError(f"the bound is {bound.nelbo}: the weights give no finite loss on the held-out text")
    text = _held_out_bytes(inputs["corpus"])
    counts = np.bincount(stream[:], minlength=stream.vocab_size)
    unigram = unigram_entropy(torch.from_numpy(counts))
    bits_per_byte = bound.bpb_bound(len(text)) / bound.nelbo
    compressed = lzma.compress(text, preset=XZ_PRESET)
    results = {
        "nelbo": bound.nelbo,
        "nelbo_mc_se": bound.mc_se,
        "nelbo_doc_se": bound.doc_se if bound.num_docs > 1 else None,
        "ppl_bound": bound.ppl_bound,
        "bpb_bound": bound.bpb_bound(len(text)),
        "bpb_bound_mc_se": bound.mc_se * bits_per_byte,
        "unigram_entropy": unigram,
        "unigram_bpb": unigram * bits_per_byte,
        "xz_bytes": len(compressed),
        "xz_bpb": 8 * len(compressed) / len(text),
        "num_bytes": len(text),
        "num_tokens": bound.num_tokens,
        "num_docs": bound.num_docs,
        "num_replicates": bound.num_replicates,
    }
    write_json(context.out / "results.json", results)
    return json.loads(json.dumps(results))


def _held_out_bytes(corpus: Path) -> bytes:
    names = itertools.chain.from_iterable(text_files(corpus, "held_out").values())
    return "".join(text for name in names for rows in read_rows(corpus, name) for text in rows.texts).encode()
