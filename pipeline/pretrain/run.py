"""From inputs to the artifact of a training: assembles what the loop (loop.py) works with.  Runs on every rank."""

import os
import statistics
from array import array
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from dlm_core.models.config import ModelConfig
from pipeline.artifact import link_or_copy, load_manifest, write_json
from pipeline.config import to_json
from pipeline.data.rows import PackedRows, open_rows
from pipeline.data.special_tokens import load_special_tokens
from pipeline.data.verified import Verified
from pipeline.errors import UserError
from pipeline.pretrain.batches import PhasedLoader
from pipeline.pretrain.checkpoint import verify_kept
from pipeline.pretrain.config import STAGE, PretrainConfig, check_init, check_lengths, check_validation
from pipeline.pretrain.engine import (
    build_engine,
    compile_blocks,
    leave_process_group,
    prepare_process,
    start_process_group,
    with_rope_base,
)
from pipeline.pretrain.fragments import local_tensors, owned
from pipeline.pretrain.guards import Guard
from pipeline.pretrain.held import EngineState
from pipeline.pretrain.initial import first_model, first_weights, initial_record
from pipeline.pretrain.loop import Progress, Training, epochs_shown, train
from pipeline.pretrain.meter import Meter
from pipeline.pretrain.ranks import Ranks
from pipeline.pretrain.routers import Routers
from pipeline.pretrain.saving import Belonging, Checkpointer, warn
from pipeline.pretrain.validation import Validator, likelihood
from pipeline.pretrain.watchdog import Watchdog
from pipeline.stage import StageContext, Stats, stage_identity
from pipeline.tracking import MetricsLog, StepLines, Tracker, WandbRun, told, whole_lines
from pipeline.training_state import checkpoint_name

METRICS_FILE = "metrics.jsonl"
_FINAL_STEPS = 50
"""Finite losses of which ``final_loss`` is the mean."""


