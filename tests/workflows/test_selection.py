import json
import re
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.cluster.test_jobs import Dashboard, dashboard
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import ONCE, fabricate, toy_plan, toy_workflow
from tests.workflows.conftest import Dlm
from workflows.selection import selection

__all__ = ["dashboard"]

EVERY = ("source", "double", "aside", "total")


@pytest.mark.parametrize(
    ("there", "options", "expected"),
    [
        ((), {}, None),
        ((), {"until": ["double"]}, {"source", "double"}),
        ((), {"until": ["double", "aside"]}, {"source", "double", "aside"}),
        ((), {"from_": ["source", "aside"]}, set(EVERY)),
        (("aside",), {"from_": ["source"]}, {"source", "double", "total"}),
        (("source", "aside"), {"from_": ["double"]}, {"double", "total"}),
        (("source",), {"from_": ["double"], "until": ["double"]}, {"double"}),
        ((), {"only": ["source", "double"]}, {"source", "double"}),
        (("source", "double", "aside"), {"only": ["total"]}, {"total"}),
    ],
)
def test_selection_is_what_was_asked_for(store, there, options, expected):
    plan = toy_plan()
    if there:
        fabricate(store, plan, *there)
    assert selection(plan, store, **options) == expected


@pytest.mark.parametrize(
    ("there", "options", "missing"),
    [
        ((), {"from_": ["double"]}, "source, aside"),
        (("source",), {"from_": ["double"]}, "aside"),
        (("double", "aside"), {"only": ["total"]}, "source"),
        ((), {"only": ["double"]}, "source"),
    ],
)
def test_selection_without_what_it_needs_is_refused_naming_that(store, there, options, missing):
    plan = toy_plan()
    if there:
        fabricate(store, plan, *there)
    with pytest.raises(UserError, match=f"not there yet: {missing}\\."):
        selection(plan, store, **options)


def test_selection_is_carried_out_and_a_resume_does_the_rest(dlm: Dlm, log):
    sets = [word for step in toy_workflow().steps for word in ("--set", f"{step.name}.log={log}")]
    done = dlm("run", "toy", "--executor", "local", "--run-id", "r1", "--until", "double", *sets)
    assert done.code == 0, done.stderr
    assert "partial: 2 of 4 steps made, left out: aside, total; go on with: dlm resume r1" in done.stderr
    assert executions(log) == {name: 1 for name in ONCE if name.startswith(("source", "double"))}
    assert dlm("resume", "r1", "--only", "aside").code == 0
    assert "total-0" not in executions(log)
    assert told(dlm) == ("partial", "3 of 4 steps made, left out: total", 0)
    assert dlm("resume", "r1", "--from", "total").code == 0
    assert executions(log) == ONCE
    assert told(dlm) == ("succeeded", "", 0)


def told(dlm: Dlm) -> tuple[str, str, int]:
    status = json.loads(dlm("status", "r1", "--json").stdout)
    return status["status"], status["detail"], status["exit_code"]


def test_run_of_a_part_of_its_steps_says_so_wherever_it_is_shown(dlm: Dlm, log):
    sets = [word for step in toy_workflow().steps for word in ("--set", f"{step.name}.log={log}")]
    dlm("run", "toy", "--executor", "local", "--run-id", "r1", "--until", "source", *sets)
    words = "partial (1 of 4 steps made, left out: double, aside, total)"
    shown = dlm("status", "r1").stdout
    assert f"run r1  {words}" in shown
    assert "go on with: dlm resume r1" in shown
    watched = dlm("status", "r1", "--watch")
    assert (watched.code, words in watched.stdout) == (0, True)
    assert re.search(r"r1 +partial .*left out: double, aside, total", dlm("list").stdout)
    page = Path(dlm("report", "r1").stdout.strip()).read_text()
    assert "everything was made" not in page
    assert ">◐ partial</span>" in page
    assert "1 of 4 steps done" in page
    assert "To go on with it: <code>dlm resume r1" in page


def test_run_whose_rest_another_run_made_has_succeeded(dlm: Dlm, store, log):
    sets = [word for step in toy_workflow().steps for word in ("--set", f"{step.name}.log={log}")]
    dlm("run", "toy", "--executor", "local", "--run-id", "r1", "--until", "source", *sets)
    assert dlm("run", "toy", "--executor", "local", "--run-id", "r2", *sets).code == 0
    assert told(dlm) == ("succeeded", "finished by run r2", 0)


def test_selection_of_a_submitted_run_is_in_the_command_of_its_job(dlm: Dlm, store, dashboard: Dashboard):
    where = ["--address", dashboard.url]
    assert dlm("submit", "toy", *where, "--run-id", "r1", "--until", "double", "--until", "aside").code == 0
    assert dashboard.asked["entrypoint"].endswith(" auto --until double --until aside")
    for job in dashboard.jobs.values():
        job["status"] = "FAILED"
    assert dlm("resume", "r1", *where, "--only", "source").code == 0
    assert dashboard.asked["entrypoint"].endswith(" auto --only source")
    refused = dlm("resume", "r1", *where, "--only", "total")
    assert (refused.code, "not there yet" in refused.stderr) == (2, True)
    assert len(dashboard.jobs) == 2
