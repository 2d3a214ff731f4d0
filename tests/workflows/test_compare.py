"""``dlm compare``: differences question by question, from what the two runs wrote down."""

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlm_core.intervals import difference_interval, t_quantile
from pipeline.artifact import MANIFEST, load_manifest, record_file, write_json
from pipeline.inference.likelihood import LikelihoodConfig
from pipeline.tasks.config import TaskConfig
from pipeline.tasks.run import read_records
from tests.support.asked_runs import Asked
from tests.support.executors import Inline
from tests.support.questions import CONFIG, both, choices, texts, write
from tests.support.toy_workflow import coordinate
from tests.workflows.conftest import Dlm
from workflows import runs
from workflows.comparison import difference_of_ratios, mask_noise, mcnemar_p
from workflows.plan import Plan
from workflows.store import Store

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def asked(tmp_path: Path, tokenizer_file: Path) -> Asked:
    return Asked(tmp_path, tokenizer_file)


def finish(store: Store, run_id: str, plan: Plan) -> dict[str, Path]:
    """A run to its end; its artifacts."""
    states = coordinate(store, runs.create_run(store, plan, "local", run_id), Inline)
    return {name: state.output.path for name, state in states.items() if state.output}


def rows_of(dlm: Dlm, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
    done = dlm("compare", *arguments, "--json")
    assert done.code == 0, done.stderr
    return {(row["of"], row["metric"]): row for row in json.loads(done.stdout)["differences"]}


def test_differences_are_those_of_the_records_taken_pair_by_pair(
    tmp_path: Path, store: Store, asked: Asked, dlm: Dlm
) -> None:
    config = both(tmp_path)
    outputs = [finish(store, name, asked.plan(config, name, evaluates=True)) for name in ("a", "bbb")]
    rows = rows_of(dlm, "a", "bbb")

    which = [read_records(output["tasks"] / "which.jsonl") for output in outputs]
    n = len(which[0])
    for metric in ("acc", "acc_norm", "acc_bytes"):
        results = [json.loads((output["tasks"] / "results.json").read_text())["tasks"]["which"] for output in outputs]
        row = rows["tasks.which", metric]
        assert [row["a"], row["b"], row["n"]] == [*(r["metrics"][metric]["value"] for r in results), n]
    costs = [[np.divide(one["nats"], one["bytes"]) for one in side] for side in which]
    hits = [
        [int(cost.argmin()) == one["answer"] for cost, one in zip(sides, side, strict=True)]
        for sides, side in zip(costs, which, strict=True)
    ]
    acc = rows["tasks.which", "acc_bytes"]
    differences = [second - first for first, second in zip(*hits, strict=True)]
    assert any(differences), "a weak test"
    assert acc["difference"] == pytest.approx(sum(differences) / n, rel=1e-12)
    assert acc["se"] == pytest.approx(np.std(differences, ddof=1) / math.sqrt(n), rel=1e-12)
    assert acc["p"] == mcnemar_p(differences.count(-1), differences.count(1))
    half = t_quantile(float(n - 1)) * acc["se"]
    first, second = ([float(hit) for hit in side] for side in hits)
    around = [max(acc["difference"] - half, -1.0), min(acc["difference"] + half, 1.0)]
    assert acc["interval"] == pytest.approx(around, abs=0.3 * half)  # drawn towards 0, and somewhat wider
    assert acc["interval"] == pytest.approx(difference_interval(first, second), rel=1e-12)
    answer = rows["tasks.which", "answer_nelbo"]
    nats = [[one["nats"][one["answer"]] for one in side] for side in which]
    assert answer["difference"] == pytest.approx(np.mean(np.subtract(nats[1], nats[0])), rel=1e-9)
    noise = 0.0
    for pair in zip(*which, strict=True):
        first, second = (np.array(one["deviations"][one["answer"]]) for one in pair)
        noise += ((second - first) ** 2).sum()
    assert answer["mc_se"] == pytest.approx(math.sqrt(noise) / n, rel=1e-9)

    how = [read_records(output["tasks"] / "how.jsonl") for output in outputs]
    bpb = rows["tasks.how", "bpb_bound"]
    num_bytes = sum(one["bytes"] for one in how[0])
    totals = [math.fsum(one["nats"] for one in side) for side in how]
    assert bpb["difference"] == pytest.approx((totals[1] - totals[0]) / math.log(2) / num_bytes, rel=1e-9)

    results = [json.loads((output["evaluate"] / "results.json").read_text()) for output in outputs]
    held_out, per_token = rows["evaluate", "bpb_bound"], rows["evaluate", "nelbo"]
    assert [held_out[side] for side in "ab"] == pytest.approx([r["bpb_bound"] for r in results], rel=1e-9)
    assert [per_token[side] for side in "ab"] == pytest.approx([r["nelbo"] for r in results], rel=1e-9)
    documents = [np.load(output["evaluate"] / "documents.npz") for output in outputs]
    change = documents[1]["losses"] - documents[0]["losses"]
    tokens = documents[0]["tokens"]
    by_replicate = change.sum(axis=1) / tokens.sum()
    assert per_token["mc_se"] == pytest.approx(by_replicate.std(ddof=1) / math.sqrt(len(by_replicate)), rel=1e-9)
    residuals = change.mean(axis=0) - per_token["difference"] * tokens
    count = len(tokens)
    wanted = math.sqrt((residuals**2).sum() * count / (count - 1)) / tokens.sum()
    assert per_token["se"] == pytest.approx(wanted, rel=1e-6)
    assert per_token["n"] == held_out["n"] == results[0]["num_docs"]


def test_the_table_says_what_it_shows_and_what_is_not_compared(
    tmp_path: Path, store: Store, asked: Asked, dlm: Dlm
) -> None:
    config = both(tmp_path)
    finish(store, "a", asked.plan(config, "a"))
    fewer = {**config.tasks, "how": replace(config.tasks["how"], limit=4)}
    samples = {"s": TaskConfig("samples", num_samples=2, length=4)}
    finish(store, "b", asked.plan(replace(config, tasks={**fewer, **samples}), "bbb", evaluates=True))
    done = dlm("compare", "a", "b")
    assert done.code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        "figure", "unit", "a", "b", "difference", "se", "95", "%", "mc_se", "p", "n",
    ]  # fmt: skip
    assert [line.split()[:2] for line in lines[1:6]] == [
        ["tasks.how", "bpb_bound"],
        *(["tasks.which", metric] for metric in ("acc", "acc_norm", "acc_bytes", "answer_nelbo")),
    ]  # fmt: skip
    assert lines[1].split()[-1] == "4"
    assert "note: evaluate: run a has finished no such step" in lines
    assert "note: tasks.how: 5 questions count in one of the runs or in none, and are left out" in lines
    assert "note: tasks.s: only one of the runs has this task" in lines


