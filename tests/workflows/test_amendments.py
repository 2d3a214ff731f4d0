import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.support.toy_stages.source import config as source_config
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import ONCE, amended, coordinate, fabricate, toy_plan, value_of
from tests.workflows.conftest import Dlm
from workflows import runs
from workflows.amendments import Wishes
from workflows.lease import LeaseHeldError, acquire_lease
from workflows.plan import DriftError, PlannedStep
from workflows.store import Store


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """What the source reads from outside the store."""
    path = tmp_path / "data.txt"
    path.write_text("before")
    return path


def amendments(store: Store, run_id: str = "r1") -> list[dict]:
    run = store.run(run_id)
    return [json.loads((run.amendments / name).read_bytes()) for name in run.amendments.names()]


def raise_code_version(monkeypatch: pytest.MonkeyPatch, to: int = 2) -> None:
    monkeypatch.setattr(source_config, "STAGE", replace(source_config.STAGE, code_version=to))


def changed(store: Store, run_id: str = "r1") -> dict[str, str]:
    return {change["step"]: change["what"] for change in amendments(store, run_id)[-1]["changes"]}


# --- drift ----------------------------------------------------------------------------------------------------------


def test_drift_is_refused_naming_step_field_both_values_and_ways_out(store, data):
    run = runs.create_run(store, toy_plan(source__path=str(data)), "local", "r1")
    data.write_text("short")
    with pytest.raises(DriftError) as error:
        amended(store, run, Wishes())
    for word in ("source: external.bytes was 6, is now 5", "--rebuild source"):
        assert word in str(error.value)
    assert "--accept-drift" not in str(error.value)  # it is not committed: there is nothing to reuse
    assert amendments(store) == []


def test_drift_of_a_committed_step_is_accepted_by_name_and_stays_so(store, log, data, monkeypatch, executor_of_gangs):
    plan = toy_plan(log, source__path=str(data))
    run = runs.create_run(store, plan, "local", "r1")
    fabricate(store, plan, "source")
    data.write_text("short")
    with pytest.raises(DriftError, match="--accept-drift source"):
        amended(store, run, Wishes())
    frozen = (run.directory / "run.json").read_bytes()
    accepted = amended(store, run, Wishes(accept=("source",)), ("dlm", "resume"))
    assert (run.directory / "run.json").read_bytes() == frozen
    assert accepted.step("source").accepted == {"external.bytes": 5}
    assert [step.fingerprint for step in accepted.steps] == [step.fingerprint for step in plan.steps]
    (amendment,) = amendments(store)
    assert amendment["changes"][0]["fields"] == {"external.bytes": [6, 5]}
    assert (changed(store), amendment["command"]) == ({"source": "accepted"}, ["dlm", "resume"])
    assert runs.frozen_plan(run) == accepted
    assert amended(store, run, Wishes()) == accepted  # said once
    states = coordinate(store, run, executor_of_gangs)
    assert {name: state.status for name, state in states.items() if name == "source"} == {"source": "cached"}
    assert "source" not in executions(log)
    data.write_text("shorter")
    with pytest.raises(DriftError, match=r"external\.bytes was 6, is now 7"):
        amended(store, run, Wishes())


def test_drift_of_a_step_that_is_not_committed_cannot_be_accepted(store, data):
    run = runs.create_run(store, toy_plan(source__path=str(data)), "local", "r1")
    data.write_text("short")
    with pytest.raises(DriftError, match=r"not committed.*--rebuild source"):
        amended(store, run, Wishes(accept=("source",)))


def test_drift_that_was_accepted_is_refused_once_the_artifact_is_gone(store, data):
    plan = toy_plan(source__path=str(data))
    run = runs.create_run(store, plan, "local", "r1")
    fabricate(store, plan, "source")
    data.write_text("short")
    amended(store, run, Wishes(accept=("source",)))
    store.artifact("toy-source", plan.step("source").fingerprint).directory.remove()
    with pytest.raises(DriftError, match="was accepted as it was committed, and is gone"):
        amended(store, run, Wishes())


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (Wishes(accept=("source",)), "would come out as it was planned"),
        (Wishes(accept=("double",), rebuild=("source",)), "--rebuild makes it anew"),
        (Wishes(accept=("sauce",)), "--accept-drift sauce: .*did you mean source"),
        (Wishes(rebuild=("nothing",)), "--rebuild nothing: .*source, double, aside, total"),
        (
            Wishes([("double.number", 4)]),
            r"double\.number is 1 and cannot become 4 .*dlm run toy .*--set double\.number=4$",
        ),
        (Wishes([("double.numbr", 4)]), "did you mean number"),
    ],
)
def test_amend_refuses_what_would_do_nothing_or_change_the_result(store, wishes, message):
    run = runs.create_run(store, toy_plan(), "local", "r1")
    with pytest.raises(UserError, match=message):
        amended(store, run, wishes)
    assert amendments(store) == []


