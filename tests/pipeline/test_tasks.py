"""Tasks by likelihood: what a naive loop over one question at a time says, however the questions are worked on."""

import errno
import gzip
import math
import os
import re
from dataclasses import replace
from pathlib import Path, PosixPath
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from dlm_core.intervals import t_quantile
from pipeline.errors import UserError
from pipeline.inference.likelihood import LikelihoodConfig, Request, score
from pipeline.inference.model import OpenModel, open_model
from pipeline.tasks import questions
from pipeline.tasks.config import STAGE, TaskConfig, TasksConfig
from pipeline.tasks.likelihoods import mask_id
from pipeline.tasks.questions import external_data
from pipeline.tasks.run import read_records
from pipeline.tracking import WandbRun
from tests.support.model_kinds import KINDS
from tests.support.questions import CONFIG, FakeWandbRun, ask, both, choices, numbers, texts, write
from tests.support.tiny_run import Artifacts, run_stage

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("torch_settings")]
SEQ_LEN = 32


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TasksConfig:
    return both(tmp_path_factory.mktemp("files"))


def naive_nats(
    model: OpenModel, config: LikelihoodConfig, context: str, answer: str, number: int
) -> tuple[float, np.ndarray]:
    """One question at a time, one row at a time, from the mask that its number addresses."""
    whole, given = model.encode(context + answer), len(model.encode(context.rstrip()))
    request = Request(whole[:given], whole[given:], mask_id(number))
    (found,) = score(model, [request], replace(config, batch_rows=1))
    return found.nats, np.array(found.deviations)


def turned(one: tuple[float, np.ndarray], other: tuple[float, np.ndarray]) -> float:
    """Probability that other masks put two choices the other way round."""
    width = max(len(one[1]), len(other[1]))
    deviations = [np.pad(found, (0, width - len(found))) for _, found in (one, other)]
    se = math.sqrt(((deviations[0] - deviations[1]) ** 2).sum())
    return NormalDist().cdf(-abs(other[0] - one[0]) / se) if se else 0.0


@pytest.mark.parametrize("name", list(KINDS))
def test_choices_are_those_of_a_loop_over_one_question_at_a_time(
    name: str, saved: dict[str, Path], made: Artifacts, config: TasksConfig, tmp_path: Path
) -> None:
    found = ask(config, saved[name], made.tokenizer, tmp_path / "out")["which"]
    model = open_model(saved[name], made.tokenizer, "cpu")
    right, right_norm, right_bytes, nats, noise, margins, turning, risks = [], [], [], [], [], [], [], []
    for number, question in enumerate(choices()):
        answers = question["choices"]
        costs = [naive_nats(model, config.likelihood, question["context"], one, number) for one in answers]
        values = [cost for cost, _ in costs]
        chars, sizes = [len(one) for one in answers], [len(one.encode()) for one in answers]
        right.append(min(range(len(values)), key=lambda i: values[i]) == question["answer"])
        right_norm.append(min(range(len(values)), key=lambda i: values[i] / chars[i]) == question["answer"])
        right_bytes.append(min(range(len(values)), key=lambda i: values[i] / sizes[i]) == question["answer"])
        nats.append(costs[question["answer"]][0])
        noise.append(float((costs[question["answer"]][1] ** 2).sum()))
        best, second = sorted(range(len(costs)), key=values.__getitem__)[:2]
        margins.append(values[second] - values[best])
        turning.append(turned(costs[best], costs[second]))
        other = min((i for i in range(len(costs)) if i != question["answer"]), key=values.__getitem__)
        risks.append(turned(costs[question["answer"]], costs[other]))
    n, metrics = len(right), found["metrics"]
    assert (found["n"], found["num_failed"], found["num_cut"]) == (n, 0, 0)
    assert metrics["acc"]["value"] == sum(right) / n
    assert metrics["acc_norm"]["value"] == sum(right_norm) / n
    assert metrics["acc_bytes"]["value"] == sum(right_bytes) / n
    assert 0 < sum(right) < n, "a weak test"
    p = sum(right) / n
    assert metrics["acc"]["doc_se"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)), rel=1e-12)
    low, high = metrics["acc"]["interval"]
    for end in (low, high):
        assert abs(p - end) == pytest.approx(NormalDist().inv_cdf(0.975) * math.sqrt(end * (1 - end) / n), rel=1e-9)
    row = metrics["answer_nll" if name == "next" else "answer_nelbo"]
    mean = math.fsum(nats) / n
    assert row["value"] == pytest.approx(mean, rel=1e-5)
    spread = math.sqrt(math.fsum((one - mean) ** 2 for one in nats) / (n - 1) / n)
    assert row["doc_se"] == pytest.approx(spread, rel=1e-4)
    assert row["interval"] == pytest.approx(
        [mean - t_quantile(float(n - 1)) * spread, mean + t_quantile(float(n - 1)) * spread], rel=1e-4
    )
    assert row["mc_se"] == pytest.approx(math.sqrt(math.fsum(noise)) / n, rel=1e-3)
    assert metrics["margin"]["value"] == pytest.approx(math.fsum(margins) / n, rel=1e-3)
    assert metrics["turning"]["value"] == pytest.approx(math.fsum(turning) / n, abs=1e-4)
    if name == "next":
        assert metrics["turning"]["value"] == metrics["acc"]["mc_se"] == row["mc_se"] == 0.0
    else:
        wanted = math.sqrt(math.fsum(p * (1 - p) for p in risks)) / n
        assert metrics["acc"]["mc_se"] == pytest.approx(wanted, rel=1e-3)
        assert row["mc_se"] > 0
        if name != "blocks":  # whose parts are short: their differences are mostly exact
            assert min(metrics["acc"]["mc_se"], metrics["turning"]["value"]) > 0


