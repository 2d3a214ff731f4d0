"""The head and its loss with both gradients: our chunked one against full logits, masked rows and torch's own.

Targets are the pairs of bytes of a text; their frequencies are all that the text decides, and no path's cost depends
on them.  Times and masks are those of training: stratified t, another batch every round.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.child import in_child, peak_bytes
from benchmarks.command import Measured, Options, RefusedError, run, table
from benchmarks.interleave import interleave, median_ratio
from benchmarks.text import read_text
from dlm_core.corruption import mask_tokens, sample_times
from dlm_core.cross_entropy import masked_cross_entropy

MAX_RELATIVE_DIFFERENCE = 1e-4
"""Of loss and gradients between paths; float32 sums in different orders differ by about 1e-6."""
T_MIN = 1e-3
NOISE_SEED = 0


@dataclass(frozen=True)
class Size:
    """What is measured, and how often."""

    vocab_size: int
    seq_len: int
    batch_seqs: int
    d_model: int
    num_rounds: int
    num_rounds_plain: int
    """Rounds with the allocator left alone."""

    @property
    def num_tokens(self) -> int:
        """Of a batch."""
        return self.batch_seqs * self.seq_len


FULL = Size(vocab_size=50_257, seq_len=1024, batch_seqs=8, d_model=768, num_rounds=6, num_rounds_plain=1)
QUICK = Size(vocab_size=8_192, seq_len=256, batch_seqs=4, d_model=256, num_rounds=2, num_rounds_plain=1)
_TINY = Size(vocab_size=512, seq_len=64, batch_seqs=2, d_model=768, num_rounds=1, num_rounds_plain=0)


@dataclass(frozen=True)
class Batch:
    """Flat over the positions of a batch."""

    targets: Tensor
    is_masked: Tensor
    weight: Tensor
    """1/t of the sequence: the NELBO weight of the linear schedule."""


def _full_cross_entropy(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
    cross_entropy = F.cross_entropy(F.linear(hidden, head), batch.targets, reduction="none")
    return (cross_entropy * batch.weight * batch.is_masked).sum()


def _full_log_softmax(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
    log_probs = F.linear(hidden, head).log_softmax(-1)
    cross_entropy = -log_probs.gather(1, batch.targets[:, None]).squeeze(1)
    return (cross_entropy * batch.weight * batch.is_masked).sum()


def _full_then_rows(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
    logits = F.linear(hidden, head)[batch.is_masked]
    cross_entropy = F.cross_entropy(logits, batch.targets[batch.is_masked], reduction="none")
    return (cross_entropy * batch.weight[batch.is_masked]).sum()


def _masked_rows(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
    logits = F.linear(hidden[batch.is_masked], head)
    cross_entropy = F.cross_entropy(logits, batch.targets[batch.is_masked], reduction="none")
    return (cross_entropy * batch.weight[batch.is_masked]).sum()


def _torch(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
    select = batch.is_masked.nonzero().squeeze(1)
    targets, weight = batch.targets[select], batch.weight[select]
    return masked_cross_entropy(hidden, head, targets, weight, select=select, implementation="torch").loss_sum


def _ours(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
    select = batch.is_masked.nonzero().squeeze(1)
    return masked_cross_entropy(hidden, head, batch.targets[select], batch.weight[select], select=select).loss_sum


OURS = "ours: masked rows in chunks"
MASKED_ROWS = "masked rows"
TORCH = "masked rows, torch's chunks"
FULL_LOGITS = {
    "full logits, cross_entropy": _full_cross_entropy,
    "full logits, log_softmax": _full_log_softmax,
    "full logits, loss of masked": _full_then_rows,
}
PATHS: dict[str, Callable[[Tensor, Tensor, Batch], Tensor]] = {
    **FULL_LOGITS,
    MASKED_ROWS: _masked_rows,
    TORCH: _torch,
    OURS: _ours,
}


def _inputs(size: Size) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(size.num_tokens, size.d_model, generator=generator)
    head = torch.randn(size.vocab_size, size.d_model, generator=generator).mul_(0.02)
    return hidden.requires_grad_(), head.requires_grad_()


def _batch(size: Size, text: bytes, step: int) -> Batch:
    start = 2 * size.num_tokens * step
    pairs = torch.frombuffer(bytearray(text[start : start + 2 * size.num_tokens]), dtype=torch.uint8).long().view(-1, 2)
    mask_token_id = size.vocab_size - 1
    x0 = ((pairs[:, 0] * 256 + pairs[:, 1]) % mask_token_id).view(size.batch_seqs, size.seq_len)
    t = sample_times(NOISE_SEED, step, size.batch_seqs, T_MIN)
    ids = step * size.batch_seqs + torch.arange(size.batch_seqs)
    xt = mask_tokens(x0, t[:, None], ids, noise_seed=NOISE_SEED, step=step, mask_token_id=mask_token_id)
    weight = (1 / t).float().repeat_interleave(size.seq_len)
    return Batch(targets=x0.flatten(), is_masked=(xt == mask_token_id).flatten(), weight=weight)


def _step(path: str, hidden: Tensor, head: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """Loss and both gradients."""
    loss = PATHS[path](hidden, head, batch)
    return loss.detach(), *torch.autograd.grad(loss, [hidden, head])


@dataclass(frozen=True)
class Timed:
    """Seconds of every path in every round, and what was checked before."""

    seconds: dict[str, list[float]]
    relative_difference: dict[str, float]
    masked_share: float


def _measure_times(size: Size, text: bytes, num_rounds: int) -> Timed:
    """Time each path after one step of each; RefusedError if their losses or gradients differ."""
    hidden, head = _inputs(size)
    batches = [_batch(size, text, step) for step in range(num_rounds)]
    reference = _step(OURS, hidden, head, batches[0])
    differences = {}
    for path in PATHS:
        found = _step(path, hidden, head, batches[0])
        differences[path] = max(float((a - b).norm() / b.norm()) for a, b in zip(found, reference, strict=True))
        if not differences[path] <= MAX_RELATIVE_DIFFERENCE:
            raise RefusedError(
                f"{path!r} differs from {OURS!r} by {differences[path]:.1e} in loss or gradients; expected at most "
                f"{MAX_RELATIVE_DIFFERENCE}"
            )
        del found
    del reference
    variants = {path: lambda step, path=path: _step(path, hidden, head, batches[step]) for path in PATHS}
    return Timed(
        seconds=interleave(variants, num_rounds),
        relative_difference=differences,
        masked_share=statistics.fmean(float(batch.is_masked.float().mean()) for batch in batches),
    )


def _measure_peak(size: Size, text: bytes, path: str) -> int:
    """Peak bytes of a step of one path, above the inputs and the loaded libraries."""
    _step(path, *_inputs(_TINY), _batch(_TINY, text, 0))
    hidden, head = _inputs(size)
    batch = _batch(size, text, 0)
    return peak_bytes(lambda: _step(path, hidden, head, batch))


def _table(title: str, seconds: dict[str, list[float]], peaks: dict[str, int]) -> str:
    rows = [
        [
            path,
            f"{1e3 * statistics.median(seconds[path]):.0f}",
            f"{1e3 * min(seconds[path]):.0f}-{1e3 * max(seconds[path]):.0f}",
            f"{median_ratio(seconds[path], seconds[OURS]):.2f}",
            f"{peaks[path] / 2**20:.0f}",
            f"{peaks[path] / peaks[OURS]:.2f}",
        ]
        for path in PATHS
    ]
    return table([title, "ms", "range", "x ours", "peak MiB", "x ours"], rows)


def measure(options: Options) -> Measured:
    """Times of all paths in one process, peaks in one process each; all of it with both settings of the allocator."""
    size = QUICK if options.quick else FULL
    text = read_text(options.text, 2 * size.num_tokens * size.num_rounds)
    kept: Timed = in_child(_measure_times, size, text, size.num_rounds)
    plain: Timed = in_child(_measure_times, size, text, size.num_rounds_plain, heap=False)
    peaks = {path: in_child(_measure_peak, size, text, path, heap=False) for path in PATHS}
    peaks_kept = {path: in_child(_measure_peak, size, text, path) for path in PATHS}

    full_fastest = min(FULL_LOGITS, key=lambda path: statistics.median(kept.seconds[path]))
    full_smallest = min(FULL_LOGITS, key=lambda path: peaks[path])
    ratios = {
        "speed_vs_full_logits": median_ratio(kept.seconds[full_fastest], kept.seconds[OURS]),
        "memory_vs_full_logits": peaks[full_smallest] / peaks[OURS],
    }
    for key, path in (("masked_rows", MASKED_ROWS), ("torch", TORCH)):
        ratios[f"speed_vs_{key}"] = median_ratio(kept.seconds[path], kept.seconds[OURS])
        ratios[f"memory_vs_{key}"] = peaks[path] / peaks[OURS]
    figures = {
        "size": {key: getattr(size, key) for key in ("vocab_size", "seq_len", "batch_seqs", "d_model")},
        "dtype": "float32",
        "masked_share": round(kept.masked_share, 4),
        "full_logits_fastest": full_fastest,
        "full_logits_smallest": full_smallest,
        "relative_difference": {path: float(f"{d:.1e}") for path, d in kept.relative_difference.items()},
        "ms_freed_memory_kept": {path: [round(1e3 * s, 1) for s in kept.seconds[path]] for path in PATHS},
        "ms_plain_malloc": {path: [round(1e3 * s, 1) for s in plain.seconds[path]] for path in PATHS},
        "peak_mib_freed_memory_kept": {path: round(peaks_kept[path] / 2**20, 1) for path in PATHS},
        "peak_mib_plain_malloc": {path: round(peaks[path] / 2**20, 1) for path in PATHS},
    }
    tables = [
        _table("freed memory kept", kept.seconds, peaks_kept),
        _table("plain malloc", plain.seconds, peaks),
        "The ratios take times with freed memory kept and peaks with plain malloc; of the three with full logits, the "
        f"fastest ({full_fastest!r}) and the smallest ({full_smallest!r}).",
    ]
    return Measured(table="\n\n".join(tables), ratios=ratios, figures=figures)


if __name__ == "__main__":
    sys.exit(run("objective", measure))
