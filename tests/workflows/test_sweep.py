import json

import pytest

from cluster.shapes import ray_version
from pipeline.artifact import json_bytes
from pipeline.errors import UserError
from tests.cluster.test_jobs import Dashboard, dashboard
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import ONCE, toy_workflow
from tests.workflows.conftest import Dlm
from workflows import runs, sweep
from workflows.sweep import Sweep, parse_grid

__all__ = ["dashboard"]


def sets(log) -> list[str]:
    words = [word for step in toy_workflow().steps for word in ("--set", f"{step.name}.log={log}")]
    return ["--executor", "local", *words]


GRID = ["--grid", "double.number=1,2", "--grid", "total.number=3,4"]


def test_sweep_of_two_by_two_runs_shared_stages_once_and_prints_one_table(dlm: Dlm, store, log):
    done = dlm("sweep", "toy", "--sweep-id", "s", *GRID, *sets(log))
    assert done.code == 0, done.stderr
    often = {name: 2 if name.startswith("double") else 4 if name.startswith("total") else 1 for name in ONCE}
    assert executions(log) == often
    lines = done.stdout[done.stdout.index("sweep s") :].splitlines()
    assert lines[1].split() == ["run", "double.number", "total.number", "status", "cpu_hours"]
    assert [line.split()[:4] for line in lines[2:]] == [
        ["s-1", "1", "3", "succeeded"],
        ["s-2", "1", "4", "succeeded"],
        ["s-3", "2", "3", "succeeded"],
        ["s-4", "2", "4", "succeeded"],
    ]
    shown = json.loads(dlm("sweep", "--show", "s", "--json").stdout)
    assert [row["settings"] for row in shown["runs"]] == [
        {"double.number": d, "total.number": t} for d in (1, 2) for t in (3, 4)
    ]
    costs = [row["figures"]["cpu_hours"] for row in shown["runs"]]
    assert costs[0] > 2 * costs[1]  # nine pieces of work, and two
    command = runs.command_of(store.run("s-2"))
    assert command.endswith("--set double.number=1 --set total.number=4")


def test_sweep_that_fails_somewhere_does_the_rest_and_goes_on_by_the_same_command(dlm: Dlm, store, log):
    trouble = ["--set", "total.trouble=user", "--set", "total.where=total-0"]
    command = ["sweep", "toy", "--sweep-id", "s", "--grid", "total.number=3,4", *trouble, *sets(log)]
    failed = dlm(*command)  # the trouble ends after the first execution: the second run has none
    assert failed.code == 3
    assert "run s-1, total failed: total-0 does not like its settings" in failed.stderr
    assert [row["status"] for row in json.loads(dlm("sweep", "--show", "s", "--json").stdout)["runs"]] == [
        "failed", "succeeded",
    ]  # fmt: skip
    again = dlm(*command)
    assert again.code == 0, again.stderr
    assert executions(log)["total-0"] == 3
    assert executions(log)["source"] == 1
    attempts = {run["run_id"]: run["attempts"] for run in json.loads(dlm("list", "--json").stdout)}
    assert attempts == {"s-1": 2, "s-2": 1}
    other = dlm(*command, "--set", "source.number=9")
    assert (other.code, "another one" in other.stderr) == (2, True)