def test_runs_of_other_questions_are_refused_by_name(tmp_path: Path, store: Store, asked: Asked, dlm: Dlm) -> None:
    def run(run_id: str, task: TaskConfig) -> None:
        finish(store, run_id, asked.plan(replace(CONFIG, tasks={"q": task}), "a"))

    run("a", TaskConfig("text", str(write(tmp_path / "1.jsonl", texts(3)))))
    run("b", TaskConfig("text", str(write(tmp_path / "2.jsonl", texts(3, seed=2)))))
    config = replace(CONFIG, likelihood=LikelihoodConfig(num_masks=9))
    other = TaskConfig("multiple_choice", str(write(tmp_path / "3.jsonl", choices(3))))
    finish(store, "c", asked.plan(replace(config, tasks={"q": other}), "a"))
    done = dlm("compare", "a", "b")
    assert done.code == 2
    assert "tasks.q asks other questions: its file has the SHA-256" in done.stderr
    assert "tasks.q is of kind text in the first run and of kind multiple_choice" in dlm("compare", "a", "c").stderr


def test_runs_without_anything_in_common_are_refused(tmp_path: Path, store: Store, asked: Asked, dlm: Dlm) -> None:
    finish(store, "a", asked.plan(both(tmp_path), "a"))
    finish(store, "b", asked.plan(None, "a"))
    done = dlm("compare", "a", "b")
    assert done.code == 2
    assert "the runs a and b have no figures of the same questions" in done.stderr
    assert "tasks: run b has finished no such step" in done.stderr
    assert dlm("compare", "a", "nowhere").code == 2


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 5), (5, 0), (3, 4), (2, 9), (1, 1)])
def test_mcnemar_is_that_of_all_outcomes_of_fair_coins(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    sides = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
    as_uneven = sum(abs(2 * side - n) >= abs(only_a - only_b) for side in sides)
    assert mcnemar_p(only_a, only_b) == pytest.approx(as_uneven / 2**n, rel=1e-12)


def test_the_standard_error_of_a_difference_of_ratios_is_that_of_repetitions() -> None:
    chance = random.Random(0)
    found, errors = [], []
    for _ in range(600):
        sizes = [chance.uniform(1, 9) for _ in range(60)]
        first = [size * chance.gauss(2, 1) for size in sizes]
        second = [cost + size * chance.gauss(0.5, 0.2) for cost, size in zip(first, sizes, strict=True)]
        a, b, se, _, _ = difference_of_ratios((first, sizes), (second, sizes))
        assert se is not None
        found.append(b - a)
        errors.append(se)
    assert np.mean(found) == pytest.approx(0.5, abs=0.005)
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.1)