def test_amend_of_a_run_at_work_is_refused(store):
    run = runs.create_run(store, toy_plan(), "local", "r1")
    acquire_lease(run.lease_dir, "run r1")
    with pytest.raises(LeaseHeldError):
        amended(store, run, Wishes([("total.workers", 3)]))
    assert amendments(store) == []


# --- steps made anew --------------------------------------------------------------------------------------------------


def test_rebuild_makes_a_step_and_what_follows_at_new_addresses_and_keeps_the_old(store, log, executor_of_gangs):
    plan = toy_plan(log)
    run = runs.create_run(store, plan, "local", "r1")
    coordinate(store, run, executor_of_gangs)
    before = {step.name: step.fingerprint for step in plan.steps}
    anew = amended(store, run, Wishes(rebuild=("double",)))
    after = {step.name: step.fingerprint for step in anew.steps}
    assert {name for name in after if after[name] != before[name]} == {"double", "total"}
    (amendment,) = amendments(store)
    assert {c["step"]: (c["what"], c["old_fingerprint"], c["fingerprint"]) for c in amendment["changes"]} == {
        name: ("rebuilt", before[name], after[name]) for name in ("double", "total")
    }
    states = coordinate(store, run, executor_of_gangs)
    assert {name: state.status for name, state in states.items()} == {
        "source": "cached", "aside": "cached", "double": "committed", "total": "committed",
    }  # fmt: skip
    assert value_of(states["total"]) == 32
    again = {"double-list", "double-0", "double-1", "double-2", "double-finish", "total-0", "total-1"}
    assert executions(log) == {name: 2 if name in again else 1 for name in ONCE}
    assert store.artifact("toy-double", before["double"]).committed() is not None


def test_rebuild_twice_gives_a_third_address(store):
    plan = toy_plan()
    run = runs.create_run(store, plan, "local", "r1")
    seen = {plan.step("double").fingerprint}
    for number in (2, 3):
        seen.add(amended(store, run, Wishes(rebuild=("double",))).step("double").fingerprint)
        assert len(seen) == number
    assert [name for name in run.amendments.names()] == ["001.json", "002.json"]


def test_rebuild_takes_data_and_code_as_they_are_now(store, data, monkeypatch):
    run = runs.create_run(store, toy_plan(source__path=str(data)), "local", "r1")
    data.write_text("short")
    raise_code_version(monkeypatch)
    with pytest.raises(DriftError, match="aside: code_version was 1, is now 2"):
        amended(store, run, Wishes(rebuild=("source",)))
    anew = amended(store, run, Wishes(rebuild=("source", "aside")))
    assert (anew.step("source").external, anew.step("source").code_version) == ({"bytes": 5}, 2)
    assert amended(store, run, Wishes()) == anew


# --- settings of how it runs ------------------------------------------------------------------------------------------


def test_execution_settings_of_a_run_can_change_and_its_addresses_do_not(store):
    plan = toy_plan()
    run = runs.create_run(store, plan, "local", "r1")
    plan_now = amended(store, run, Wishes([("total.workers", 3)]))
    assert plan_now.step("total").config["workers"] == 3
    assert [step.fingerprint for step in plan_now.steps] == [step.fingerprint for step in plan.steps]
    assert changed(store) == {"total": "set"}
    assert amendments(store)[0]["changes"][0]["fields"] == {"config.workers": [2, 3]}
    amended(store, run, Wishes([("total.workers", 3)]))
    assert len(amendments(store)) == 1  # nothing changed


