"""From the records of a task's questions to its table: figures, standard errors of two kinds, intervals.

``doc_se`` is over questions (or texts), as if others of the kind might have been asked; the noise of the masks is part
of their spread.  ``mc_se`` is the noise of the drawn masks alone, for these very questions.  An interval holds what
all questions of the kind would give with a probability of 95 %: Wilson's of a share, its form for unequal spreads of
pass@k from several programs and of the tokens of gaps (dlm_core/intervals.py), Student's t of anything else.

Sums are exact (math.fsum), of records in the order of their file: no bit depends on who made them.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, TypedDict

from dlm_core.intervals import error_of_difference, mean_interval, t_quantile, wilson_interval
from pipeline.config import identity
from pipeline.inference.likelihood import LikelihoodConfig
from pipeline.sandbox.pass_at_k import pass_at_k
from pipeline.tasks.config import BY_LIKELIHOOD, TAKES, TaskConfig
from pipeline.tasks.fit import length_of
from pipeline.weights import ModelRecord

Record = Mapping[str, Any]
_LISTED = 100


class Row(TypedDict):
    """One figure of a table."""

    value: float
    unit: str
    doc_se: float | None
    """None for a single question, and for what is no mean over questions."""
    mc_se: float | None
    interval: list[float] | None


class Table(TypedDict):
    """What is known of a task."""

    n: int
    """Questions that count."""
    num_failed: int
    failed: list[dict[str, Any]]
    """The number and the reason of each that does not count, the first hundred."""
    num_cut: int
    """Questions of which a context lost its beginning."""
    settings: dict[str, Any]
    metrics: dict[str, Row]


def table_of(task: TaskConfig, records: Sequence[Record], model: ModelRecord, config: LikelihoodConfig) -> Table:
    """The table of a task from the records of all its questions, in their order."""
    failed = [{"number": record["number"], "reason": record["failed"]} for record in records if "failed" in record]
    counted = [record for record in records if "failed" not in record]
    return {
        "n": len(counted),
        "num_failed": len(failed),
        "failed": failed[:_LISTED],
        "num_cut": sum(record.get("cut", 0) > 0 for record in counted),
        "settings": _settings(task, model, config),
        "metrics": _metrics(task, counted, model) if counted else {},
    }


def _metrics(task: TaskConfig, records: Sequence[Record], model: ModelRecord) -> dict[str, Row]:
    if task.kind == "code":
        return programs_table(records, task.value("ks"))
    return METRICS[task.kind](records, model.objective == "autoregressive_nll")


_ESTIMATORS = {
    "masked_nelbo": "bound by exact counts of masks, drawn in balance",
    "block_nelbo": "bound by the chain over blocks",
    "autoregressive_nll": "exact, each token given those before it",
}


def _settings(task: TaskConfig, model: ModelRecord, config: LikelihoodConfig) -> dict[str, Any]:
    if task.kind not in BY_LIKELIHOOD:
        given = {name: task.value(name) for name in TAKES[task.kind] if name != "file"}
        if task.kind in ("match", "code"):  # of samples null says all the room that there is
            given["length"] = length_of(task, model)
        return {"seq_len": model.seq_len, **identity(given)}
    drawn = {"num_masks": config.num_masks, "noise_seed": config.noise_seed, "guidance": config.guidance}
    is_exact = model.objective == "autoregressive_nll"
    return {"estimator": _ESTIMATORS[model.objective], "seq_len": model.seq_len, **({} if is_exact else drawn)}


# Choices


def choices_table(records: Sequence[Record], is_exact: bool) -> dict[str, Row]:
    """How often the likeliest choice is right: by its nats, and by its nats a character and a byte.

    ``turning`` is the share of questions whose best two other masks would have put the other way round.  ``mc_se`` of a
    share is that of independent questions, each of whose answers would be told right with the probability that other
    masks leave it before the best of the others.  Both by the normal law, from deviations that choices have in common.
    """
    answers = [r["answer"] for r in records]
    best = [_best_two(r) for r in records]

    def right(size: str) -> Row:
        costs = [[nats / n for nats, n in zip(r["nats"], _sizes(r, size), strict=True)] for r in records]
        hits = [one.index(min(one)) == answer for one, answer in zip(costs, answers, strict=True)]
        turned = [_turned(*_ahead(r, one, size)) for r, one in zip(records, costs, strict=True)]
        return _share(hits, math.sqrt(math.fsum(p * (1 - p) for p in turned)) / len(records))

    return {
        "acc": right(""),
        "acc_norm": right("chars"),
        "acc_bytes": right("bytes"),
        f"answer_{'nll' if is_exact else 'nelbo'}": _mean(
            [r["nats"][answer] for r, answer in zip(records, answers, strict=True)],
            "nats/answer",
            _root([error_of_difference(r["deviations"][r["answer"]]) for r in records]) / len(records),
        ),
        "margin": _mean([margin for margin, _ in best], "nats", None),
        "turning": _plain(math.fsum(_turned(*one) for one in best) / len(records), "share"),
    }


def _best_two(record: Record) -> tuple[float, float]:
    """How far the second choice is behind the best, and the error of that."""
    best, second = sorted(range(len(record["nats"])), key=record["nats"].__getitem__)[:2]
    return _behind(record, best, second, "")


def _ahead(record: Record, costs: Sequence[float], size: str) -> tuple[float, float]:
    """How far the best of the other choices is behind the right one, and the error of that."""
    others = [place for place in range(len(costs)) if place != record["answer"]]
    return _behind(record, record["answer"], min(others, key=costs.__getitem__), size)


def _behind(record: Record, one: int, other: int, size: str) -> tuple[float, float]:
    sizes = _sizes(record, size)
    nats, deviations = record["nats"], record["deviations"]
    scaled = [[deviation / sizes[place] for deviation in deviations[place]] for place in (one, other)]
    return nats[other] / sizes[other] - nats[one] / sizes[one], error_of_difference(*scaled)


def _sizes(record: Record, size: str) -> Sequence[float]:
    sizes: Sequence[float] = record[size] if size else [1.0] * len(record["nats"])
    return sizes


def _turned(margin: float, error: float) -> float:
    """Probability that other masks turn a margin round."""
    return NormalDist().cdf(-abs(margin) / error) if error else 0.0


# Texts


def texts_table(records: Sequence[Record], is_exact: bool) -> dict[str, Row]:
    """Cost of a token, of a byte, and of a word as perplexity."""
    nats, mc_se = [r["nats"] for r in records], _root([r["mc_se"] for r in records])
    nll, suffix = ("nll", "") if is_exact else ("nelbo", "_bound")
    by = {name: [r[name] for r in records] for name in ("tokens", "bytes", "words")}
    per_token = _ratio(nats, by["tokens"], "nats/token", mc_se)
    return {
        nll: per_token,
        f"ppl{suffix}": _exponential(per_token, "per token"),
        f"bpb{suffix}": _ratio(nats, [n * math.log(2) for n in by["bytes"]], "bits/byte", mc_se),
        f"word_ppl{suffix}": _exponential(_ratio(nats, by["words"], "nats/word", mc_se), "per word"),
    }


# What was written


def answers_table(records: Sequence[Record], is_exact: bool) -> dict[str, Row]:
    """How often the answer is the right one."""
    return {
        "exact_match": _share([r["hit"] for r in records], None),
        "no_answer": _share([r["found"] is None for r in records], None),
        "nfe": _mean([r["nfe"] for r in records], "passes", None),
    }


def gaps_table(records: Sequence[Record], is_exact: bool) -> dict[str, Row]:
    """How often a gap is filled as it was, and how many of its tokens are."""
    return {
        "exact_match": _share([r["hit"] for r in records], None),
        "token_acc": _share_of_parts([r["right"] for r in records], [r["tokens"] for r in records]),
        "nfe": _mean([r["nfe"] for r in records], "passes", None),
    }


def programs_table(records: Sequence[Record], ks: Sequence[int]) -> dict[str, Row]:
    """pass@k, the unbiased estimate; of one program a problem it is a share."""
    num_samples = len(records[0]["completions"])
    rows: dict[str, Row] = {}
    for k in ks:
        if num_samples == 1:
            rows["pass@1"] = _share([r["passed"] == 1 for r in records], None)
        else:
            estimates = [pass_at_k(num_samples, r["passed"], k) for r in records]
            rows[f"pass@{k}"] = _share_of_parts(estimates, [1.0] * len(estimates))
    return rows | {"nfe": _mean([r["nfe"] for r in records], "passes", None)}


def samples_table(records: Sequence[Record], is_exact: bool) -> dict[str, Row]:
    """How varied texts are, and what they cost a model of next tokens: repetition is cheap, so neither goes alone."""
    all_ids = [r["ids"] for r in records]
    rows = {
        "entropy": _mean([_entropy(Counter(ids)) for ids in all_ids], "nats/token", None),
        "unigram_entropy": _plain(_entropy(Counter(i for ids in all_ids for i in ids)), "nats/token"),
        **{f"distinct_{n}": _plain(_distinct(all_ids, n), "share") for n in (1, 2, 3)},
        "nfe": _mean([r["nfe"] for r in records], "passes", None),
    }
    if not any(r.get("scored_tokens") for r in records):  # no scorer, or no text
        return rows
    scored = _ratio([r["scored_nats"] for r in records], [r["scored_tokens"] for r in records], "nats/token", None)
    return {"gen_nll": scored, "gen_ppl": _exponential(scored, "per token"), **rows}


def _entropy(counts: Counter[int]) -> float:
    """In nats; of a text of one token it is 0."""
    total = counts.total()
    return -math.fsum(n / total * math.log(n / total) for n in counts.values()) + 0.0


def _distinct(all_ids: Sequence[Sequence[int]], n: int) -> float:
    """Different runs of n tokens over all runs of n tokens; 0 where there is none."""
    runs = [tuple(ids[start : start + n]) for ids in all_ids for start in range(len(ids) - n + 1)]
    return len(set(runs)) / max(1, len(runs))


METRICS: Mapping[str, Callable[[Sequence[Record], bool], dict[str, Row]]] = {
    "multiple_choice": choices_table,
    "text": texts_table,
    "match": answers_table,
    "infill": gaps_table,
    "samples": samples_table,
}
"""Kind of task -> (records that count, whether they are exact) -> figures by name."""


# Figures


def _plain(value: float, unit: str) -> Row:
    return {"value": value, "unit": unit, "doc_se": None, "mc_se": None, "interval": None}


def _share(hits: Sequence[bool], mc_se: float | None) -> Row:
    n = len(hits)
    share = sum(hits) / n
    low, high = wilson_interval(share, n)
    doc_se = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None
    return {"value": share, "unit": "share", "doc_se": doc_se, "mc_se": mc_se, "interval": [low, high]}


def _mean(values: Sequence[float], unit: str, mc_se: float | None) -> Row:
    return _ratio(values, [1.0] * len(values), unit, None if mc_se is None else mc_se * len(values))


def _share_of_parts(hits: Sequence[float], sizes: Sequence[float]) -> Row:
    """Of what each question has several of: unlike Student's t, its interval holds near 0 and 1 too."""
    row, weights = _ratio(hits, sizes, "share", None), [float(size) for size in sizes]
    shares = [hit / size for hit, size in zip(hits, weights, strict=True)]
    return {**row, "interval": list(mean_interval(shares, weights)) if len(shares) > 1 else None}