@pytest.mark.parametrize("num_replicates", [(8, 8), (8, 12)])
def test_the_mask_noise_of_a_difference_is_that_of_repetitions(num_replicates: tuple[int, int]) -> None:
    """Masks that are hard for one model are hard for the other, which is of use where replicates pair."""
    chance = np.random.default_rng(0)
    tokens, num_docs = chance.integers(5, 50, 6).astype(np.float64), 6
    found, squares = [], []
    for _ in range(1500):
        hard = chance.normal(size=(max(num_replicates), num_docs))
        a, b = (tokens * (3 + hard[:n] + 0.3 * chance.normal(size=(n, num_docs))) for n in num_replicates)
        found.append(b.sum(axis=1).mean() / tokens.sum() - a.sum(axis=1).mean() / tokens.sum())
        noise = mask_noise((a, tokens), (b, tokens))
        assert noise is not None
        squares.append(noise**2)
    if num_replicates[0] == num_replicates[1]:
        assert np.mean(squares) == pytest.approx(np.var(found), rel=0.15)
    else:
        assert np.mean(squares) > np.var(found)


def test_questions_that_failed_for_one_of_the_runs_are_left_out(
    tmp_path: Path, store: Store, asked: Asked, dlm: Dlm
) -> None:
    long = {"id": "long", "context": "", "choices": ["a" * 50, "b"], "answer": 1}
    task = TaskConfig("multiple_choice", str(write(tmp_path / "q.jsonl", [*choices(3), long])))
    config = replace(CONFIG, tasks={"q": task})
    finish(store, "a", asked.plan(config, "a", seq_len=64))
    finish(store, "b", asked.plan(config, "bbb", seq_len=40))
    for names in (("a", "b"), ("b", "a")):
        assert rows_of(dlm, *names)["tasks.q", "acc"]["n"] == 3
        done = dlm("compare", *names)
        assert "note: tasks.q: 1 questions count in one of the runs or in none, and are left out" in done.stdout


def test_what_is_exact_is_not_compared_with_a_bound(tmp_path: Path, store: Store, asked: Asked, dlm: Dlm) -> None:
    config = both(tmp_path)
    finish(store, "bound", asked.plan(config, "a", evaluates=True))
    exact = finish(store, "exact", asked.plan(config, "next", evaluates=True, objective="autoregressive_nll"))
    assert "nll" in json.loads((exact["evaluate"] / "results.json").read_text())
    done = dlm("compare", "bound", "exact", "--json")
    found = json.loads(done.stdout)
    assert {(row["of"], row["metric"]) for row in found["differences"]} == {
        ("tasks.which", "acc"), ("tasks.which", "acc_norm"), ("tasks.which", "acc_bytes"),
    }  # fmt: skip
    not_alike = "one run's figures are exact, the other's are bounds: their difference says nothing"
    assert {f"{of}: {not_alike}" for of in ("evaluate", "tasks.which, answer", "tasks.how, bpb")} <= set(found["notes"])
    assert rows_of(dlm, "exact", "exact")["evaluate", "nll"]["difference"] == 0.0


def make_older(artifact: Path) -> None:
    """Records as an older version wrote them: with the errors of what was drawn, and nothing of single masks."""
    for file in artifact.glob("*.jsonl"):
        records = read_records(file)
        for record in records:
            deviations = record.pop("deviations")
            record.setdefault("mc_se", [0.1 if one else 0.0 for one in deviations])
        file.unlink()
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    manifest = load_manifest(artifact)
    files = [record_file(artifact, Path(file.path)) for file in manifest.files]
    write_json(artifact / MANIFEST, replace(manifest, files=files))


def test_records_that_kept_nothing_of_their_masks_give_no_noise_and_a_note(
    tmp_path: Path, store: Store, asked: Asked, dlm: Dlm
) -> None:
    config = both(tmp_path)
    outputs = [finish(store, name, asked.plan(config, name)) for name in ("a", "bbb")]
    figures = [("tasks.which", "answer_nelbo"), ("tasks.how", "bpb_bound")]
    before = rows_of(dlm, "a", "bbb")
    assert all(before[figure]["mc_se"] > 0 for figure in figures)
    for count, output in enumerate(outputs, 1):
        make_older(output["tasks"])
        rows = rows_of(dlm, "a", "bbb")
        for figure in figures:
            assert rows[figure] == before[figure] | {"mc_se": None}
            note = f"{figure[0]}: {count} of the two kept nothing of single masks"
            assert f"note: {note}, so that the difference has no mc_se; ask again" in dlm("compare", "a", "bbb").stdout

    exact = finish(store, "exact", asked.plan(config, "next", objective="autoregressive_nll"))
    make_older(exact["tasks"])
    assert "nothing of single masks" not in dlm("compare", "exact", "exact").stdout
