"""What the page of a run tells of its past: attempts, failures, costs, metrics."""

import json
from pathlib import Path
from typing import Any

from tests.support.live_views import FAILURE, event
from tests.support.toy_workflow import toy_plan
from workflows.cost import Cost
from workflows.live.history import Costs, tell, with_last_signs
from workflows.live.readers import CostReader, MetricsReader
from workflows.report.data import Metrics
from workflows.runs import create_run
from workflows.store import RunPlace, Store


def test_an_attempt_without_an_end_was_killed_and_lasted_until_its_last_sign():
    events = [
        event(100, "run_started"),
        event(101, "step_started", "a", epoch=1),
        event(110, "step_started", "b", epoch=1),
        event(500, "run_started", attempt=2),
        event(501, "step_started", "a", attempt=2, epoch=2),
        event(503, "step_committed", "a", attempt=2),
        event(504, "run_ended", attempt=2, status="succeeded"),
    ]
    history = with_last_signs(tell(events, False, 1000.0), Costs(last_sign_s={(1, "a", 1): 30.0}))
    assert [(s.step, s.start_s, s.end_s, s.outcome) for s in history.spans] == [
        ("a", 101, 131, "killed"),
        ("b", 110, 110, "killed"),
        ("a", 501, 503, "committed"),
    ]
    assert [(s.attempt, s.end_s, s.outcome) for s in history.sessions] == [(1, 131, "killed"), (2, 504, "succeeded")]


def test_while_a_coordinator_is_alive_its_attempts_go_on():
    history = tell([event(100, "run_started"), event(101, "step_started", "a", epoch=1)], True, 160.0)
    assert [(s.end_s, s.outcome) for s in history.spans] == [(160.0, "running")]
    assert history.sessions[-1].outcome == "running"


def test_failures_that_are_alike_are_told_once_with_what_followed_the_last():
    retries = [event(100 + i, "shard_retry", "map", shard=f"s{i}", failure=FAILURE, backoff_s=2.0) for i in range(3)]
    given_up = event(110, "step_failed", "map", failure={**FAILURE, "message": "poisoned", "error_class": "poison"})
    first, last = tell([event(99, "step_started", "map", epoch=7), *retries, given_up], False, 0.0).troubles
    assert (first.count, first.shards, first.epoch) == (3, ("s0", "s1", "s2"), 7)
    assert first.after == "the shard was tried again after 2.0 s"
    assert (last.error_class, last.after) == ("poison", "the step was given up")


# Readers


def _use(run: RunPlace, folder: str, cpu_s: float, gpus: float = 0.0, *, rank: int = 0, done: bool = False) -> None:
    place = run.directory / "work" / folder
    used = {"cpu_s": cpu_s, "elapsed_s": 10.0, "gpus": gpus, "host": "h"}
    (place / f"usage-{rank}.json").write(json.dumps(used).encode())
    if done:
        (place / "done.json").write(b"{}")


def test_costs_are_summed_by_attempt_and_step_over_calls_turns_and_ranks(store: Store):
    run = create_run(store, toy_plan(), "local", "r1")
    _use(run, "001/train/000001", 5.0, gpus=2.0)
    _use(run, "001/train/000001", 6.0, gpus=2.0, rank=1)
    _use(run, "001/train-more/000001", 100.0)
    _use(run, "002/train/000003", 7.0)
    _use(run, "002/train-list/000003", 1.0, done=True)
    _use(run, "002/train-s0/000003", 1.0)
    _use(run, "002/train-s0/000003-2", 2.0)
    costs = CostReader(run, ["train", "train-more"]).read(1000)
    assert costs.of == {
        (1, "train"): Cost("train", 1, 2, 11.0, 20.0, 40.0),
        (1, "train-more"): Cost("train-more", 1, 1, 100.0, 10.0, 0.0),
        (2, "train"): Cost("train", 2, 4, 11.0, 40.0, 0.0),
    }
    assert costs.last_sign_s[2, "train", 3] == 10.0


def test_costs_of_many_calls_are_read_some_at_a_time_and_those_that_go_on_again(store: Store):
    run = create_run(store, toy_plan(), "local", "r1")
    for number in range(5):
        _use(run, f"001/map-{number}/000001", 1.0, done=True)
    _use(run, "001/map-x/000001", 1.0)
    reader = CostReader(run, ["map"])
    seen = [reader.read(2) for _ in range(3)]
    assert [(costs.of[1, "map"].cpu_s, costs.num_unread) for costs in seen] == [(2.0, 4), (4.0, 2), (6.0, 0)]
    _use(run, "001/map-x/000001", 9.0)
    assert reader.read(2).of[1, "map"].cpu_s == 14.0


def _line(step: int, **figures: Any) -> str:
    return json.dumps({"step": step, "loss": 2.0, "lr": 0.1, **figures}) + "\n"


def test_metrics_are_read_as_they_are_written_and_anew_when_they_were_rewound(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    assert reader.read() == Metrics()
    path.write_text(_line(0) + _line(1)[:-5])
    assert reader.read().num_steps == 1
    path.write_text(_line(0) + _line(1, loss=None) + _line(2))
    found = reader.read()
    assert [line["step"] for line in found.lines] == [0, 1, 2]
    assert (found.num_steps, found.num_not_finite) == (3, 1)
    aside = tmp_path / "aside"
    aside.write_text(_line(0) + _line(1, loss=9.0))
    aside.replace(path)
    assert [line["loss"] for line in reader.read().lines] == [2.0, 9.0]


def test_metrics_of_a_long_training_are_thinned_but_for_rare_figures(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(_line(i, **({"val_nelbo": 1.0} if i % 999 == 0 else {})) for i in range(30_000)))
    found = MetricsReader(path).read()
    assert found.num_steps == 30_000
    assert len(found.lines) <= 4000
    assert found.every > 1
    assert sum("val_nelbo" in line for line in found.lines) == len(range(0, 30_000, 999))
