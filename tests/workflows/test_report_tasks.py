"""The section of a report about tasks."""

from pathlib import Path

from pipeline.tasks import tables
from tests.workflows.test_report import TASK, make_artifact, render
from workflows.report.tasks import _meaning


def test_report_of_tasks_has_figures_intervals_and_what_failed(tmp_path: Path):
    empty = {**TASK, "n": 0, "metrics": {}}
    artifacts = {"tasks": make_artifact(tmp_path, "tasks", tasks={"which": TASK, "none": empty})}
    _, page = render(artifacts, tmp_path / "report.html")
    shown = " ".join(page.texts)
    for words in ("which", "acc", "0.4321", "0.3333 to 0.5432", "0.0034", "0.0512", "1,234 questions", "num_masks 64"):
        assert words in shown, words
    assert "1 do not count: 7 (choice 1 has <99> tokens)." in shown
    assert "Of 3 the context lost its beginning." in shown


def test_report_of_programs_says_what_stood_between(tmp_path: Path):
    words = ["namespaces and seccomp", "rlimits and a time limit alone"]
    task = {**TASK, "kind": "code", "settings": {"ks": [1], "isolation": words}}
    _, page = render({"tasks": make_artifact(tmp_path, "tasks", tasks={"q": task})}, tmp_path / "report.html")
    assert "isolation namespaces and seccomp, rlimits and a time limit alone." in " ".join(page.texts)


def test_every_figure_of_a_task_has_a_meaning():
    choice = {"answer": 0, "nats": [1.0, 2.0], "deviations": [[0.1], [0.2]], "chars": [1, 2], "bytes": [1, 2]}
    text = {"nats": 2.0, "mc_se": 0.1, "tokens": 3, "bytes": 4, "words": 1}
    written = {"hit": True, "found": "a", "nfe": 3, "right": 1, "tokens": 2}
    sample = {"ids": [1, 2], "nfe": 1, "scored_nats": 1.0, "scored_tokens": 2}
    records = {"multiple_choice": choice, "text": text, "match": written, "infill": written, "samples": sample}
    assert records.keys() == tables.METRICS.keys()
    for kind, record in records.items():
        for is_exact in (True, False):
            assert all(_meaning(name) for name in tables.METRICS[kind]([record], is_exact))
    assert _meaning("pass@10").startswith("One of 10 programs")
