"""The section of a report about tasks: a table for each, with intervals."""

from collections.abc import Mapping
from typing import Any

from workflows.report.data import ReportData
from workflows.report.text import ABSENT, Cell, Html, Number, count, decimals, note, plain, section, table

_MEANINGS = {
    "acc": "The likeliest choice is the right one",
    "acc_norm": "The likeliest choice by character is the right one",
    "acc_bytes": "The likeliest choice by byte is the right one",
    "answer_nelbo": "Upper bound of the negative log-likelihood of the right choice",
    "answer_nll": "Negative log-likelihood of the right choice",
    "margin": "Between the likeliest choice and the second",
    "turning": "Questions whose winner other masks would turn",
    "nelbo": "Upper bound of the negative log-likelihood",
    "nll": "Negative log-likelihood, each token given those before it",
    "ppl": "exp(nll), the perplexity",
    "ppl_bound": "exp(nelbo), an upper bound of the perplexity",
    "bpb": "The likelihood by byte, comparable between tokenizers",
    "bpb_bound": "The bound by byte, comparable between tokenizers",
    "word_ppl": "Perplexity of a word",
    "word_ppl_bound": "Upper bound of the perplexity of a word",
    "exact_match": "What was written is what was wanted",
    "no_answer": "Nothing could be taken out of what was written",
    "token_acc": "Tokens that are as they were",
    "nfe": "Forward passes for a text",
    "gen_nll": "Of what was written, under the scorer; low too where it repeats itself",
    "gen_ppl": "exp(gen_nll), generative perplexity",
    "entropy": "Of the tokens of a text, on average",
    "unigram_entropy": "Of the tokens of all texts",
}
_SHOWN_FAILURES = 5


def tasks(data: ReportData) -> str:
    """What came of the questions that the model was asked."""
    parts: list[str] = []
    for name, found in data.tasks.items():
        parts += [f"<h3>{plain(name)}</h3>", _figures(found["metrics"]), note(_remark(found))]
    if not parts:
        return ""
    explanation = (
        "doc_se is over questions, as if others of the kind had been asked, and so are the intervals of 95 %: Wilson's "
        "of a share, its form for unequal spreads where a question has several parts or programs, Student's t of all "
        "else. mc_se is the noise of the drawn masks for these questions."
    )
    return section("Tasks", *parts, note(explanation))


def _figures(metrics: Mapping[str, Any]) -> str:
    numbers = ("Value", "95 %", "mc_se", "doc_se")
    head: list[Cell] = ["Figure", *map(Number, numbers), "Unit", "What it is"]
    return table(head, [_row(name, row) for name, row in metrics.items()]) if metrics else ""


def _row(name: str, row: Mapping[str, Any]) -> list[Cell]:
    ends = row["interval"]
    interval = ABSENT if ends is None else f"{decimals(ends[0])} to {decimals(ends[1])}"
    numbers = [decimals(row["value"]), interval, decimals(row["mc_se"]), decimals(row["doc_se"])]
    return [Html(f"<code>{plain(name)}</code>"), *map(Number, numbers), row["unit"], _meaning(name)]


def _meaning(name: str) -> str:
    if name.startswith("pass@"):
        return f"One of {name.removeprefix('pass@')} programs passes all checks, the unbiased estimate"
    if name.startswith("distinct_"):
        return f"Different runs of {name.removeprefix('distinct_')} tokens over all such runs"
    return _MEANINGS[name]


def _remark(found: Mapping[str, Any]) -> str:
    """How many questions count, what happened to the others, and what defines the figures."""
    told = [f"{found['kind']}, {count(found['n'])} {'question' if found['n'] == 1 else 'questions'}."]
    if found["num_failed"]:
        some = [f"{one['number']} ({one['reason']})" for one in found["failed"][:_SHOWN_FAILURES]]
        more = ", …" if found["num_failed"] > len(some) else ""
        told.append(f"{count(found['num_failed'])} do not count: {'; '.join(some)}{more}.")
    if found["num_cut"]:
        told.append(f"Of {count(found['num_cut'])} the context lost its beginning.")
    settings = [f"{name} {_short(value)}" for name, value in found["settings"].items() if value is not None]
    return " ".join([*told, f"{'; '.join(settings)}."])


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(one)}" for name, one in value.items() if one not in (None, [], False))  # pyright: ignore
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)  # pyright: ignore
