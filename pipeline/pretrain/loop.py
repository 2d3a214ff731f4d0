"""The training loop, which every rank runs: batch, noise, loss, step, log, save."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dlm_core.cross_entropy import HeadLoss
from dlm_core.models.config import MaskFamily, ModelConfig
from dlm_core.objectives import NUM_T_BINS, loss_output
from pipeline.data.loader import RowBatch, prefetched
from pipeline.data.special_tokens import SpecialTokens
from pipeline.pretrain.batches import Batch, PhasedLoader, is_short, micro_batches, step_kind, step_length
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.engine import loss_scale, set_lr, with_rope_base
from pipeline.pretrain.guards import Guard, check_first_loss
from pipeline.pretrain.initial import first_loss_warning
from pipeline.pretrain.meter import Meter
from pipeline.pretrain.phases import first_step_of_kind
from pipeline.pretrain.ranks import Ranks, bits_of
from pipeline.pretrain.replicas import check_replicas
from pipeline.pretrain.routers import Globals, Routers, router_metrics
from pipeline.pretrain.saving import Checkpointer, warn
from pipeline.pretrain.validation import BOUND_NAME, EXACT_NAME, Validator, likelihood
from pipeline.pretrain.watchdog import Watchdog
from pipeline.scoring import Likelihood
from pipeline.stage import StageContext, Stopped
from pipeline.tracking import Tracker
from pipeline.training_state import checkpoint_name
from pipeline.weights import ModelRecord


@dataclass
class Progress:
    """What a training knows besides its weights; saved with them."""

    tokens: int = 0
    """Trained on so far."""
    mask_rates: tuple[float, float] | None = None
    """Found by the last search for blocks of this size; None before the first."""
    scores: dict[int, float] = field(default_factory=dict[int, float])
    """Validation losses by number of steps done, where the best checkpoints are to be averaged."""


@dataclass(frozen=True)
class Training:
    """What the loop works with."""

    config: PretrainConfig
    context: StageContext
    engine: Any
    ranks: Ranks
    checkpointer: Checkpointer
    guard: Guard
    watchdog: Watchdog
    loader: PhasedLoader
    special: SpecialTokens
    model_config: ModelConfig
    routers: Routers | None
    validator: Validator | None
    meter: Meter
    progress: Progress
    initial: ModelRecord | None = None
    """Of the weights that were given; None where they were drawn."""

    def save(self, step: int, is_last: bool = False) -> None:
        """Begin a checkpoint of everything that the steps after ``step`` depend on."""
        self.checkpointer.extras = {"guard": self.guard.state(), "progress": asdict(self.progress)}
        self.checkpointer.save(step, is_last=is_last)

    def last_saved(self) -> int:
        """Step of the newest checkpoint, once the one under way is published; all ranks must ask."""
        self.watchdog.phase("checkpoint")
        self.checkpointer.wait()
        return self.checkpointer.last_saved

    def steps_to_keep(self) -> list[int]:
        """Steps whose checkpoints are to be averaged, as far as is known."""
        return self.config.average.steps_to_keep(self.config.num_steps, self.progress.scores)

    def go_on(self, extras: Mapping[str, Any]) -> None:
        """Take up what ``save`` has kept beside the weights; nothing of a training that begins."""
        if extras:
            self.guard.restore(extras["guard"])
            kept = extras["progress"]
            self.progress.tokens = kept["tokens"]
            self.progress.scores = {int(step): score for step, score in kept["scores"].items()}
            self.checkpointer.pinned = frozenset(self.steps_to_keep())
            self.progress.mask_rates = None if kept["mask_rates"] is None else tuple(kept["mask_rates"])


def train(training: Training, first_step: int, tracker: Tracker | None) -> None:
    """Optimizer steps first_step..num_steps-1 and the last checkpoint; rank 0 tracks."""
    config, checkpointer = training.config, training.checkpointer
    steps, is_due = range(first_step, config.num_steps), False
    rank, meter = training.ranks.rank, training.meter
    resumed = {"resumed_at": first_step} if first_step else {}
    meter.start()
    with prefetched(training.loader.rank_rows(step, rank) for step in steps) as all_drawn:
        for step in steps:
            span = config.span_at(step)
            if step in (first_step, span.first_step):
                training.engine.module.config = with_rope_base(training.model_config, span.rope_base)
            if step == span.first_step:
                training.guard.forget()
                if step and config.span_at(step - 1).block_size != span.block_size:
                    training.progress.mask_rates = None  # they were found for blocks of another size
                if step == first_step_of_kind(config.spans, step):
                    training.progress.scores.clear()
            training.watchdog.phase("data", step, span.name)
            with meter.waiting_for("data"):
                drawn = next(all_drawn)
            training.watchdog.phase("step", step, step_kind(config, drawn.x0.shape[1], step))
            lr = config.optimizer.lr_at(step, config.num_steps)
            set_lr(training.engine, lr)
            is_untrained = training.guard.num_refused == step  # no update before this one was applied
            taken = take_step(training, drawn, step)
            training.guard.check(step, training.last_saved)
            if training.routers is not None and config.router_loss.bias_rate and training.guard.is_healthy:
                training.routers.move_biases(taken.routers)
            if is_untrained and math.isfinite(taken.loss):
                _look_at_first_loss(training, taken)
            saved = checkpointer.poll()
            training.progress.tokens += taken.num_tokens
            done = step + 1
            with meter.waiting_for("validation"):
                validated = validate(training, step)
            measured = meter.end_step(step, taken.num_tokens, flops_per_token(training, drawn, taken, step))
            if tracker is not None:
                shown = epochs_shown(training.loader, done * config.global_batch_seqs)
                known = {"step": step, "phase": span.name, "lr": lr, "tokens": training.progress.tokens}
                guarded = {"spike": int(training.guard.is_spike), "skipped": training.guard.num_refused}
                tracker.write({**known, **taken.metrics(), **guarded, **validated, **measured, **saved, **shown})
                figures = {"loss": taken.loss, "tokens_per_s": measured["tokens_per_s"], **resumed}
                training.context.progress(done, config.num_steps, **figures)
            is_due = is_due or done % config.checkpoint_every_steps == 0  # and stays so until the model is healthy
            kept = training.steps_to_keep()
            checkpointer.pinned = frozenset(kept)
            is_kept = done in kept
            saves = ((is_due and training.guard.is_healthy) or is_kept) and done < config.num_steps
            same = {"done": done, "saves": int(saves), "grad_norm": bits_of(taken.grad_norm)}
            stops = training.ranks.boundary(training.context.should_stop(), **same) and done < config.num_steps
            if saves or stops:
                training.watchdog.phase("checkpoint", done)
                training.save(done, is_last=stops or is_kept)
                is_due = False
            if stops:
                raise Stopped(
                    f"training was asked to stop; {done} steps are done, and {checkpoint_name(done)} is saved"
                )
    training.watchdog.phase("checkpoint", config.num_steps)
    training.save(config.num_steps, is_last=True)


def _look_at_first_loss(training: Training, taken: "StepTaken") -> None:
    """What drawn weights must give is known; of given ones only what would be odd."""
    if training.initial is None:
        check_first_loss(training.model_config, taken.first_sums())
    elif training.ranks.rank == 0 and (words := first_loss_warning(training.model_config, taken.first_sums())):
        warn(words)


def validate(training: Training, step: int) -> dict[str, float | None]:
    """Figures on held-out text after a step, if it is one at whose end they are wanted; new mask rates with them."""
    validator, every = training.validator, training.config.validation.every_steps
    done = step + 1
    if validator is None or (done % every and done != training.config.num_steps):
        return {}
    training.watchdog.phase("evaluation", step)
    span = training.config.span_at(step)
    figures = finite_or_none(validator.validate(span))
    score = figures[EXACT_NAME if EXACT_NAME in figures else BOUND_NAME]
    if training.config.average.keep == "best" and score is not None:
        training.progress.scores[done] = score
    if training.config.objective.search_mask_rates and span.block_size:
        low, high = training.progress.mask_rates = validator.search_mask_rates(span, step)
        figures |= {"mask_rate_low": low, "mask_rate_high": high}
    return figures


def flops_per_token(training: Training, drawn: RowBatch, taken: "StepTaken", step: int) -> int:
    """Operations a token of a step, with the head computed for the tokens that were asked for."""
    config = training.config
    span = config.span_at(step)
    seq_len = step_length(config, span.seq_len or drawn.x0.shape[1], step)
    families: dict[Likelihood, MaskFamily] = {
        "masked_nelbo": "full",
        "block_nelbo": "block_diffusion",
        "autoregressive_nll": "causal",
    }
    share = min(1.0, taken.num_masked / max(1, taken.num_tokens))
    family = families[likelihood(config, span)]
    return training.model_config.flops_per_token(seq_len, share, family=family, block_size=span.block_size or None)


@dataclass(frozen=True)
class StepTaken:
    """What one optimizer step saw, added over all ranks."""

    num_tokens: int
    """Valid tokens of the global batch: the denominator of the loss."""
    loss_sum: float
    nelbo_sum: float | None
    """Of the bound beside the objective, where there is one."""
    num_masked: float
    grad_norm: float
    bins: Any
    """Unweighted cross-entropy and number of masked tokens by bin of t, float64 [2 * NUM_T_BINS]."""
    routers: Any
    """Sums over the routers (``router_metrics``) [layers, 2 + experts]; None without experts."""

    @property
    def loss(self) -> float:
        """Nats a token, of the objective alone."""
        return self.loss_sum / max(1, self.num_tokens)

    def first_sums(self) -> Any:
        """Unweighted cross-entropy and number of the predicted tokens, in equally many parts."""
        return self.bins if self.bins.any() else torch.tensor([self.loss_sum, self.num_masked])

    def metrics(self) -> dict[str, float | None]:
        """The figures of the step for the log; None for what is not finite."""
        found = {"loss": self.loss, "grad_norm": self.grad_norm}
        if self.nelbo_sum is not None:
            found["nelbo"] = self.nelbo_sum / max(1, self.num_tokens)
        found |= {} if self.routers is None else router_metrics(self.routers)
        return {
            **finite_or_none(found),
            "masked_fraction": self.num_masked / max(1, self.num_tokens),
            **bin_means(self.bins),
        }


def take_step(training: Training, drawn: RowBatch, step: int) -> StepTaken:
    """Noise the rank's rows, add up the gradients of its micro batches and step."""
    config, engine, ranks, routers = training.config, training.engine, training.ranks, training.routers
    rates = training.progress.mask_rates
    batches = list(micro_batches(config, drawn, training.special, step, ranks.rank, rates))
    counts = torch.tensor([sum(int(part) for part in counted) for counted in zip(*map(_counts, batches), strict=True)])
    totals = Globals(*(int(count) for count in ranks.sum(counts)))
    scale = loss_scale(config, totals.num_tokens)
    sums = torch.zeros(3 + 2 * NUM_T_BINS, dtype=torch.float64, device=engine.device)
    router_sums: Any = 0.0
    for number, batch in enumerate(batches):
        columns, named = batch.arguments(engine.device)
        with nullcontext() if routers is None else routers.tap:
            answers = engine(*columns, **named)
        out = loss_output(HeadLoss(*answers), batch.targets)
        loss = out.loss_sum * scale
        if routers is not None:
            router_loss, found = routers.loss_and_sums(batch, totals)
            loss = loss + router_loss * (scale * totals.num_tokens)
            router_sums = router_sums + found
        engine.backward(loss)
        nelbo_sum = torch.zeros_like(out.loss_sum) if out.nelbo_sum is None else out.nelbo_sum
        parts = torch.stack([part.detach().double() for part in (out.loss_sum, out.num_masked, nelbo_sum)])
        sums += torch.cat([parts, out.bin_loss_sum.double(), out.bin_num_masked.double()])
        if number == len(batches) - 1:
            sums = ranks.sum(sums)
            loss_of_all = float(sums[0]) / max(1, totals.num_tokens)
            training.guard.before_step(step, loss_of_all, is_short=is_short(config, drawn.x0.shape[1], step))
            if (every := config.replica_check_every_steps) and step % every == 0:
                check_replicas(engine, ranks, step)
            training.checkpointer.release_state()
        engine.step()
    loss_sum, num_masked, nelbo_sum = sums[:3].tolist()
    return StepTaken(
        totals.num_tokens,
        loss_sum,
        nelbo_sum if all(batch.targets.nelbo_weight is not None for batch in batches) else None,
        num_masked,
        training.guard.grad_norm,
        sums[3:],
        None if routers is None else ranks.sum(router_sums),
    )


def finite_or_none(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Figures as JSON can hold them: None for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _counts(batch: Batch) -> tuple[Any, Any]:
    return batch.targets.num_tokens, batch.is_text.sum()


def epochs_shown(loader: PhasedLoader, sample_id: int) -> dict[str, float]:
    """Times that the rows have been shown by the samples before this one: "epochs", or "epochs_SOURCE" of a mixture."""
    shown = loader.epochs(sample_id)
    return {f"epochs_{name}" if name else "epochs": round(times, 6) for name, times in shown.items()}


def bin_means(sums: Any) -> dict[str, float]:
    """Mean cross-entropy of masked tokens by bin of t, unweighted, for the bins that had any."""
    losses, counts = sums.chunk(2)
    means = losses / counts
    return {f"ce_t{number}": round(float(mean), 5) for number, mean in enumerate(means) if math.isfinite(mean)}
