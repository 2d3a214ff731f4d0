"""Tasks by what a model writes: answers, gaps, programs, texts.  Each question gives one record of JSON values.

What is drawn for a question depends on its number in the file alone.
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.inference.filling import Canvas, Filled, continuation, fill, prompted
from pipeline.inference.likelihood import LikelihoodConfig, Request, score
from pipeline.inference.stops import before_stops
from pipeline.tasks.config import TaskConfig
from pipeline.tasks.likelihoods import Record, mask_id
from pipeline.tasks.questions import Question

if TYPE_CHECKING:
    from pipeline.inference.model import OpenModel

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3})")


def match(model: "OpenModel", numbered: Sequence[tuple[int, Question]], task: TaskConfig) -> list[Record]:
    """What stands behind each prompt, and whether the answer taken out of it is the one that is wanted."""
    canvases = [prompted(model, model.encode(q["prompt"]), task.value("length"), mask_id(n)) for n, q in numbered]
    records: list[Record] = []
    for (number, question), canvas, filled in zip(numbered, canvases, _filled(model, canvases, task), strict=True):
        text = before_stops(_text(model, canvas, filled, task), task.value("stop"))
        found, wanted = _taken_out(text, task.pattern), _taken_out(question["answer"], task.pattern)
        records.append(
            {
                "number": number,
                "text": text,
                "found": found,
                "wanted": wanted if wanted is not None else _tidy(question["answer"]),
                "nfe": filled.nfe,
                "cut": filled.num_cut,
            }
        )
        records[-1]["hit"] = found == records[-1]["wanted"]
    return records


def _taken_out(text: str, pattern: str | None) -> str | None:
    """The first group of the first match, or all of it; None if there is no match."""
    if pattern is None:
        return _tidy(text)
    found = re.search(pattern, text)
    return None if found is None else _tidy(found[1] if found.re.groups else found[0])


def _tidy(text: str) -> str:
    """Without blanks around it, nor commas that group digits."""
    return _GROUPED.sub("", (text or "").strip())


def infill(model: "OpenModel", numbered: Sequence[tuple[int, Question]], task: TaskConfig) -> list[Record]:
    """Each middle, as many masks as it has tokens: the length is given away."""
    given = [model.vocabulary.special.eos_token_id] * model.record.target_offset
    records: list[Record] = []
    canvases: list[Canvas] = []
    middles: list[list[int]] = []
    for number, question in numbered:
        before, middle, behind = (model.encode(question[name]) for name in ("prefix", "middle", "suffix"))
        before = before or given
        row = [*before, *[model.mask_token_id] * len(middle), *behind]
        records.append({"number": number})
        if why_not := _why_not(model, len(before), len(middle), len(behind)):
            records[-1]["failed"] = why_not
            continue
        canvases.append(Canvas(row, mask_id(number)))
        middles.append(middle)
    results = iter(zip(canvases, middles, _filled(model, canvases, task), strict=True))
    for (_, question), record in zip(numbered, records, strict=True):
        if "failed" in record:
            continue
        canvas, middle, filled = next(results)
        drawn = [new for new, old in zip(filled.ids, canvas.ids, strict=True) if old == model.mask_token_id]
        text = model.vocabulary.decode(drawn)
        right = sum(new == old for new, old in zip(drawn, middle, strict=True))
        record |= {"text": text, "hit": text == question["middle"], "right": right, "tokens": len(middle)}
        record["nfe"] = filled.nfe
    return records


def _why_not(model: "OpenModel", before: int, middle: int, behind: int) -> str:
    """Why a gap cannot be filled, or nothing."""
    record = model.record
    if not middle:
        return "the middle has no tokens"
    if (total := before + middle + behind) > record.seq_len:
        return f"it has {total} tokens; rows of the model have room for {record.seq_len}"
    if model.is_autoregressive and behind:
        return "text stands behind the gap, which a model that predicts the next token does not see"
    size = record.block_size
    if size and total > -(-(before + middle) // size) * size:
        return "text stands behind the last block of the gap, which a model of blocks does not see"
    return ""


def code(
    model: "OpenModel", numbered: Sequence[tuple[int, Question]], task: TaskConfig, isolation: Any
) -> list[Record]:
    """How many of the programs written for each problem pass its checks, run apart from this machine."""
    from pipeline.sandbox.humaneval import Problem, cut_completion, program_of
    from pipeline.sandbox.isolation import run_many
    from pipeline.sandbox.limits import SandboxError

    num_samples, length = task.value("num_samples"), task.value("length")
    canvases = [
        prompted(model, model.encode(question["prompt"]), length, mask_id(number, sample))
        for number, question in numbered
        for sample in range(num_samples)
    ]
    results = iter(zip(canvases, _filled(model, canvases, task), strict=True))
    records: list[Record] = []
    for number, question in numbered:
        problem, drawn = Problem(**question), [next(results) for _ in range(num_samples)]
        texts = [cut_completion(_text(model, *one, task), task.value("stop")) for one in drawn]
        record = {"number": number, "task_id": problem.task_id, "completions": texts}
        records.append(record)
        try:
            outcomes = run_many([program_of(problem, text) for text in texts], isolation=isolation)
        except SandboxError as error:
            record["failed"] = f"the sandbox did not work: {error}"
            continue
        record["passed"] = sum(outcome.kind == "passed" for outcome in outcomes)
        record["outcomes"] = [[outcome.kind, _ADDRESS.sub("0x", outcome.detail)] for outcome in outcomes]
        record["nfe"] = math.fsum(filled.nfe for _, filled in drawn) / num_samples
        record["cut"] = max(filled.num_cut for _, filled in drawn)
    return records


def samples(model: "OpenModel", numbered: Sequence[tuple[int, Question]], task: TaskConfig) -> list[Record]:
    """Texts from nothing; of one that ends early, what comes before its end counts."""
    length = task.length or model.record.seq_len - model.record.target_offset
    canvases = [prompted(model, (), length, mask_id(number)) for number, _ in numbered]
    return [
        {
            "number": number,
            "ids": _written(model, canvas, filled, task),
            "text": _text(model, canvas, filled, task),
            "nfe": filled.nfe,
        }
        for (number, _), canvas, filled in zip(numbered, canvases, _filled(model, canvases, task), strict=True)
    ]


def add_scores(records: Sequence[Record], scorer: "OpenModel", is_same_tokenizer: bool, batch_rows: int) -> None:
    """-log p of each sample under a model of next tokens, in rows of its own seq_len that do not see each other."""
    size = scorer.record.seq_len
    parts: list[list[list[int]]] = []
    for record in records:
        ids = record["ids"] if is_same_tokenizer else scorer.encode(record["text"])
        parts.append([ids[start : start + size] for start in range(0, len(ids), size)])
    config = LikelihoodConfig(batch_rows=batch_rows)
    scores = iter(score(scorer, [Request((), row, 0) for rows in parts for row in rows], config))
    for record, rows in zip(records, parts, strict=True):
        record["scored_nats"] = math.fsum(next(scores).nats for _ in rows)
        record["scored_tokens"] = sum(map(len, rows))


def _filled(model: "OpenModel", canvases: Sequence[Canvas], task: TaskConfig) -> list[Filled]:
    found = dict(fill(model, canvases, task.value("sampling")))
    return [found[place] for place in range(len(canvases))]


def _written(model: "OpenModel", canvas: Canvas, filled: Filled, task: TaskConfig) -> list[int]:
    """Ids of a text without its end, and what is filled in behind that."""
    ids = [new for new, old in zip(filled.ids, canvas.ids, strict=True) if old == model.mask_token_id]
    end = model.vocabulary.special.eos_token_id
    return ids[: ids.index(end)] if task.value("sampling").ends_at_eos and end in ids else ids


def _text(model: "OpenModel", canvas: Canvas, filled: Filled, task: TaskConfig) -> str:
    return continuation(model, canvas, filled, ends_at_eos=task.value("sampling").ends_at_eos)
