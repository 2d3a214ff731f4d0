"""Two runs on the same questions: how their figures differ, and how much of that may be chance.

Both were asked the same, so the difference is taken question by question (or document by document): what makes some
questions hard for both adds nothing to its standard error.  Without torch.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dlm_core.intervals import difference_interval, error_of_difference, t_quantile
from pipeline.artifact import Manifest, checked, load_manifest, read_json
from pipeline.errors import UserError
from workflows.copies import local_copy
from workflows.report.data import likelihood_figures
from workflows.runs import committed_outputs, frozen_plan
from workflows.step import load_stage
from workflows.store import RunPlace, Store

Record = Mapping[str, Any]
_HASH_CHARS = 12


@dataclass(frozen=True)
class Difference:
    """One figure of two runs."""

    of: str
    """Step, or step and task."""
    metric: str
    unit: str
    a: float
    b: float
    se: float | None
    """Of b - a, over questions, paired; None for a single one."""
    mc_se: float | None
    """Of b - a, from the drawn masks, of which what both find hard goes out.

    None where none are drawn, and where a record is of an older version, which kept nothing of single masks.
    """
    interval: tuple[float, float] | None
    """Of b - a, 95 % over questions: Student's t, of shares ``difference_interval``."""
    p: float | None
    """McNemar's exact p, of shares: how often chance alone would make the two differ so much."""
    n: int
    """Questions that count in both."""

    @property
    def difference(self) -> float:
        """b - a."""
        return self.b - self.a


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common."""

    differences: list[Difference] = field(default_factory=list[Difference])
    notes: list[str] = field(default_factory=list[str])
    """What is not compared, and why."""


def compare(store: Store, a: RunPlace, b: RunPlace) -> Comparison:
    """Every figure that both runs have of the same questions.

    Raises UserError for tasks of one name that ask other questions, and for runs that have nothing in common.
    """
    found = Comparison()
    outputs = [_outputs(store, run) for run in (a, b)]
    for name in sorted({name for one in outputs for name in one}):
        both = [one.get(name) for one in outputs]
        if both[0] is None or both[1] is None:
            lacking = b if both[1] is None else a
            found.notes.append(f"{name}: run {lacking.run_id} has finished no such step")
            continue
        (stage, first), (other, second) = both[0], both[1]
        if stage == other == "tasks":
            _compare_tasks(name, first, second, found)
        elif stage == other:
            _compare_held_out(name, first, second, found)
    if not found.differences:
        why = "".join(f"\n  {note}" for note in found.notes)
        raise UserError(f"the runs {a.run_id} and {b.run_id} have no figures of the same questions{why}")
    return found


def _outputs(store: Store, run: RunPlace) -> dict[str, tuple[str, Path]]:
    """Step -> its stage and its artifact, of what can be compared."""
    stages = {step.name: load_stage(step.stage).name for step in frozen_plan(run).steps}
    return {
        name: (stages[name], local_copy(place))
        for name, place in committed_outputs(store, run).items()
        if stages[name] in ("tasks", "evaluate")
    }


# Tasks

Pairs = Sequence[tuple[Record, Record]]
_LIKELIHOODS = {"bpb": ("bpb", "bpb_bound"), "answer": ("answer_nll", "answer_nelbo")}
"""Figures of likelihood, and what they are called where they are exact, and where they are bounds."""
_NOT_ALIKE = "one run's figures are exact, the other's are bounds: their difference says nothing"


def _compare_tasks(step: str, a: Path, b: Path, found: Comparison) -> None:
    tables: list[dict[str, Any]] = [read_json(checked(path, "results.json"))["tasks"] for path in (a, b)]
    for name in sorted(tables[0].keys() | tables[1].keys()):
        of = f"{step}.{name}"
        if name not in tables[0] or name not in tables[1]:
            found.notes.append(f"{of}: only one of the runs has this task")
            continue
        kinds, hashes = ([table[name][key] for table in tables] for key in ("kind", "sha256"))
        if kinds[0] != kinds[1]:
            raise UserError(f"{of} is of kind {kinds[0]} in the first run and of kind {kinds[1]} in the second")
        if hashes[0] != hashes[1]:
            raise UserError(
                f"{of} asks other questions: its file has the SHA-256 {hashes[0][:_HASH_CHARS]}… in the first run and "
                f"{hashes[1][:_HASH_CHARS]}… in the second. Compare runs of one file"
            )
        if kinds[0] not in _MEASURES:
            found.notes.append(f"{of}: samples answer no questions that the two could share")
            continue
        pairs = _pairs(_records(a, name), _records(b, name))
        left_out = max(table[name]["n"] + table[name]["num_failed"] for table in tables) - len(pairs)
        if left_out:
            found.notes.append(f"{of}: {left_out} questions count in one of the runs or in none, and are left out")
        settings = [table[name]["settings"] for table in tables]
        if other := sorted(key for key in settings[0].keys() | settings[1].keys() if _differ(settings, key)):
            found.notes.append(f"{of}: the runs differ in {', '.join(other)}")
        if early := sum(any(map(_is_early, side)) for side in zip(*pairs, strict=True)):
            kept_nothing = f"{early} of the two kept nothing of single masks"
            found.notes.append(f"{of}: {kept_nothing}, so that the difference has no mc_se; ask again")
        if pairs:
            are_bounds = [any("nelbo" in metric for metric in table[name]["metrics"]) for table in tables]
            _compare_records(of, kinds[0], pairs, are_bounds, found)


def _differ(settings: Sequence[Mapping[str, Any]], key: str) -> bool:
    return settings[0].get(key) != settings[1].get(key)


def _compare_records(of: str, kind: str, pairs: Pairs, are_bounds: Sequence[bool], found: Comparison) -> None:
    """A bound is called one, and is not compared with what is exact."""
    for measure in _MEASURES[kind]:
        difference = measure(of, pairs)
        if difference.metric not in _LIKELIHOODS:
            found.differences.append(difference)
        elif are_bounds[0] == are_bounds[1]:
            name = _LIKELIHOODS[difference.metric][are_bounds[0]]
            found.differences.append(replace(difference, metric=name))
        else:
            found.notes.append(f"{of}, {difference.metric}: {_NOT_ALIKE}")


def _records(artifact: Path, task: str) -> dict[int, Record]:
    text = checked(artifact, f"{task}.jsonl").read_text(encoding="utf-8")
    return {record["number"]: record for record in map(json.loads, filter(None, text.split("\n")))}


def _pairs(a: Mapping[int, Record], b: Mapping[int, Record]) -> Pairs:
    common = sorted(a.keys() & b.keys())
    return [(a[number], b[number]) for number in common if "failed" not in a[number] and "failed" not in b[number]]


Measure = Callable[[str, Pairs], Difference]


def _share(metric: str, is_hit: Callable[[Record], bool]) -> Measure:
    def measure(of: str, pairs: Pairs) -> Difference:
        hits = [[float(is_hit(pair[side])) for pair in pairs] for side in (0, 1)]
        ones = [1.0] * len(pairs)
        found = difference_of_ratios((hits[0], ones), (hits[1], ones), are_shares=True)
        only_a = sum(one > other for one, other in zip(*hits, strict=True))
        only_b = sum(one < other for one, other in zip(*hits, strict=True))
        return Difference(of, metric, "share", *found, mcnemar_p(only_a, only_b), len(pairs))

    return measure


def _ratio(metric: str, unit: str, cost: Callable[[Record], float], size: Callable[[Record], float]) -> Measure:
    """Of costs that the record gives with their deviations, if masks were drawn for them."""

    def measure(of: str, pairs: Pairs) -> Difference:
        sides = [([cost(p[side]) for p in pairs], [size(p[side]) for p in pairs]) for side in (0, 1)]
        mc_se = None
        if not any(map(_is_early, itertools.chain(*pairs))):
            mc_se = _noise(pairs, [math.fsum(sizes) for _, sizes in sides])
        found = difference_of_ratios(sides[0], sides[1], mc_se, are_shares=unit == "share")
        return Difference(of, metric, unit, *found, None, len(pairs))

    return measure


def _is_early(record: Record) -> bool:
    """Whether masks were drawn and nothing was kept of how each of them deviates, as in an older version."""
    return "deviations" not in record and bool(np.any(record.get("mc_se", 0.0)))


def _noise(pairs: Pairs, totals: Sequence[float]) -> float | None:
    """mc_se of the difference, from deviations of masks that the two may have in common."""
    scaled = (([one / t for one in _deviations(r)] for r, t in zip(pair, totals, strict=True)) for pair in pairs)
    return math.hypot(*(error_of_difference(*both) for both in scaled)) or None


def _deviations(record: Record) -> Sequence[float]:
    """Of what a record costs: of the right answer, where there are several."""
    found: Any = record.get("deviations", ())
    return found[record["answer"]] if found and "answer" in record else found


def _cheapest_is_right(record: Record, size: str = "") -> bool:
    sizes = record[size] if size else [1] * len(record["nats"])
    costs = [nats / size for nats, size in zip(record["nats"], sizes, strict=True)]
    return bool(costs.index(min(costs)) == record["answer"])


_MEASURES: Mapping[str, Sequence[Measure]] = {
    "multiple_choice": (
        _share("acc", _cheapest_is_right),
        _share("acc_norm", lambda record: _cheapest_is_right(record, "chars")),
        _share("acc_bytes", lambda record: _cheapest_is_right(record, "bytes")),
        _ratio("answer", "nats/answer", lambda record: record["nats"][record["answer"]], lambda record: 1.0),
    ),
    "text": (_ratio("bpb", "bits/byte", lambda record: record["nats"], lambda record: record["bytes"] * math.log(2)),),
    "match": (_share("exact_match", lambda record: record["hit"]),),
    "infill": (_share("exact_match", lambda record: record["hit"]),),
    "code": (
        _ratio("pass@1", "share", lambda record: record["passed"] / len(record["completions"]), lambda record: 1.0),
    ),
}
"""Kind of task -> what is compared."""


# Held-out text


def _compare_held_out(step: str, a: Path, b: Path, found: Comparison) -> None:
    manifests = [load_manifest(path) for path in (a, b)]
    if manifests[0].inputs["corpus"] != manifests[1].inputs["corpus"]:
        found.notes.append(f"{step}: the two are of other texts (their corpora differ)")
        return
    if early := [manifest for manifest in manifests if not _has_documents(manifest)]:
        found.notes.append(f"{step}: {len(early)} of the two kept no losses by document; evaluate again")
        return
    figures = [likelihood_figures(read_json(checked(path, "results.json"))) for path in (a, b)]
    if figures[0].is_exact != figures[1].is_exact:
        found.notes.append(f"{step}: {_NOT_ALIKE}")
        return
    is_same = manifests[0].inputs["tokens"] == manifests[1].inputs["tokens"]
    units = [(figures[0].bpb, "bits/byte", True), *([(figures[0].nll, "nats/token", False)] if is_same else [])]
    for metric, unit, by_byte in units:
        first, second = (_held_out(path, by_byte) for path in (a, b))
        sides = [(losses.mean(axis=0).tolist(), sizes.tolist()) for losses, sizes in (first, second)]
        values = difference_of_ratios(sides[0], sides[1], mask_noise(first, second))
        found.differences.append(Difference(step, metric, unit, *values, None, len(first[1])))


def _has_documents(manifest: Manifest) -> bool:
    return any(file.path == _DOCUMENTS for file in manifest.files)


_DOCUMENTS = "documents.npz"
Losses = tuple[np.ndarray, np.ndarray]


def _held_out(artifact: Path, by_byte: bool) -> Losses:
    """Losses [replicate, document], and what they are divided by: tokens, or bits of a nat times bytes as tokens."""
    with np.load(checked(artifact, _DOCUMENTS)) as arrays:
        losses, tokens = arrays["losses"], arrays["tokens"].astype(np.float64)
    if not by_byte:
        return losses, tokens
    results = read_json(checked(artifact, "results.json"))
    figures = likelihood_figures(results)
    return losses, tokens * (results[figures.nll] / results[figures.bpb])


def mask_noise(a: Losses, b: Losses) -> float | None:
    """mc_se of the difference, by replicate where they pair: drawn alike, their masks are the same."""
    rates = [losses.sum(axis=1) / sizes.sum() for losses, sizes in (a, b)]
    if len(rates[0]) == len(rates[1]):
        return float((rates[1] - rates[0]).std(ddof=1)) / math.sqrt(len(rates[0])) or None
    return math.hypot(*(float(rate.std(ddof=1)) / math.sqrt(len(rate)) for rate in rates)) or None


# Figures

Ratio = tuple[Sequence[float], Sequence[float]]
"""What is added up, and what the sum is divided by the sum of."""


def difference_of_ratios(
    a: Ratio, b: Ratio, mc_se: float | None = None, *, are_shares: bool = False
) -> tuple[float, float, float | None, float | None, tuple[float, float] | None]:
    """(ratio a, ratio b, standard error of b - a over pairs, mc_se, interval of b - a).

    ``are_shares``: what is added up are shares themselves, and the sizes are 1.
    """
    n, values = len(a[0]), [math.fsum(costs) / math.fsum(sizes) for costs, sizes in (a, b)]
    if n < 2:
        return values[0], values[1], None, mc_se, None
    parts = [
        [(cost - value * size) / math.fsum(sizes) for cost, size in zip(costs, sizes, strict=True)]
        for value, (costs, sizes) in zip(values, (a, b), strict=True)
    ]
    squares = math.fsum((second - first) ** 2 for first, second in zip(*parts, strict=True))
    se = math.sqrt(squares * n / (n - 1))
    half, difference = t_quantile(float(n - 1)) * se, values[1] - values[0]
    interval = difference_interval(a[0], b[0]) if are_shares else (difference - half, difference + half)
    return values[0], values[1], se, mc_se, interval


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Probability, of a fair coin for each question that one alone gets right, of so uneven a result (McNemar, exact).

    Psychometrika 12, 1947.
    """
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def as_json(found: Comparison, a: str, b: str) -> dict[str, Any]:
    """Everything, for programs."""
    rows = [
        {
            "of": row.of, "metric": row.metric, "unit": row.unit, "a": row.a, "b": row.b, "difference": row.difference,
            "se": row.se, "mc_se": row.mc_se, "interval": row.interval and list(row.interval), "p": row.p, "n": row.n,
        }
        for row in found.differences
    ]  # fmt: skip
    return {"a": a, "b": b, "differences": rows, "notes": found.notes}
