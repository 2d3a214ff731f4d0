"""The training loop: batch, noise, loss, step, log, save.  Runs on every rank of the gang."""

import errno
import json
import math
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import FileRecord, link_or_copy, load_manifest, write_json
from pipeline.config import to_json
from pipeline.data.loader import Loader, RowBatch, prefetched
from pipeline.data.rows import PackedRows, open_rows
from pipeline.data.special_tokens import SpecialTokens, load_special_tokens
from pipeline.data.verified import Verified
from pipeline.errors import LeaseLostError, NumericsError, UserError, is_disk_full
from pipeline.pretrain.checkpoint import (
    DEEPSPEED_TAG,
    Topology,
    check_topology,
    checkpoint_name,
    clear_staging,
    free_bytes,
    newest_valid,
    publish,
    retain,
)
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.engine import (
    build_engine,
    leave_process_group,
    loss_scale,
    prepare_process,
    set_lr,
    start_process_group,
)
from pipeline.stage import StageContext, Stats, Stopped, environment
from pipeline.tracking import MetricsLog, Tracker, WandbRun

if TYPE_CHECKING:
    from dlm_core.models.config import ModelConfig

METRICS_FILE = "metrics.jsonl"
_FIRST_LOSS_ROUNDING = 0.01
"""Share of the expected first loss that narrow dtypes and what lies in the row may move it by."""
_SPACE_FACTOR = 1.1
"""Free space wanted before a save, in sizes of the last checkpoint."""