@pytest.mark.parametrize("name", list(KINDS))
def test_texts_are_those_of_a_loop_over_one_row_at_a_time(
    name: str, saved: dict[str, Path], made: Artifacts, config: TasksConfig, tmp_path: Path
) -> None:
    found = ask(config, saved[name], made.tokenizer, tmp_path / "out")["how"]["metrics"]
    model = open_model(saved[name], made.tokenizer, "cpu")
    size = SEQ_LEN - KINDS[name].get("target_offset", 0)
    nats, noise, tokens, num_bytes, num_words, most_rows = [], 0.0, [], 0, 0, 0
    for number, question in enumerate(texts()):
        ids = model.encode(question["text"])
        rows = [ids[start : start + size] for start in range(0, len(ids), size)]
        most_rows = max(most_rows, len(rows))
        scores = [
            score(model, [Request((), row, mask_id(number, part))], replace(config.likelihood, batch_rows=1))[0]
            for part, row in enumerate(rows)
        ]
        nats.append(math.fsum(one.nats for one in scores))
        noise += math.fsum(one.mc_se**2 for one in scores)
        tokens.append(len(ids))
        num_bytes += len(question["text"].encode())
        num_words += len(re.split(r"\s+", question["text"]))
    assert most_rows > 2, "a weak test"
    nll, suffix = ("nll", "") if name == "next" else ("nelbo", "_bound")
    total, n = math.fsum(nats), len(nats)
    per_token = total / sum(tokens)
    assert found[nll]["value"] == pytest.approx(per_token, rel=1e-5)
    assert found[nll]["mc_se"] == pytest.approx(math.sqrt(noise) / sum(tokens), rel=1e-3)
    squares = math.fsum((cost - per_token * size) ** 2 for cost, size in zip(nats, tokens, strict=True))
    doc_se = math.sqrt(squares * n / (n - 1)) / sum(tokens)
    assert found[nll]["doc_se"] == pytest.approx(doc_se, rel=1e-4)
    assert found[f"bpb{suffix}"]["value"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
    assert found[f"ppl{suffix}"]["value"] == pytest.approx(math.exp(per_token), rel=1e-4)
    assert found[f"word_ppl{suffix}"]["value"] == pytest.approx(math.exp(total / num_words), rel=1e-3)
    half = t_quantile(float(n - 1)) * doc_se
    ends = [math.exp(per_token - half), math.exp(per_token + half)]
    assert found[f"ppl{suffix}"]["interval"] == pytest.approx(ends, rel=1e-3)


@pytest.mark.parametrize("batch_rows", [1, 7])
@pytest.mark.parametrize("name", ["masked", "next"])
def test_batches_and_shards_change_no_printed_digit_in_float64(
    name: str, batch_rows: int, saved: dict[str, Path], made: Artifacts, config: TasksConfig, tmp_path: Path
) -> None:
    assert config.likelihood.batch_rows == 32
    single = ask(config, saved[name], made.tokenizer, tmp_path / "single")
    model = open_model(saved[name], made.tokenizer, "cpu")
    model.denoiser.double()
    try:
        whole = ask(config, saved[name], made.tokenizer, tmp_path / "whole")
        likelihood = replace(config.likelihood, batch_rows=batch_rows)
        other = ask(
            replace(config, likelihood=likelihood, num_shards=1), saved[name], made.tokenizer, tmp_path / "other"
        )
    finally:
        model.denoiser.float()
    rel = 1e-6 if name == "next" else 1e-9
    assert numbers(other) == pytest.approx(numbers(whole), rel=rel, abs=1e-9)
    assert numbers(single) == pytest.approx(numbers(whole), rel=1e-4, abs=1e-5)


def test_records_tell_each_question_and_are_the_same_bytes_again(
    saved: dict[str, Path], made: Artifacts, config: TasksConfig, tmp_path: Path
) -> None:
    ask(config, saved["masked"], made.tokenizer, tmp_path / "one")
    ask(config, saved["masked"], made.tokenizer, tmp_path / "two")
    for file in ("results.json", "which.jsonl", "how.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    records = read_records(tmp_path / "one" / "which.jsonl")
    assert [record["number"] for record in records] == list(range(14))
    assert [len(record["nats"]) for record in records] == [len(question["choices"]) for question in choices()]
    for record, question in zip(records, choices(), strict=True):
        assert record["chars"] == [len(choice) for choice in question["choices"]]
        assert record["bytes"] == [len(choice.encode()) for choice in question["choices"]]


def test_a_limit_takes_the_first_questions_with_the_same_masks(
    saved: dict[str, Path], made: Artifacts, config: TasksConfig, tmp_path: Path
) -> None:
    few = {"which": replace(config.tasks["which"], limit=5)}
    ask(replace(CONFIG, tasks=few, num_shards=1), saved["masked"], made.tokenizer, tmp_path / "few")
    ask(config, saved["masked"], made.tokenizer, tmp_path / "all")
    some, every = (read_records(tmp_path / name / "which.jsonl") for name in ("few", "all"))
    assert len(some) == 5
    assert numbers(some) == pytest.approx(numbers(every[:5]), rel=1e-5)


# --- bad input ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_counted_and_listed(saved: dict[str, Path], made: Artifacts, tmp_path: Path) -> None:
    long = "abc " * 40
    questions = [
        {"context": "one", "choices": [" two", " three"], "answer": 0},
        {"context": "one", "choices": [" two", long], "answer": 0},
        {"context": long, "choices": [" two", " three"], "answer": 1},
    ]
    file = write(tmp_path / "q.jsonl", questions)
    config = replace(CONFIG, tasks={"q": TaskConfig("multiple_choice", str(file))})
    found = ask(config, saved["masked"], made.tokenizer, tmp_path / "out")["q"]
    assert (found["n"], found["num_failed"], found["num_cut"]) == (2, 1, 1)
    (failed,) = found["failed"]
    assert failed["number"] == 1
    assert re.fullmatch(r"choice 1 has \d+ tokens; rows of the model have room for 32", failed["reason"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "line 2 is no JSON: Expecting property name"),
        (b"[1]", r"line 2 is \[1\]; a JSON object is wanted"),
        (b"\xff", "line 2 is not UTF-8: invalid start byte at byte 1"),
        (b'{"context": "a", "context": "b"}', "line 2: the key 'context' stands twice"),
        (b'{"choices": ["a", "b"], "answer": 0}', "line 2 has no \"context\"; it has 'choices', 'answer'"),
        (b'{"context": 3, "choices": ["a", "b"], "answer": 0}', 'line 2: "context" is 3; it must be a text'),
        (b'{"context": "", "choices": ["a"], "answer": 0}', r'line 2: "choices" is \["a"\]; it must be a list of at'),
        (b'{"context": "", "answer": 0}', 'line 2: "choices" is nothing; it must be a list'),
        (b'{"context": "", "choices": ["a", ""], "answer": 0}', r'line 2: "choices"\[1\] is empty; there is nothing'),
        (b'{"context": "", "choices": ["a", "b"], "answer": 2}', 'line 2: "answer" is 2; .* right choice, 0 to 1'),
        (b'{"context": "", "choices": ["a", "b"], "answer": -1}', 'line 2: "answer" is -1; it must be the place'),
        (b'{"context": "", "choices": ["a", "b"], "answer": true}', 'line 2: "answer" is true; it must be the place'),
        (b'{"context": "\\ud800", "choices": ["a", "b"], "answer": 0}', 'line 2: "context" holds half a surrogate'),
    ],
)
def test_a_line_that_is_no_question_is_refused_with_its_number(tmp_path: Path, line: bytes, words: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_bytes(b'{"context": "", "choices": ["a", "b"], "answer": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"tasks\.q\.file: .*q\.jsonl, {words}"):
        external_data(TasksConfig({"q": TaskConfig("multiple_choice", str(file))}))


def test_files_that_cannot_be_read_or_hold_nothing_are_refused(tmp_path: Path) -> None:
    def refused(name: str, data: bytes | None) -> str:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as error:
            external_data(TasksConfig({"q": TaskConfig("text", str(tmp_path / name))}))
        return str(error.value)

    assert "missing.jsonl cannot be read: No such file" in refused("missing.jsonl", None)
    assert "empty.jsonl has no question; give one a line" in refused("empty.jsonl", b"\n \n")
    assert "torn.jsonl.gz cannot be read" in refused("torn.jsonl.gz", gzip.compress(b'{"text": "a"}\n')[:-9])
    assert "plain.jsonl.gz cannot be read: Not a gzipped file" in refused("plain.jsonl.gz", b'{"text": "a"}\n')
    (tmp_path / "folder.jsonl").mkdir()
    assert "folder.jsonl is no file" in refused("folder.jsonl", None)


def test_an_error_of_the_storage_is_not_called_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(PosixPath):
        def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(questions, "Path", Failing)
    with pytest.raises(OSError, match="Input/output error"):
        external_data(TasksConfig({"q": TaskConfig("text", "q.jsonl")}))


def test_questions_are_identified_by_their_bytes_and_not_by_their_place(tmp_path: Path) -> None:
    found = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / place).mkdir()
        file = write(tmp_path / place / "q.jsonl", choices(seed=seed))
        found.append(external_data(TasksConfig({"q": TaskConfig("multiple_choice", str(file))})))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": {"a/b": TaskConfig("text", "t.jsonl")}}, "the task name 'a/b' cannot stand in file names"),
        ({"num_shards": 0}, "num_shards is 0; it must be at least 1"),
        ({"gpus": 1.5}, r"gpus is 1\.5; it must lie in \[0, 1\]"),
        ({"gpus": 1.0}, 'gpus is 1.0, but device is "cpu", which leaves them idle'),
        ({"device": "tpu"}, "device is 'tpu'; it must be"),
        (
            {"tasks": {"t": TaskConfig("text", "t.jsonl")}, "likelihood": LikelihoodConfig(guidance=1.0)},
            r"likelihood\.guidance is 1\.0, but 't' is of kind 'text', which has no context",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **changes)


def test_settings_of_a_likelihood_that_no_task_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"likelihood\.num_masks is 8, but no task is scored by likelihood"):
        replace(CONFIG, tasks={"s": TaskConfig("samples")})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "essay"}, "kind is 'essay'; it must be one of multiple_choice, text, match"),
        (
            {"kind": "text", "file": "t.jsonl", "length": 3},
            "length is 3, but kind 'text' has no use for it; it takes file",
        ),
        ({"kind": "samples", "file": "t.jsonl"}, "but kind 'samples' has no use for it; it takes num_samples, length"),
        ({"kind": "samples", "num_samples": 0}, "num_samples is 0; it must be at least 1"),
        (
            {"kind": "match", "file": "t.jsonl", "pattern": "("},
            r"pattern is '\(', which is no regular expression: missing",
        ),
        (
            {"kind": "match", "file": "t.jsonl", "stop": ("a", "")},
            "stop has an empty text, at which everything would end",
        ),
        ({"kind": "code", "file": "t.jsonl", "ks": ()}, "ks is empty; give at least one k"),
        ({"kind": "code", "file": "t.jsonl", "ks": (1, 5)}, "ks has 5, but num_samples is 1; k must lie in"),
        ({"kind": "text"}, r"file is ''; kind 'text' needs a file of \.jsonl or \.jsonl\.gz"),
        ({"kind": "text", "file": "t.txt"}, r"file is 't\.txt'; kind 'text' needs a file of"),
        ({"kind": "text", "file": "t.jsonl", "limit": 0}, "limit is 0; it must be at least 1"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TaskConfig(**fields)


def test_a_stage_without_tasks_is_refused_before_it_runs(
    saved: dict[str, Path], made: Artifacts, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"tasks\.tasks is empty; give tasks, as in --set tasks\.tasks\.NAME="):
        run_stage(STAGE, CONFIG, {"weights": saved["masked"], "tokenizer": made.tokenizer}, tmp_path / "out")


def test_a_file_that_changes_meanwhile_is_refused(
    saved: dict[str, Path], made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.tasks import run

    file = write(tmp_path / "q.jsonl", choices())
    listed = run.list_shards

    def change_behind_its_back(*arguments: Any) -> Any:
        shards = listed(*arguments)
        write(file, choices(seed=5))
        return shards

    monkeypatch.setattr(run, "list_shards", change_behind_its_back)
    config = replace(CONFIG, tasks={"q": TaskConfig("multiple_choice", str(file))})
    with pytest.raises(UserError, match=r"tasks\.q\.file: .*q\.jsonl has changed since the run was planned"):
        run_stage(STAGE, config, {"weights": saved["masked"], "tokenizer": made.tokenizer}, tmp_path / "out")


def test_results_go_to_wandb_as_values_of_a_run(
    saved: dict[str, Path], made: Artifacts, config: TasksConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandbRun()
    monkeypatch.setattr(WandbRun, "_start", lambda *_: fake)
    found = ask(replace(config, track=True), saved["masked"], made.tokenizer, tmp_path / "out")
    assert fake.is_finished
    acc = found["which"]["metrics"]["acc"]
    prefix = "tasks/which/acc"
    wanted = {"": acc["value"], "_doc_se": acc["doc_se"], "_mc_se": acc["mc_se"]}
    wanted |= {"_low": acc["interval"][0], "_high": acc["interval"][1]}
    assert {prefix + suffix: value for suffix, value in wanted.items()}.items() <= fake.summary.items()
    assert fake.summary["tasks/how/nelbo"] == found["how"]["metrics"]["nelbo"]["value"]
    assert None not in fake.summary.values()


def test_results_are_there_though_wandb_is_broken(
    saved: dict[str, Path], made: Artifacts, config: TasksConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(WandbRun, "_start", fail)
    assert ask(replace(config, track=True), saved["next"], made.tokenizer, tmp_path / "out")["which"]["n"] == 14
    assert "warning: Weights & Biases is off for the rest of this stage: RuntimeError: out of order" in (
        capsys.readouterr().err
    )