def test_run_of_a_sweep_that_made_a_part_of_its_steps_is_not_finished(dlm: Dlm, log):
    command = ["sweep", "toy", "--sweep-id", "s", "--grid", "total.number=3,4", *sets(log)]
    point = ["--set", "total.number=3", *sets(log)]
    assert dlm("run", "toy", "--run-id", "s-1", "--until", "source", *point).code == 0
    done = dlm(*command)
    assert done.code == 0, done.stderr
    assert executions(log)["total-0"] == 2
    assert dlm("resume", "s-1", "--only", "total").code == 0
    shown = json.loads(dlm("sweep", "--show", "s", "--json").stdout)
    assert [row["status"] for row in shown["runs"]] == ["succeeded", "succeeded"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toy"], ["--grid PATH=VALUE,VALUE"]),
        (["toy", "--grid", "double.number"], ["--grid 'double.number'"]),
        (["toy", "--grid", "double.number="], ["empty"]),
        (["toy", "--grid", "double.number=1,,2"], ["empty"]),
        (["toy", "--grid", "double.number=1,2,1"], ["value 1 twice"]),
        (["toy", "--grid", "double.number=1", "--grid", "double.number=2"], ["given twice"]),
        (["toy", "--grid", "double.number=1,2", "--set", "double.number=3"], ["--set and with --grid"]),
        (["toy", "--grid", "total.workers=1,2"], ["would make the same", "how it runs"]),
        (["toy", "--grid", "double.number=1,-2"], ["number is -2"]),
        (["toy", "--grid", "double.numbr=1,2"], ["did you mean number"]),
        (["toy", "--grid", 'double={"number": 1,[2'], ["--grid double", "no JSON"]),
        (["toy", "--grid", "double.number=1,2", "--sweep-id", "../x"], ["run id"]),
        (["toy", "--grid", "double.number=1,2", "--sweep-id", ""], ["run id"]),
        (["toy", "--grid", "double.number=1,2", "--json"], ["--show"]),
        (["llada_8b", "--grid", "pretrain.num_steps=1000000,2000000", "--sweep-id", "s"], ["corpus.source"]),
        (["--show", "s"], ["no sweep 's'", "none in this store"]),
        (["--show", "../s"], ["run id"]),
        (["toy", "--show", "s"], ["leave the recipe"]),
        ([], ["name a recipe"]),
    ],
)
def test_sweep_refuses_with_code_2_and_a_message(dlm: Dlm, store, arguments, words):
    done = dlm("sweep", *arguments)
    assert done.code == 2, done.stderr
    for word in words:
        assert word in done.stderr
    assert not (store.root.path / "runs").exists()
    assert not (store.root.path / "sweeps").exists()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2e-3", [1, 0.002]),
        ("linear,cosine", ["linear", "cosine"]),
        ("1,cosine", [1, "cosine"]),
        ("[1,2],[3]", [[1, 2], [3]]),
        ('{"a": 1},{"a": 2}', [{"a": 1}, {"a": 2}]),
        ('"a,b","c"', ["a,b", "c"]),
        ("true,false", [True, False]),
        ("1", [1]),
    ],
)
def test_grid_values_stand_between_commas(text, values):
    assert parse_grid([f"a.b={text}"]) == [["a.b", values]]


def test_points_vary_the_last_setting_fastest():
    made = Sweep("toy", "local", [["a", [1, 2]], ["b", ["x", "y"]]], [], [])
    assert made.points() == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]


@pytest.mark.parametrize("value", [1, 0.5, "cosine", "3", "true", [1, 2], {"a": "b"}, None, True])
def test_settings_of_a_point_come_back_as_they_were(value):
    from pipeline.config import parse_value

    assert parse_value(sweep._typed(value)) == value


def test_figures_of_evaluation_and_training_stand_in_the_table(dlm: Dlm, store, monkeypatch):
    grid = parse_grid(["pretrain.num_steps=60,70"])
    plans = sweep.plan_sweep("ar_tiny", grid, [])
    first, _ = sweep.create_sweep(store, "s", "ar_tiny", "local", grid, [], plans)
    for name, file, value in (
        ("evaluate", "results.json", {"bpb_bound": 2.5, "bpb_bound_mc_se": 0.125, "other": 1}),
        ("pretrain", "manifest.json", {"stats": {"final_loss": 3.25, "tokens_per_s": 12345.6}}),
    ):
        (first.directory / "fake" / name / file).write(json_bytes(value))
    fake = {name: first.directory / "fake" / name for name in ("evaluate", "pretrain")}
    monkeypatch.setattr(runs, "committed_outputs", lambda store, run: fake if run == first else {})
    lines = [line.split() for line in dlm("sweep", "--show", "s").stdout.splitlines()]
    assert lines[1][:3] == ["run", "pretrain.num_steps", "status"]
    assert sorted(lines[1][3:]) == ["bpb_bound", "final_loss", "tokens_per_s"]
    assert {"2.5000", "±", "0.1250", "3.2500", "12,346"} <= set(lines[2])
    assert lines[3] == ["s-2", "70", "submitted"]


def test_plan_of_a_sweep_refuses_points_that_differ_in_how_they_run_only():
    with pytest.raises(UserError, match=r'"total\.workers": 1.*"total\.workers": 2'):
        sweep.plan_sweep("tests.support.toy_workflow:toy_workflow", parse_grid(["total.workers=1,2"]), [])


def test_sweep_with_an_address_hands_every_run_over_and_runs_nothing_here(dlm: Dlm, store, log, dashboard: Dashboard):
    command = ["sweep", "toy", "--sweep-id", "s", "--grid", "total.number=3,4", "--address", dashboard.url]
    assert dlm(*command, *sets(log)).code == 2  # --executor local
    dashboard.version = "2.58.0"
    assert dlm(*command, *sets(log)[2:]).code == 5
    assert not store.runs(), "nothing is left behind that nobody works on"
    dashboard.version = ray_version()
    assert dlm(*command, *sets(log)[2:]).code == 0
    assert list(dashboard.jobs) == [f"s-{number}-a1-{store.store_id[:6]}" for number in (1, 2)]
    assert executions(log) == {}
    assert {row.status for row in sweep.results(store, sweep.open_sweep(store, "s"))} == {"submitted"}
