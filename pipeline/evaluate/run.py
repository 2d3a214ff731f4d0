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

import numpy as np

from pipeline.artifact import load_manifest, write_json
from pipeline.data.documents import read_rows, text_files
from pipeline.data.special_tokens import load_special_tokens
from pipeline.errors import NumericsError, UserError
from pipeline.evaluate.config import EvaluateConfig
from pipeline.held_out import HeldOutRows, Questions, open_held_out
from pipeline.inference.model import find_device
from pipeline.stage import Shard, StageContext, Stats
from pipeline.weights import check_tokenizer, load_denoiser, load_record

_LOSSES = "losses.npz"
DOCUMENTS_FILE = "documents.npz"
"""Losses in nats [replicate, document], and the tokens of each document that they are of."""
XZ_PRESET = 9


def list_shards(config: EvaluateConfig, inputs: Mapping[str, Path], context: StageContext) -> list[Shard]:
    """Contiguous ranges of rows."""
    record = load_record(inputs["weights"])
    check_tokenizer(record, inputs["weights"], inputs["tokenizer"])
    made_with = {name: load_manifest(inputs["tokens"]).inputs[name] for name in ("tokenizer", "corpus")}
    for name, fingerprint in made_with.items():
        if fingerprint != load_manifest(inputs[name]).fingerprint:
            raise UserError(f"the tokens in {inputs['tokens']} were made with another {name} than {inputs[name]}")
    num_rows = HeldOutRows(open_held_out(inputs["tokens"]), record.seq_len).num_rows
    edges = np.linspace(0, num_rows, min(config.num_shards, num_rows) + 1).astype(int).tolist()
    return [{"name": f"rows-{start:08d}", "start": start, "stop": stop} for start, stop in itertools.pairwise(edges)]


def run_shard(config: EvaluateConfig, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> Stats | None:
    """Loss sums [replicate, document] of the rows of one shard."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    device = find_device(config.device)
    model, record = load_denoiser(inputs["weights"])
    model.to(device)
    rows = HeldOutRows(open_held_out(inputs["tokens"]), record.seq_len)
    scoring = record.scoring(config.noise_seed)
    questions = Questions(rows, range(rows.num_rows), scoring, load_special_tokens(inputs["tokenizer"]))
    sums = torch.zeros(config.num_replicates, len(rows.stream.doc_starts) - 1, dtype=torch.float64)
    num_drawn = 1 if scoring.is_exact else config.num_replicates
    with torch.inference_mode():
        for start in range(shard["start"], shard["stop"], config.batch_rows):
            indices = list(range(start, min(start + config.batch_rows, shard["stop"])))
            doc_ids = torch.from_numpy(rows.doc_ids(indices)).flatten()
            for replicate in range(num_drawn):
                question = questions.ask(indices, replicate)
                places = question.select + record.target_offset
                sums[replicate].index_add_(0, doc_ids[places], question.cross_entropy(model, device))
    sums[num_drawn:] = sums[0]
    np.savez(context.out / _LOSSES, sums=sums.numpy())
    return None


def finish(
    config: EvaluateConfig, inputs: Mapping[str, Path], shard_dirs: Sequence[Path], context: StageContext
) -> Stats:
    """Add the shards up and put the yardsticks beside the bound."""
    import torch

    from dlm_core.corpus_bound import estimate_bound, unigram_entropy

    stream = open_held_out(inputs["tokens"])
    sums = sum(np.load(directory / _LOSSES)["sums"] for directory in sorted(shard_dirs))
    record = load_record(inputs["weights"])
    doc_tokens = HeldOutRows(stream, record.seq_len).asked_of_documents(record.target_offset)
    np.savez(context.out / DOCUMENTS_FILE, losses=np.asarray(sums), tokens=doc_tokens)
    bound = estimate_bound(torch.from_numpy(np.asarray(sums)), torch.from_numpy(doc_tokens))
    if not math.isfinite(bound.nelbo):
        raise NumericsError(f"the bound is {bound.nelbo}: the weights give no finite loss on the held-out text")
    text = _held_out_bytes(inputs["corpus"])
    counts = np.bincount(stream[:], minlength=stream.vocab_size)
    unigram = unigram_entropy(torch.from_numpy(counts))
    bits_per_byte = stream.num_tokens / len(text) / math.log(2)  # of a nat a token, as if those given cost as much
    compressed = lzma.compress(text, preset=XZ_PRESET)
    is_exact = record.objective == "autoregressive_nll"
    nll, ppl, bpb = ("nll", "ppl", "bpb") if is_exact else ("nelbo", "ppl_bound", "bpb_bound")
    results = {
        nll: bound.nelbo,
        f"{nll}_mc_se": bound.mc_se,
        f"{nll}_mc_interval": list(bound.mc_interval),
        f"{nll}_doc_se": bound.doc_se if bound.num_docs > 1 else None,
        ppl: bound.ppl_bound,
        bpb: bound.nelbo * bits_per_byte,
        f"{bpb}_mc_se": bound.mc_se * bits_per_byte,
        "unigram_entropy": unigram,
        "unigram_bpb": unigram * bits_per_byte,
        "xz_bytes": len(compressed),
        "xz_bpb": 8 * len(compressed) / len(text),
        "num_bytes": len(text),
        "num_tokens": bound.num_tokens,
        "num_given_tokens": stream.num_tokens - bound.num_tokens,
        "num_docs": bound.num_docs,
        "num_replicates": bound.num_replicates,
    }
    write_json(context.out / "results.json", results)
    return json.loads(json.dumps(results))


def _held_out_bytes(corpus: Path) -> bytes:
    names = itertools.chain.from_iterable(text_files(corpus, "held_out").values())
    return "".join(text for name in names for rows in read_rows(corpus, name) for text in rows.texts).encode()