def test_cli_resume_with_an_execution_setting_runs_with_it(dlm: Dlm, store, log):
    plan = toy_plan(log, total__trouble="user", total__times=9)
    runs.create_run(store, plan, "local", "r1")
    assert dlm("resume", "r1").code == 3
    refused = dlm("resume", "r1", "--set", "total.number=5")
    assert (refused.code, "total.number is 1 and cannot become 5" in refused.stderr) == (2, True)
    done = dlm("resume", "r1", "--set", "total.trouble=", "--set", "total.workers=1")
    assert done.code == 0, done.stderr
    assert executions(log)["total-0"] == executions(log)["total-1"] + 1
    assert amendments(store)[0]["command"][:3] == ["dlm", "resume", "r1"]


def test_cli_resume_with_a_setting_that_decides_the_result_names_it_once_as_it_was_typed(dlm: Dlm, store, log):
    given = ["--set", f"source.log={log}", "--set", "double.number=3"]
    assert dlm("run", "toy", "--run-id", "r1", "--executor", "local", *given, "--until", "source").code == 0
    done = dlm("resume", "r1", "--set", "double.number=4")
    assert done.code == 2
    words = f"dlm run toy --executor local --set source.log={log} --set double.number=4 --store {store.root.path}"
    assert done.stderr == (
        "error: double.number is 3 and cannot become 4 in this run: it decides what comes out. Start a new run, which "
        f"makes again only what changes: {words}\n"
    )


def test_cli_resume_with_drift_ends_with_code_4_and_goes_on_once_it_is_accepted(dlm: Dlm, store, log, data):
    plan = toy_plan(log, source__path=str(data))
    runs.create_run(store, plan, "local", "r1")
    fabricate(store, plan, "source")
    data.write_text("short")
    refused = dlm("resume", "r1")
    assert (refused.code, "external.bytes was 6, is now 5" in refused.stderr) == (4, True)
    assert dlm("resume", "r1", "--accept-drift", "double").code == 2
    assert dlm("resume", "r1", "--accept-drift", "source").code == 0
    assert dlm("resume", "r1", "--rebuild", "source").code == 0
    assert executions(log)["source"] == 1


def test_cli_resume_that_is_refused_for_its_part_has_changed_nothing(dlm: Dlm, store, log):
    plan = toy_plan(log)
    runs.create_run(store, plan, "local", "r1")
    fabricate(store, plan)
    refused = dlm("resume", "r1", "--rebuild", "double", "--only", "total")
    assert (refused.code, "not there yet: double" in refused.stderr) == (2, True)
    assert amendments(store) == []
    assert dlm("resume", "r1", "--rebuild", "double", "--only", "double").code == 0
    assert executions(log) == {name: 1 for name in ONCE if name.startswith("double")}


def test_step_of_a_run_frozen_by_an_early_version_has_no_salt_and_nothing_accepted(store):
    run = runs.create_run(store, toy_plan(), "local", "r1")
    value = json.loads((run.directory / "run.json").read_bytes())
    for step in value["plan"]["steps"]:
        del step["salt"], step["accepted"]
    value = {name: value[name] for name in ("plan", "executor", "settings")}
    (run.directory / "run.json").write(json.dumps(value).encode())
    assert runs.frozen_plan(run) == toy_plan()
    assert runs.code_change(run) == ""
    assert runs.command_of(run) == "dlm run toy --executor local"
    assert isinstance(runs.frozen_plan(run).steps[0], PlannedStep)


# --- two at a time ----------------------------------------------------------------------------------------------------


def test_the_same_run_created_by_several_at_once_is_one_run(store):
    plan = toy_plan()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: runs.create_run(store, plan, "local", "r1").run_id, range(8)))
    assert made == ["r1"] * 8
    assert [run.run_id for run in store.runs()] == ["r1"]


def test_another_amendment_of_the_same_number_is_never_overwritten(store):
    run = runs.create_run(store, toy_plan(), "local", "r1")
    amended(store, run, Wishes([("total.workers", 3)]))
    first = run.amendments / "001.json"
    (run.amendments / "002.json").write(first.read_bytes())
    first.remove()
    before = (run.amendments / "002.json").read_bytes()
    with pytest.raises(LeaseHeldError, match="another process changes run r1"):
        amended(store, run, Wishes([("total.workers", 4)]))
    assert (run.amendments / "002.json").read_bytes() == before


def test_the_same_run_with_other_data_than_it_was_created_with_is_drift(store, data):
    runs.create_run(store, toy_plan(source__path=str(data)), "local", "r1")
    data.write_text("short")
    with pytest.raises(DriftError, match=r"external\.bytes was 6, is now 5"):
        runs.create_run(store, toy_plan(source__path=str(data)), "local", "r1")