def run(config: PretrainConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats | None:
    """Train to ``num_steps``, continuing from the newest valid checkpoint; rank 0 writes the artifact."""
    prepare_process(config.threads_per_worker)
    import torch.distributed as dist

    from dlm_core.models.config import ModelConfig
    from dlm_core.models.transformer import Denoiser

    special = load_special_tokens(inputs["tokenizer"])
    rows = open_rows(inputs["rows"])
    if rows.stats["tokenizer"] != load_manifest(inputs["tokenizer"]).fingerprint:
        raise UserError(
            f"the rows in {inputs['rows']} were made with another tokenizer than {inputs['tokenizer']}; give the one "
            "that made them"
        )
    if config.short_step_share and config.short_step_min >= rows.seq_len:
        raise UserError(
            f"pretrain.short_step_min is {config.short_step_min}, but rows have {rows.seq_len} tokens: no step would "
            "be shorter. Lower it, or set pretrain.short_step_share=0"
        )
    verified = Verified(context.state / "verified")
    loader = Loader(rows, config.data_seed, special.pad_token_id, config.mixture, verified)
    start_process_group()
    model_config = ModelConfig(config.architecture, special.vocab_size, special.mask_token_id)
    model = Denoiser(model_config)
    model.init_weights(config.init_seed)
    engine = build_engine(model, config)
    training = Training(config, context, engine, dist.get_rank())
    first_step = training.restore()
    if training.rank == 0:
        with training.tracker(first_step, model_config.num_params()) as tracker:
            train(training, model_config, loader, special, first_step, tracker)
    else:
        train(training, model_config, loader, special, first_step, None)
    training.save(config.num_steps, is_last=True)
    stats = training.write_artifact(model_config, rows, loader) if training.rank == 0 else None
    leave_process_group()
    return stats


def train(
    training: "Training",
    model_config: "ModelConfig",
    loader: Loader,
    special: SpecialTokens,
    first_step: int,
    tracker: Tracker | None,
) -> None:
    """Optimizer steps first_step..num_steps-1."""
    from pipeline.pretrain.batches import rank_rows

    config = training.config
    tokens = training.tokens_before
    steps = range(first_step, config.num_steps)
    with prefetched(rank_rows(config, loader, step, training.rank) for step in steps) as all_drawn:
        for step in steps:
            start_s = time.monotonic()
            drawn = next(all_drawn)
            lr = config.optimizer.lr_at(step, config.num_steps)
            set_lr(training.engine, lr)
            taken = take_step(training, drawn, special, step)
            training.guard(step, taken.loss_sum, taken.grad_norm)
            if step == 0:
                check_first_loss(model_config, taken.bins)
            elapsed_s = time.monotonic() - start_s
            tokens += taken.num_tokens
            done = step + 1
            if tracker is not None:
                shown = epochs_shown(loader, done * config.global_batch_seqs)
                known = {"step": step, "lr": lr, "tokens": tokens, "step_s": round(elapsed_s, 4)}
                tracker.write({**known, **taken.metrics(), **shown})
                figures = {"loss": taken.loss, "tokens_per_s": taken.num_tokens / elapsed_s}
                training.context.progress(done, config.num_steps, **figures)
            if done < config.num_steps and done % config.checkpoint_every_steps == 0 and training.is_healthy:
                training.save(done)
            if training.agree_to_stop() and done < config.num_steps:
                training.save(done, is_last=True)
                raise Stopped(f"training was asked to stop after step {done} and saved a checkpoint")


@dataclass(frozen=True)
class StepTaken:
    """What one optimizer step saw, summed over all ranks."""

    num_tokens: int
    """Valid tokens of the global batch: the denominator of the loss."""
    loss_sum: float
    num_masked: float
    grad_norm: float
    bins: Any
    """Unweighted cross-entropy and number of masked tokens by bin of t, float64 [2 * NUM_T_BINS]."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.loss_sum / self.num_tokens

    def metrics(self) -> dict[str, float | None]:
        """The figures of the step for the log; None for what is not finite."""
        finite = {"loss": self.loss, "grad_norm": self.grad_norm}
        return {
            **{name: value if math.isfinite(value) else None for name, value in finite.items()},
            "masked_fraction": self.num_masked / self.num_tokens,
            **bin_means(self.bins),
        }


def take_step(training: "Training", drawn: RowBatch, special: SpecialTokens, step: int) -> StepTaken:
    """Noise the rank's rows, add up the gradients of its micro batches and step."""
    import torch

    from dlm_core.cross_entropy import HeadLoss
    from dlm_core.objectives import NUM_T_BINS, loss_output
    from pipeline.pretrain.batches import micro_batches

    config, engine = training.config, training.engine
    batches = list(micro_batches(config, drawn, special, step, training.rank))
    num_tokens = int(training.sum_over_ranks(sum(batch.targets.num_tokens for batch in batches)))
    totals = torch.zeros(2 + 2 * NUM_T_BINS, dtype=torch.float64)
    for batch in batches:
        asked = batch.targets
        columns = (batch.noised.xt, asked.select, asked.targets, asked.weight)
        out = loss_output(HeadLoss(*engine(*(column.to(engine.device) for column in columns))), asked)
        engine.backward(out.loss_sum * loss_scale(config, num_tokens))
        engine.step()
        sums = torch.stack([out.loss_sum.detach(), out.num_masked])
        totals += torch.cat([sums, out.bin_loss_sum, out.bin_num_masked]).double().cpu()
    totals = training.sum_over_ranks(totals)
    loss_sum, num_masked = totals[:2].tolist()
    grad_norm = float(engine.get_global_grad_norm() or 0.0)
    return StepTaken(num_tokens, loss_sum, num_masked, grad_norm, totals[2:])


def epochs_shown(loader: Loader, sample_id: int) -> dict[str, float]:
    """Times that the rows have been shown by the samples before this one: "epochs", or "epochs_SOURCE" of a mixture."""
    shown = loader.epochs(sample_id)
    return {f"epochs_{name}" if name else "epochs": round(times, 6) for name, times in shown.items()}


def check_first_loss(model_config: "ModelConfig", sums: Any) -> None:
    """NumericsError if an untrained model's loss of masked tokens is not what its initial weights must give.

    Between log(vocab_size - 1), a uniform prediction, and ``expected_initial_loss``: by Jensen's inequality on either
    side, for logits that know nothing of the target.  They have the variance  s^2 = 2 (expected - log(vocab_size - 1));
    the mean at the targets moves by s times the root of sum_v frequency_v^2, below 1/4 for text, and by s / sqrt(number
    of masked tokens): four times either is let through.
    """
    from dlm_core.models.init import expected_initial_loss

    loss, num_masked = (float(part.sum()) for part in sums.chunk(2))
    low, high = math.log(model_config.vocab_size - 1), expected_initial_loss(model_config)
    slack = math.sqrt(2 * (high - low)) * (1 + 4 / math.sqrt(max(1.0, num_masked))) + _FIRST_LOSS_ROUNDING * high
    if num_masked and not low - slack <= loss / num_masked <= high + slack:
        raise NumericsError(
            f"the first loss is {loss / num_masked:.3f} nats a masked token; an untrained model of this configuration "
            f"has {low:.3f} to {high:.3f}. The weights, the data or the loss are not what they should be"
        )


def bin_means(sums: Any) -> dict[str, float]:
    """Mean cross-entropy of masked tokens by bin of t, unweighted, for the bins that had any."""
    losses, counts = sums.chunk(2)
    means = losses / counts
    return {f"ce_t{number}": round(float(mean), 5) for number, mean in enumerate(means) if math.isfinite(mean)}


class Training:
    """What the loop calls besides the mathematics: restore, save, guard, agree."""

    def __init__(self, config: PretrainConfig, context: StageContext, engine: Any, rank: int) -> None:
        self.config, self.context, self.engine, self.rank = config, context, engine, rank
        self.topology = Topology(config.workers, config.zero_stage, config.precision)
        self._consecutive_skips = 0
        self._skipped_before = 0
        self._log: MetricsLog | None = None
        self.tokens_before = 0
        """Tokens trained on before this start; known to rank 0."""
        self._last_saved = -1
        self._last_size_bytes = 0

    def sum_over_ranks(self, value: Any) -> Any:
        """All-reduced copy of a tensor of counts or sums."""
        import torch.distributed as dist

        total = value.clone().to(self.engine.device)
        dist.all_reduce(total)
        return total.cpu()

    def _broadcast(self, value: Any) -> Any:
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.engine.device)
        return box[0]

    def warn(self, message: str) -> None:
        """Say something on the stage's log that a person should read."""
        print(f"warning: {message}", flush=True)  # noqa: T201

    def tracker(self, first_step: int, num_params: int) -> Tracker:
        """The stage's log of metrics, rewound to the step that training continues from."""
        self._log = log = MetricsLog(self.context.state / METRICS_FILE, first_step)
        self.tokens_before = log.last.get("tokens", 0)
        if not self.config.track:
            return Tracker(log, None)
        details = {**to_json(self.config), "num_params": num_params}
        group = self.context.labels.get("run_id", "alone")
        wandb_dir = self.context.state / "wandb"
        return Tracker(log, WandbRun(wandb_dir, self.context.fingerprint[:12], group, details, self.warn))

    def restore(self) -> int:
        """Load the newest valid checkpoint, chosen by rank 0 for all; returns the step to go on with."""
        choice: Any = None
        if self.rank == 0:
            clear_staging(self.context.state)
            try:
                choice = newest_valid(self.context.state, self.warn)
            except Exception as error:  # noqa: BLE001 - carried to every rank, raised there
                choice = error
        choice = self._broadcast(choice)
        if isinstance(choice, Exception):
            raise choice
        if choice is None:
            return 0
        path, manifest = choice
        if manifest.fingerprint != self.context.fingerprint:
            raise UserError(
                f"{path} belongs to another training ({manifest.fingerprint[:12]}, this one is "
                f"{self.context.fingerprint[:12]}); choose another directory or delete it"
            )
        check_topology(manifest.topology, self.topology)
        loaded, client_state = self.engine.load_checkpoint(str(path), tag=DEEPSPEED_TAG)
        assert loaded is not None, f"DeepSpeed found no checkpoint in {path}"
        assert client_state["dlm_step"] == manifest.step
        self._last_saved = manifest.step
        self._last_size_bytes = sum(record.size_bytes for record in manifest.files)
        self._skipped_before = self.engine.skipped_steps
        print(f"continuing after step {manifest.step} from {path.name}", flush=True)  # noqa: T201
        return manifest.step

    def agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop: all of them decide alike."""
        import torch

        return bool(self.sum_over_ranks(torch.tensor([float(self.context.should_stop())])) > 0)

    def guard(self, step: int, loss_sum: float, grad_norm: float) -> None:
        """Count steps that DeepSpeed skipped for a non-finite gradient; stop after too many in a row."""
        skipped = self.engine.skipped_steps > self._skipped_before
        self._skipped_before = self.engine.skipped_steps
        finite = math.isfinite(loss_sum) and math.isfinite(grad_norm)
        self._consecutive_skips = 0 if finite and not skipped else self._consecutive_skips + 1
        if self._consecutive_skips:
            self.warn(f"step {step} had a non-finite loss or gradient")
        if self._consecutive_skips >= self.config.max_skipped_steps:
            raise NumericsError(
                f"{self._consecutive_skips} steps in a row up to step {step} had a non-finite loss or gradient. "
                "Lower pretrain.optimizer.lr, lengthen the warm-up, or use precision fp32; the last checkpoint "
                f"is of step {max(self._last_saved, 0)}"
            )

    @property
    def is_healthy(self) -> bool:
        """Whether the last step was finite: a diverging model must not push out the last good checkpoint."""
        return self._consecutive_skips == 0

    def save(self, step: int, is_last: bool = False) -> None:
        """Publish a checkpoint after ``step`` steps, on all ranks or on none."""
        if step == self._last_saved:
            return
        import torch.distributed as dist

        from pipeline.pretrain.writer import write_checkpoint

        state = self.context.state
        start_s = time.monotonic()
        name, problem = self._broadcast(self._plan_save(step) if self.rank == 0 else None)
        if problem is not None:
            self._save_failed(step, problem, is_last)
            return
        staging = state / name
        problem = write_checkpoint(self.engine, staging, DEEPSPEED_TAG, {"dlm_step": step})
        records: list[FileRecord] = []
        if problem is None:
            try:
                records = self._own_records(staging)
            except (OSError, RuntimeError) as error:
                problem = error
        gathered: list[Any] = [None] * self.config.workers
        dist.all_gather_object(gathered, (problem, records))
        problems = [p for p, _ in gathered if p is not None]
        if not problems and self.rank == 0:
            try:
                everything = [record for _, found in gathered for record in found]
                self.context.fence()
                if self._log is not None and step < self.config.num_steps:
                    self._log.sync()  # a checkpoint must not outlive the metrics of its steps
                final = state / checkpoint_name(step)
                publish(staging, final, step, self.context.fingerprint, self.topology, everything, environment())
                self._last_size_bytes = sum(record.size_bytes for record in everything)
            except (OSError, RuntimeError) as error:
                problem = error
        problem = self._broadcast(problems[0] if problems else problem)
        if problem is not None:
            if self.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            self._save_failed(step, problem, is_last)
            return
        self._last_saved = step
        if self.rank == 0:
            retain(state, self.config.keep_checkpoints)
        print(f"checkpoint of step {step} in {time.monotonic() - start_s:.2f} s", flush=True)  # noqa: T201

    def _save_failed(self, step: int, problem: BaseException, is_last: bool) -> None:
        """Raise for the last save, a full disk and a lost lease; after any other training goes on."""
        if is_disk_full(problem):
            raise OSError(
                errno.ENOSPC,
                f"the checkpoint of step {step} does not fit on the disk of {self.context.state} ({problem}); "
                f"free some space and resume: training goes on after step {max(self._last_saved, 0)}",
            ) from problem
        if isinstance(problem, LeaseLostError) or is_last:
            raise problem
        self.warn(f"the checkpoint of step {step} failed ({problem}); training goes on from memory")

    def _plan_save(self, step: int) -> tuple[str, OSError | None]:
        """Name of the staging directory, and what stands in the way of filling it."""
        name = f"staging-{step:08d}-{time.time_ns()}"
        wanted, free = _SPACE_FACTOR * self._last_size_bytes, free_bytes(self.context.state)
        if free < wanted:
            return name, OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB are free, {wanted / 1e6:.0f} MB are wanted")
        return name, None

    def _own_records(self, staging: Path) -> list[FileRecord]:
        """Records of the files this rank wrote: those with its number, and for rank 0 all without one."""
        from pipeline.artifact import list_files, record_file

        own: list[FileRecord] = []
        for relative in list_files(staging):
            owner = 0
            if "zero_pp_rank_" in relative.name:
                owner = int(relative.name.split("zero_pp_rank_")[1].split("_")[0])
            if owner == self.rank:
                own.append(record_file(staging, relative))
        return own

    def write_artifact(self, model_config: Any, rows: PackedRows, loader: Loader) -> Stats:
        """Link the last checkpoint, the model's configuration and the metrics into the artifact."""
        out, state = self.context.out, self.context.state
        checkpoint = state / checkpoint_name(self.config.num_steps)
        for path in sorted(checkpoint.rglob("*")):
            if path.is_file():
                name = "checkpoint.json" if path.parent == checkpoint else f"checkpoint/{path.relative_to(checkpoint)}"
                link_or_copy(path, out / name)
        write_json(out / "model_config.json", model_config)
        shutil.copyfile(state / METRICS_FILE, out / METRICS_FILE)
        lines = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(self.config.num_steps))
        tail = [line["loss"] for line in lines[-50:] if line["loss"] is not None]
        step_s = statistics.median(line["step_s"] for line in lines)
        return {
            "num_params": model_config.num_params(),
            "seq_len": rows.seq_len,
            "tokens": lines[-1]["tokens"],
            **epochs_shown(loader, self.config.num_steps * self.config.global_batch_seqs),
            "final_loss": sum(tail) / max(1, len(tail)),
            "tokens_per_s": lines[-1]["tokens"] / self.config.num_steps / step_s,
        }