def _ratio(sums: Sequence[float], sizes: Sequence[float], unit: str, mc_se: float | None) -> Row:
    """Sum of sums over sum of sizes, with the standard error of such a ratio; ``mc_se`` is that of the sum of sums.

    No figure is below 0, and so no interval is, unless drawn masks put the figure itself there.
    """
    n, size = len(sums), math.fsum(sizes)
    value = math.fsum(sums) / size
    doc_se, interval = None, None
    if n > 1:
        residuals = (one - value * of_size for one, of_size in zip(sums, sizes, strict=True))
        doc_se = math.sqrt(math.fsum(r**2 for r in residuals) * n / (n - 1)) / size
        half = t_quantile(float(n - 1)) * doc_se
        interval = [max(value - half, min(value, 0.0)), value + half]
    return {
        "value": value,
        "unit": unit,
        "doc_se": doc_se,
        "mc_se": None if mc_se is None else mc_se / size,
        "interval": interval,
    }


def _exponential(row: Row, unit: str) -> Row:
    """exp of a figure, with the errors of the first order."""
    value = _exp(row["value"])
    errors = [None if error is None else value * error for error in (row["doc_se"], row["mc_se"])]
    interval = None if row["interval"] is None else [_exp(end) for end in row["interval"]]
    return {"value": value, "unit": unit, "doc_se": errors[0], "mc_se": errors[1], "interval": interval}


def _exp(value: float) -> float:
    """The largest number there is where e to the power of a value is beyond it: JSON has no infinity."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.nextafter(math.inf, 0.0)


def _root(errors: Sequence[float]) -> float:
    return math.sqrt(math.fsum(error**2 for error in errors))
