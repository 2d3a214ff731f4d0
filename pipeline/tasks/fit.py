"""What of the settings does not fit a model: told by its record, before its weights are read."""

from collections.abc import Mapping

from pipeline.data.special_tokens import SpecialTokens
from pipeline.errors import UserError
from pipeline.tasks.config import BY_LIKELIHOOD, TAKES, TaskConfig, TasksConfig
from pipeline.tasks.questions import TaskFile
from pipeline.weights import ModelRecord

ANSWER_LENGTH = 128
"""Tokens of an answer or a program at most, unless a task says how many."""


def length_of(task: TaskConfig, record: ModelRecord) -> int:
    """Tokens that are written: unless told, of a sample all that there is room for, else half a row at most."""
    if task.length is not None:
        return task.length
    return _room(record) if task.kind == "samples" else min(ANSWER_LENGTH, record.seq_len // 2)


def _room(record: ModelRecord) -> int:
    return record.seq_len - record.target_offset


def check_fit(config: TasksConfig, files: Mapping[str, TaskFile], record: ModelRecord, special: SpecialTokens) -> None:
    """UserError for settings with which no question of a task could be asked of a model as it stands in its file."""
    if config.likelihood.guidance and record.objective != "masked_nelbo":
        what = "predicts the next token" if record.objective == "autoregressive_nll" else "is of blocks"
        names = [name for name, task in config.tasks.items() if task.kind in BY_LIKELIHOOD]
        raise UserError(
            f"likelihood.guidance is {config.likelihood.guidance}, but the model of {names[0]!r} {what}, for which it "
            "is not built; set it to 0"
        )
    for name, task in config.tasks.items():
        if "sampling" in TAKES[task.kind]:
            _check_written(f"tasks.{name}", task, files[name], record, special)


def _check_written(where: str, task: TaskConfig, file: TaskFile, record: ModelRecord, special: SpecialTokens) -> None:
    from pipeline.inference.rules import check_sampling, window_of

    room, length = _room(record), length_of(task, record) if "length" in TAKES[task.kind] else None
    if length is not None and length > room:
        raise UserError(f"{where}.length is {length}, but rows of the model have room for {room} tokens; set it lower")
    if length == record.seq_len and any(question.get("prompt") for question in file.questions):
        raise UserError(
            f"{where}.length is {length}, which leaves no room for a prompt in rows of {record.seq_len}; set it to "
            f"{record.seq_len // 2} or less, and the beginning of longer prompts is cut"
        )
    try:
        check_sampling(task.value("sampling"), record, special)
        if length is not None and record.objective == "masked_nelbo":
            window_of(task.value("sampling"), record, length)
    except UserError as error:
        raise UserError(f"{where}.sampling: {error}") from None
