"""Tasks by what a model writes: answers, gaps, programs, texts.  Each question gives one record of JSON values.

What is drawn for a question depends on its number in the file alone.  A question of which a canvas cannot be filled has
failed, for the reason that its record tells; the others are asked all the same.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.inference.filling import Canvas, Filled, drawn_ids, fill, patterned, prompted, why_not
from pipeline.inference.likelihood import LikelihoodConfig, Request, score
from pipeline.inference.sampling import SamplingConfig
from pipeline.inference.stops import before_end, before_stops
from pipeline.tasks.config import TaskConfig
from pipeline.tasks.fit import length_of
from pipeline.tasks.likelihoods import Record, mask_id
from pipeline.tasks.questions import Question

if TYPE_CHECKING:
    from pipeline.inference.model import OpenModel

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3})")


Numbered = Sequence[tuple[int, Question]]
"""Questions with their numbers in the file."""


@dataclass(frozen=True)
class Written:
    """What the masks of a canvas became."""

    drawn: list[int]
    """Ids, one for each mask."""
    ids: list[int]
    """Those of the text: what comes before the first end that is drawn."""
    text: str
    nfe: int
    num_cut: int


def match(model: "OpenModel", numbered: Numbered, task: TaskConfig) -> list[Record]:
    """What stands behind each prompt, and whether the answer taken out of it is the one that is wanted."""
    length = length_of(task, model.record)

    def canvases(number: int, question: Question) -> list[Canvas]:
        return [prompted(model, model.encode(question["prompt"]), length, mask_id(number))]

    def record(question: Question, written: Sequence[Written]) -> Record:
        (one,) = written
        text = before_stops(one.text, task.value("stop"))
        found, wanted = _taken_out(text, task.pattern), _taken_out(question["answer"], task.pattern)
        wanted = wanted if wanted is not None else _tidy(question["answer"])
        return {
            "text": text,
            "found": found,
            "wanted": wanted,
            "nfe": one.nfe,
            "cut": one.num_cut,
            "hit": found == wanted,
        }

    return _records(model, numbered, task.value("sampling"), canvases, record)


def _taken_out(text: str, pattern: str | None) -> str | None:
    """The first group of the first match, or all of it; None if there is no match."""
    if pattern is None:
        return _tidy(text)
    found = re.search(pattern, text)
    return None if found is None else _tidy(found[1] if found.re.groups else found[0])


def _tidy(text: str) -> str:
    """Without blanks around it, nor commas that group digits."""
    return _GROUPED.sub("", (text or "").strip())


def infill(model: "OpenModel", numbered: Numbered, task: TaskConfig) -> list[Record]:
    """Each middle, as many masks as it has tokens: the length is given away."""

    def canvases(number: int, question: Question) -> list[Canvas]:
        before, middle, behind = (model.encode(question[name]) for name in ("prefix", "middle", "suffix"))
        return [patterned(model, [before, len(middle), behind], mask_id(number))]

    def record(question: Question, written: Sequence[Written]) -> Record:
        (one,), middle = written, model.encode(question["middle"])
        text = model.vocabulary.decode(one.drawn)
        right = sum(new == old for new, old in zip(one.drawn, middle, strict=True))
        hit = text == question["middle"]
        return {"text": text, "hit": hit, "right": right, "tokens": len(middle), "nfe": one.nfe}

    return _records(model, numbered, task.value("sampling"), canvases, record)


def code(model: "OpenModel", numbered: Numbered, task: TaskConfig, isolation: Any) -> list[Record]:
    """How many of the programs written for each problem pass its checks, run apart from this machine."""
    from pipeline.sandbox.humaneval import Problem, cut_completion, program_of
    from pipeline.sandbox.isolation import run_many
    from pipeline.sandbox.limits import SandboxError

    num_samples, length = task.value("num_samples"), length_of(task, model.record)

    def canvases(number: int, question: Question) -> list[Canvas]:
        prompt = model.encode(question["prompt"])
        return [prompted(model, prompt, length, mask_id(number, sample)) for sample in range(num_samples)]

    def record(question: Question, written: Sequence[Written]) -> Record:
        problem = Problem(**question)
        texts = [cut_completion(one.text, task.value("stop")) for one in written]
        known: Record = {"task_id": problem.task_id, "completions": texts}
        try:
            outcomes = run_many([program_of(problem, text) for text in texts], isolation=isolation)
        except SandboxError as error:
            return {**known, "failed": f"the sandbox did not work: {error}"}
        return {
            **known,
            "passed": sum(outcome.kind == "passed" for outcome in outcomes),
            "outcomes": [[outcome.kind, _ADDRESS.sub("0x", outcome.detail)] for outcome in outcomes],
            "nfe": math.fsum(one.nfe for one in written) / num_samples,
            "cut": max(one.num_cut for one in written),
        }

    return _records(model, numbered, task.value("sampling"), canvases, record)


def samples(model: "OpenModel", numbered: Numbered, task: TaskConfig) -> list[Record]:
    """Texts from nothing; of one that ends early, what comes before its end counts."""
    length = length_of(task, model.record)

    def canvases(number: int, question: Question) -> list[Canvas]:
        return [prompted(model, (), length, mask_id(number))]

    def record(question: Question, written: Sequence[Written]) -> Record:
        (one,) = written
        return {"ids": one.ids, "text": one.text, "nfe": one.nfe}

    return _records(model, numbered, task.value("sampling"), canvases, record)


def add_scores(records: Sequence[Record], scorer: "OpenModel", is_same_tokenizer: bool, batch_rows: int) -> None:
    """-log p of each sample under a model of next tokens, in rows of its own seq_len that do not see each other."""
    size, records = scorer.record.seq_len, [record for record in records if "failed" not in record]
    parts: list[list[list[int]]] = []
    for record in records:
        ids = record["ids"] if is_same_tokenizer else scorer.encode(record["text"])
        parts.append([ids[start : start + size] for start in range(0, len(ids), size)])
    config = LikelihoodConfig(batch_rows=batch_rows)
    scores = iter(score(scorer, [Request((), row, 0) for rows in parts for row in rows], config))
    for record, rows in zip(records, parts, strict=True):
        record["scored_nats"] = math.fsum(next(scores).nats for _ in rows)
        record["scored_tokens"] = sum(map(len, rows))


def _records(
    model: "OpenModel",
    numbered: Numbered,
    sampling: SamplingConfig,
    canvases_of: Callable[[int, Question], list[Canvas]],
    record_of: Callable[[Question, Sequence[Written]], Record],
) -> list[Record]:
    """A record of each question, from what its canvases became."""
    canvases = [canvases_of(number, question) for number, question in numbered]
    reasons = [next(filter(None, (_why_not(model, one, sampling) for one in some)), "") for some in canvases]
    able = [one for some, reason in zip(canvases, reasons, strict=True) if not reason for one in some]
    found = dict(fill(model, able, sampling))
    written = (_written(model, one, found[place]) for place, one in enumerate(able))
    return [
        {"number": number, **({"failed": reason} if reason else record_of(question, [next(written) for _ in some]))}
        for (number, question), some, reason in zip(numbered, canvases, reasons, strict=True)
    ]


def _why_not(model: "OpenModel", canvas: Canvas, sampling: SamplingConfig) -> str:
    """Why a canvas cannot be filled, or nothing."""
    if model.mask_token_id not in canvas.ids:
        return "there is nothing to be written: it has no tokens"
    return why_not(model, canvas, sampling)


def _written(model: "OpenModel", canvas: Canvas, filled: Filled) -> Written:
    drawn = drawn_ids(model, canvas, filled)
    ids = before_end(drawn, model.vocabulary.special.eos_token_id)
    return Written(drawn, ids, model.vocabulary.decode(ids), filled.nfe, filled.num_cut)
