"""The loss on held-out text while training goes on, and the search for mask rates of least variance beside it."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlm_core.blocks import num_blocks
from dlm_core.corruption import mask_within, sample_times
from dlm_core.cross_entropy import HeadLoss
from dlm_core.models.attention import AttentionMask
from dlm_core.objectives import Corrupted, InverseMaskProb, masked_targets
from dlm_core.schedules import ClippedSchedule
from dlm_core.variance import block_losses, choose_interval, clip_candidates, moment_sums
from pipeline.artifact import load_manifest
from pipeline.data.special_tokens import SpecialTokens
from pipeline.held_out import HeldOutRows, Questions, open_held_out, who_is_apart
from pipeline.pretrain.batches import Batch
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.fragments import push_masters
from pipeline.pretrain.objective import ALL_RATES
from pipeline.pretrain.phases import Span
from pipeline.pretrain.ranks import Ranks
from pipeline.scoring import Likelihood, Scoring

EXACT_NAME, BOUND_NAME = "val_nll", "val_nelbo"


def likelihood(config: PretrainConfig, span: Span) -> Likelihood:
    """How text is scored with the model that a phase trains."""
    if config.objective.kind == "autoregressive":
        return "autoregressive_nll"
    return "block_nelbo" if span.block_size else "masked_nelbo"


class Validator:
    """Scores some held-out rows on all ranks together: with the weights' averages, where the optimizer keeps them."""

    def __init__(
        self,
        config: PretrainConfig,
        engine: Any,
        ranks: Ranks,
        tokens: Path,
        packed_len: int,
        special: SpecialTokens,
        beat: Callable[[], None],
    ) -> None:
        """``beat`` is called before every forward pass, to show that there is progress."""
        self._config, self._engine, self._ranks, self._special, self._beat = config, engine, ranks, special, beat
        self._model = engine.module
        self._stream, self._packed_len = open_held_out(tokens), packed_len
        stats = load_manifest(tokens).stats
        self._bits_per_byte = stats["held_out_tokens"] / stats["held_out_bytes"] / math.log(2)
        """What a nat a token is, over all held-out text."""

    def validate(self, span: Span) -> dict[str, float]:
        """Nats a token and bits a byte: the phase's bound (``val_nelbo``, with its error) or exact loss (``val_nll``).

        The bound is a mean over ``num_replicates`` drawings of masks; its error comes from their spread.
        """
        v, o, rows = self._config.validation, self._config.objective, self._rows(span)
        chosen = self._chosen(rows)
        kind = likelihood(self._config, span)
        scoring = Scoring(kind, span.block_size, v.noise_seed, o.target_offset, o.within_documents)
        questions = Questions(rows, chosen, scoring, self._special)
        sums = torch.zeros(1 if scoring.is_exact else v.num_replicates, 2, dtype=torch.float64)
        with torch.no_grad(), self._averages():
            for indices, counts in self._passes(chosen):
                num_tokens = int((rows.lengths(indices) - scoring.target_offset).sum())
                for replicate in range(len(sums)):
                    self._beat()
                    losses = questions.ask(indices, replicate).cross_entropy(self._model, self._ranks.device)
                    sums[replicate] += counts * torch.tensor([float(losses.sum()), num_tokens])
        sums = self._ranks.sum(sums)
        means = sums[:, 0] / sums[:, 1]
        figures = {EXACT_NAME if scoring.is_exact else BOUND_NAME: float(means.mean())}
        if not scoring.is_exact:
            figures[f"{BOUND_NAME}_mc_se"] = float(means.std()) / math.sqrt(len(means))
        bits = "val_bpb" if scoring.is_exact else "val_bpb_bound"
        figures[bits] = float(means.mean()) * self._bits_per_byte
        return figures

    def search_mask_rates(self, span: Span, step: int) -> tuple[float, float]:
        """The interval of mask rates whose losses of blocks vary least on the validation rows.

        BD3-LM (arXiv 2503.09573), section 5.2: every candidate is tried on the same blocks, with the weights of the
        moment, not their averages; all ranks choose from the sums of all.
        """
        rows, size = self._rows(span), span.block_size
        chosen = self._chosen(rows)
        candidates = clip_candidates(size, self._config.objective.t_min)
        sums = torch.zeros(len(candidates), 3, dtype=torch.float64)
        num = num_blocks(rows.seq_len, size)
        t = sample_times(self._config.validation.noise_seed, step, len(chosen) * num, 0.0).view(-1, num)
        with torch.no_grad():
            for indices, counts in self._passes(chosen):
                times = t[torch.searchsorted(torch.tensor(chosen), torch.tensor(indices))]
                for number, interval in enumerate(candidates):
                    self._beat()
                    losses = self._block_losses(rows, indices, interval, size, step, times)
                    sums[number] += counts * moment_sums(losses)
        interval, _ = choose_interval(candidates, self._ranks.sum(sums))
        return ALL_RATES if interval == candidates[0] else interval  # the first is all that times can be

    @contextlib.contextmanager
    def _averages(self) -> Iterator[None]:
        """The averages of the weights in the place of the weights.

        An error leaves them there: to change them back takes all ranks, and only one of them may have failed.
        """
        if not self._config.optimizer.ema_decay:
            yield
            return
        self._exchange()
        yield
        self._exchange()

    def _exchange(self) -> None:
        self._engine.basic_optimizer.swap_ema()
        push_masters(self._engine)

    def _block_losses(
        self, rows: HeldOutRows, indices: list[int], interval: tuple[float, float], size: int, step: int, t: Tensor
    ) -> Tensor:
        """Mean weighted loss a token of every whole block of some rows at the times t [rows, blocks], flat."""
        config, special = self._config, self._special
        low, high = interval
        x0 = torch.stack([torch.from_numpy(rows.row(index, special.pad_token_id)) for index in indices])
        lengths = torch.from_numpy(rows.lengths(indices))
        is_text = torch.arange(rows.seq_len) < lengths[:, None]
        num = num_blocks(rows.seq_len, size)
        is_whole = is_text.view(len(indices), num, size).all(dim=-1)
        # Of a block cut short there may be no number of masks with a fraction inside the interval.
        maskable = is_whole.repeat_interleave(size, dim=1)
        schedule = ClippedSchedule(low, high)
        xt = mask_within(
            x0,
            schedule.mask_prob(t),
            torch.tensor(indices),
            low=0.0 if low == config.objective.t_min else low,
            high=high,
            noise_seed=config.validation.noise_seed,
            step=step,
            mask_token_id=special.mask_token_id,
            maskable=maskable,
        )
        per_token = t.repeat_interleave(size, dim=1)
        noised = Corrupted(x0, xt, per_token, is_text, maskable, special.mask_token_id)
        targets = masked_targets(noised, InverseMaskProb(schedule))
        doc_ids = who_is_apart(rows, indices, config.objective.within_documents)
        mask = AttentionMask("block_diffusion", block_size=size, doc_ids=doc_ids)
        columns, named = Batch(xt, x0, mask, targets, per_token, is_text).arguments(self._ranks.device)
        cross_entropy = HeadLoss(*self._model(*columns, **named)).cross_entropy.double().cpu()
        losses = block_losses(cross_entropy, targets, (len(indices), rows.seq_len), size)
        return losses[is_whole]

    def _rows(self, span: Span) -> HeldOutRows:
        return HeldOutRows(self._stream, span.seq_len or self._packed_len)

    def _chosen(self, rows: HeldOutRows) -> list[int]:
        """The rows that are looked at, spread evenly over the text."""
        num = min(self._config.validation.num_rows, rows.num_rows)
        return torch.linspace(0, rows.num_rows - 1, num, dtype=torch.float64).round().long().tolist()

    def _passes(self, chosen: list[int]) -> Iterator[tuple[list[int], float]]:
        """The rank's rows of every forward pass, and 1, or 0 where it only keeps the others company.

        ZeRO 3 and expert parallelism want every rank in every pass.
        """
        size, workers = self._config.rows_per_pass, self._ranks.workers
        for start in range(0, len(chosen), size * workers):
            here = start + self._ranks.rank * size
            own = chosen[here : here + size]
            yield (own, 1.0) if own else (chosen[:1], 0.0)