def run(config: PretrainConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats | None:
    """Train to ``num_steps``, continuing from the newest valid checkpoint; rank 0 writes the artifact."""
    prepare_process(config.threads_per_worker)
    if config.requires_gpus and os.environ["DS_ACCELERATOR"] == "cpu":
        raise UserError(
            "pretrain.requires_gpus is true, and this worker has no GPU that torch can use: dlm doctor says why. To "
            "train on cores, set it to false"
        )
    rank = int(os.environ["RANK"])
    with Watchdog(config.watchdog, rank, config.workers, context.state, context.failed) as watchdog:
        return _run_watched(config, inputs, context, watchdog)


def _run_watched(
    config: PretrainConfig, inputs: Mapping[str, Path], context: StageContext, watchdog: Watchdog
) -> Stats | None:
    training, first_step = make_training(config, inputs, context, watchdog)
    is_first = training.ranks.rank == 0
    if is_first:
        log = training.checkpointer.log = open_log(context.state / METRICS_FILE, first_step)
        training.checkpointer.beside = [context.state / METRICS_FILE]
        with make_tracker(config, context, log, training.model_config.num_params()) as tracker:
            train(training, first_step, tracker)
    else:
        train(training, first_step, None)
    watchdog.phase("end")
    training.checkpointer.gather({config.num_steps, *training.steps_to_keep()}, watchdog.beat)
    verify_averaged(training)
    stats = write_artifact(training, open_rows(inputs["rows"])) if is_first else None
    leave_process_group()
    return stats


def make_training(
    config: PretrainConfig, inputs: Mapping[str, Path], context: StageContext, watchdog: Watchdog
) -> tuple[Training, int]:
    """All that the loop works with, in the state of the newest valid checkpoint; and the step to go on with.

    Joins the process group.  Raises UserError for inputs that don't go together or don't fit the configuration.
    """
    special = load_special_tokens(inputs["tokenizer"])
    rows = open_rows(inputs["rows"])
    if rows.stats["tokenizer"] != load_manifest(inputs["tokenizer"]).fingerprint:
        raise UserError(
            f"the rows in {inputs['rows']} were made with another tokenizer than {inputs['tokenizer']}; give the one "
            "that made them"
        )
    if "tokens" in inputs and load_manifest(inputs["tokens"]).inputs["tokenizer"] != rows.stats["tokenizer"]:
        raise UserError(
            f"the tokens in {inputs['tokens']} were made with another tokenizer than the rows in {inputs['rows']}; "
            "give those that the rows were packed from"
        )
    check_lengths(config, rows.seq_len, "pretrain")
    check_validation(config, inputs, "pretrain")
    check_init(config, inputs, "pretrain")
    record = initial_record(config, inputs, special)
    loader = PhasedLoader(config, rows, special.pad_token_id, Verified(context.state / "verified"))
    start_process_group(config.watchdog)
    model_config = ModelConfig(config.architecture, special.vocab_size, special.mask_token_id)
    model = first_model(model_config, inputs, config)
    identity = stage_identity(STAGE, config, {name: load_manifest(path).fingerprint for name, path in inputs.items()})
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    engine = build_engine(model, config, first_weights(inputs))
    ranks = Ranks(engine.device)
    checkpointer = Checkpointer(
        config, context, EngineState(engine), ranks, Belonging(context.fingerprint, identity, shapes)
    )
    watchdog.phase("restore")
    first_step = checkpointer.restore()
    guard = Guard(config, engine, warn, context.state, ranks.rank == 0)
    routers = None if config.architecture.moe is None else Routers(engine.module, config)
    if config.compile:
        compile_blocks(engine, config)
    validator = None
    if config.validation.every_steps:
        validator = Validator(config, engine, ranks, inputs["tokens"], rows.seq_len, special, watchdog.beat)
    training = Training(
        config=config,
        context=context,
        engine=engine,
        ranks=ranks,
        checkpointer=checkpointer,
        guard=guard,
        watchdog=watchdog,
        loader=loader,
        special=special,
        model_config=model_config,
        routers=routers,
        validator=validator,
        meter=Meter(config, ranks, owned(local_tensors(engine)), checkpointer.stall),
        progress=Progress(),
        initial=record,
    )
    training.go_on(checkpointer.extras)
    checkpointer.make_room()
    return training, first_step


def open_log(path: Path, first_step: int) -> MetricsLog:
    """The log of metrics, rewound to a step; warns of steps before it that were lost."""
    log = MetricsLog(path, first_step)
    if log.missing:
        num_missing = sum(map(len, log.missing))
        warn(
            f"{path} has no line of {num_missing} of the {first_step} steps before the one to go on with (steps "
            f"{told(log.missing)}): it was cut or lost by others. Training goes on; figures of the whole training "
            "will be of the lines that are there, and missing_metrics in its stats tells how many are not"
        )
    return log


def make_tracker(config: PretrainConfig, context: StageContext, log: MetricsLog, num_params: int) -> Tracker:
    """The stage's log of metrics, with lines to read along and, if it is wanted, Weights & Biases beside it."""
    lines = StepLines(config.num_steps)
    if not config.track:
        return Tracker(log, None, lines)
    details = {**to_json(config), "num_params": num_params}
    group = context.labels.get("run_id", "alone")
    return Tracker(log, WandbRun(context.state / "wandb", context.fingerprint[:12], group, details, warn), lines)


def verify_averaged(training: Training) -> None:
    """All ranks: CorruptionError unless the checkpoints to be averaged have the bytes that were saved.

    They may have lain there for weeks; the last one was written, or verified, by this process.  What was fetched from
    an object store has been verified by that.
    """
    if training.context.mirror is not None:
        return
    for step in training.steps_to_keep():
        if step != training.checkpointer.last_saved:
            checkpoint = training.context.state / checkpoint_name(step)
            verify_kept(checkpoint, training.ranks, training.watchdog.beat)


def write_artifact(training: Training, rows: PackedRows) -> Stats:
    """Link the last checkpoint and the pinned ones, the model's configuration and the metrics into the artifact."""
    config, model_config, context = training.config, training.model_config, training.context
    out, state = context.out, context.state
    averaged = training.steps_to_keep()
    for step in sorted({config.num_steps, *averaged}):
        for path in sorted((state / checkpoint_name(step)).iterdir()):
            link_or_copy(path, out / "checkpoints" / checkpoint_name(step) / path.name)
    last = config.spans[-1]
    write_json(out / "model_config.json", with_rope_base(model_config, last.rope_base))
    return {
        "num_params": model_config.num_params(),
        "seq_len": last.seq_len or rows.seq_len,
        "objective": likelihood(config, last),
        "block_size": last.block_size,
        "target_offset": config.objective.target_offset,
        "within_documents": config.objective.within_documents,
        "average_steps": averaged,
        "lineage": [] if training.initial is None else to_json(training.initial.lineage),
        "tokens": training.progress.tokens,
        **epochs_shown(training.loader, config.num_steps * config.global_batch_seqs),
        **write_metrics(state / METRICS_FILE, out / METRICS_FILE, config.num_steps, training.progress.tokens),
    }


def write_metrics(source: Path, target: Path, num_steps: int, tokens: int) -> Stats:
    """Copy the lines of metrics one by one; returns what they tell of the whole training, None where no line does."""
    losses, step_s = deque[float](maxlen=_FINAL_STEPS), array("d")
    with target.open("w") as file:
        for values, line in whole_lines(source, num_steps):
            file.write(line)
            step_s.append(values["step_s"])
            if values["loss"] is not None:
                losses.append(values["loss"])
    return {
        "final_loss": statistics.mean(losses) if losses else None,
        "tokens_per_s": tokens / num_steps / statistics.median(step_s) if step_s else None,
        "missing_metrics": num_steps - len(step_s),
    }
