"""The page of a run while a coordinator works on it and afterwards, and what it is made from."""

import base64
import dataclasses
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cluster.local import LocalExecutor
from pipeline.artifact import Manifest
from pipeline.config import to_json
from pipeline.storage import Place
from tests.support.executors import NUM_CPUS
from tests.support.live_views import FAILURE, event, snapshot, step_view
from tests.support.mortal import in_memory
from tests.support.toy_workflow import coordinate, fabricate, toy_plan, wait_until
from tests.workflows.conftest import Dlm
from tests.workflows.test_report import Page
from workflows.causes import failure_words
from workflows.cost import Cost
from workflows.lease import acquire_lease
from workflows.live import drawings, writer
from workflows.live.history import Costs, Event, tell
from workflows.live.page import MOST_EVENTS, MOST_ROWS, MOST_TROUBLES, render
from workflows.live.snapshot import StepView, Watcher
from workflows.live.style import DARK, LIGHT, SCRIPT
from workflows.live.writer import PAGE, LiveReport, write_report
from workflows.report import svg
from workflows.runs import create_run
from workflows.state import StepState
from workflows.store import EventLog, RunPlace, Store


def executor() -> LocalExecutor:
    return LocalExecutor(NUM_CPUS)


def begun(run: RunPlace) -> EventLog:
    """The events of an attempt whose coordinator is gone."""
    lease = acquire_lease(run.lease_dir, "test")
    lease.release()
    return EventLog(run, lease.epoch)


def page_of(run: RunPlace) -> str:
    return (run.directory / PAGE).read_bytes().decode()


def text_of(source: str) -> str:
    return Page(source).text


# The page of a run that goes on


def test_page_is_live_while_the_run_goes_on_and_over_at_its_end(store: Store, log: Path):
    run = create_run(store, toy_plan(log), "local", "r1")
    pages: set[str] = set()
    with LiveReport(store, run, toy_plan(log), every_s=0.01) as report:

        def look(states: list[StepState]) -> None:
            is_at_double = any(state.step.name == "double" and state.status == "running" for state in states)

            def is_shown() -> bool:
                report.update(states)
                if (run.directory / PAGE).exists():
                    pages.add(page_of(run))
                return not is_at_double or any("double: running" in page for page in pages)

            wait_until(is_shown, "the page shows the step that runs", 60.0)

        coordinate(store, run, executor, look)
    live = [page for page in pages if "▶ running" in page]
    assert len(live) > 1
    for page in live:
        assert f"<script>{SCRIPT}</script>" in page
        assert '<noscript><meta http-equiv="refresh"' in page
        assert "It loads itself again while the run goes on." in text_of(page)
    assert any("double: running" in page for page in live)
    last = page_of(run)
    assert "<script" not in last
    assert "refresh" not in last
    text = text_of(last)
    assert "This run is over: everything was made." in text
    assert "4 of 4 steps done · 1 attempt" in text
    assert "dlm run toy --executor local" in text
    assert not report.problem


def test_page_needs_nothing_else_and_its_drawings_are_told_in_words(store: Store, log: Path):
    run = create_run(store, toy_plan(log), "local", "r1")
    coordinate(store, run, executor)
    source = write_report(store, run).read_text()
    page = Page(source)
    assert page.addresses == []
    assert not {"link", "img", "iframe", "object", "form"} & set(page.tags)
    assert "url(" not in source
    drawn = re.findall(r'<svg class="figure.*?</svg>(?=</div>)', source)
    assert len(drawn) == 4
    for drawing in drawn:
        root = ElementTree.fromstring(drawing)
        assert [child.tag for child in root[:2]] == ["title", "desc"]
    assert "total: committed, from aside and double" in page.text
    assert re.search(r"; double: committed after [\d.]+s; ", page.text)


def test_the_policy_of_the_page_allows_its_own_script_only():
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    page = render(snapshot([step_view("a", "running")], []), 3.0)
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_run_that_failed_says_which_step_and_why_and_what_waits_for_it(store: Store, log: Path):
    plan = toy_plan(log, double__trouble="user", double__where="double-1")
    run = create_run(store, plan, "local", "r1")
    with LiveReport(store, run, plan) as report:
        states = coordinate(store, run, executor, report.update)
    failure = states["double"].failure
    assert failure is not None
    page = Page(page_of(run))
    assert "double failed." in page.text
    assert page.texts.count(failure.message) == 3  # at the top, in the table, among the failures
    assert "double: UserError" in page.text
    assert "Something that was given does not fit; it would fail again." in page.text
    assert f"{store.url}/runs/r1/work/001/double" in page.texts
    assert "dlm resume r1 --store" in page.text
    assert re.search(r"total +⊘ blocked +needs double", page.text)


def test_text_from_outside_is_escaped_and_secrets_are_not_shown(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_TOKEN", "hush & <hush>")
    run = create_run(store, toy_plan(), "local", "r1", settings=["source.path=<script>alert(4)</script>"])
    events = begun(run)
    events.write("run_started")
    events.write("step_started", "source", epoch=1)
    said = {
        "message": "<script>alert(1)</script> hush & <hush>",
        "traceback": "<script>alert(2)</script> hush & <hush>",
    }
    events.write("step_failed", "source", failure={**FAILURE, **said, "type": "<script>alert(3)</script>"})
    events.write("run_ended", status="failed")
    source = write_report(store, run).read_text()
    assert "<script" not in source
    for number in range(1, 5):
        assert f"&lt;script&gt;alert({number})&lt;/script&gt;" in source
    assert "hush" not in source
    assert "&lt;script&gt;alert(1)&lt;/script&gt; ***" in source


def test_what_goes_wrong_with_the_page_stands_in_its_place_and_does_not_reach_the_run(
    store: Store, log: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*details: object) -> str:
        raise RuntimeError("no <ink>")

    monkeypatch.setattr(writer, "render", refuse)
    run = create_run(store, toy_plan(log, only=("source",)), "local", "r1")
    with LiveReport(store, run, toy_plan(log, only=("source",))) as report:
        states = coordinate(store, run, executor, report.update)
    assert states["source"].status == "committed"
    assert report.problem == "the page of the run could not be made: RuntimeError: no <ink>"
    assert "RuntimeError: no &lt;ink&gt;" in page_of(run)


def test_page_that_cannot_be_written_is_told_and_does_not_reach_the_run(store: Store, log: Path):
    plan = toy_plan(log, only=("source",))
    run = create_run(store, plan, "local", "r1")
    (run.directory / PAGE / "in the way").write(b"")
    with LiveReport(store, run, plan) as report:
        states = coordinate(store, run, executor, report.update)
    assert states["source"].status == "committed"
    assert report.problem.startswith("the page of the run could not be written: IsADirectoryError")


def test_updates_between_two_pages_cost_a_glance(store: Store, monkeypatch: pytest.MonkeyPatch):
    plan = toy_plan()
    run = create_run(store, plan, "local", "r1")
    made: list[str] = []
    first = threading.Event()

    def count(*details: object) -> str:
        made.append(threading.current_thread().name)
        first.set()
        return ""

    monkeypatch.setattr(writer, "render", count)
    states = [StepState(step) for step in plan.steps]
    with LiveReport(store, run, plan, every_s=1000.0) as report:
        report.update(states)
        assert first.wait(10.0)
        for _ in range(20):
            report.update(states)
            time.sleep(0.02)  # long enough for a page each
    assert made == ["report", threading.current_thread().name]


def test_page_of_a_run_that_was_not_begun_here_is_left_alone(store: Store):
    plan = toy_plan()
    run = create_run(store, plan, "local", "r1")
    (run.directory / PAGE).write(b"somebody else's")
    with LiveReport(store, run, plan):
        pass
    assert page_of(run) == "somebody else's"


def test_last_page_of_a_run_that_ended_in_an_error_says_that_nobody_works_on_it(store: Store, log: Path):
    plan = toy_plan(log)
    run = create_run(store, plan, "local", "r1")

    def break_off(report: LiveReport) -> Callable[[list[StepState]], None]:
        def look(states: list[StepState]) -> None:
            report.update(states)
            if states[0].status == "running":
                raise KeyboardInterrupt

        return look

    with pytest.raises(KeyboardInterrupt), LiveReport(store, run, plan) as report:
        coordinate(store, run, executor, break_off(report))
    text = text_of(page_of(run))
    assert "Nobody works on this run" in text
    assert "dlm resume r1" in text


# dlm report


def test_dlm_report_brings_the_page_up_to_date_unless_somebody_works_on_the_run(dlm: Dlm, store: Store):
    plan = toy_plan()
    run = create_run(store, plan, "local", "r1")
    path = str(run.directory.path / PAGE)
    assert dlm("report").stdout == f"{path}\n"
    assert "0 of 4 steps done" in page_of(run)
    fabricate(store, plan, "source")
    lease = acquire_lease(run.lease_dir, "test")
    assert dlm("report", "r1").stdout == f"{path}\n"
    assert "0 of 4 steps done" in page_of(run)
    lease.release()
    assert dlm("report", "r1").stdout == f"{path}\n"
    assert "1 of 4 steps done" in page_of(run)


def test_report_of_a_run_in_an_object_store_is_copied_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DLM_CACHE", str(tmp_path))
    store = Store(Place(in_memory()))
    run = create_run(store, toy_plan(), "local", "r1")
    copy = write_report(store, run)
    assert copy.is_relative_to(tmp_path)
    assert copy.read_bytes() == (run.directory / PAGE).read_bytes()
    assert "Nobody has begun to work on this run." in text_of(copy.read_text())


def test_damaged_artifact_is_told_on_the_page(store: Store):
    plan = toy_plan()
    run = create_run(store, plan, "local", "r1")
    fabricate(store, plan, "source")
    step = plan.step("source")
    committed = store.artifact("toy-source", step.fingerprint).committed()
    assert committed is not None
    (committed.path / "value.txt").write_text("longer than it was")
    text = text_of(write_report(store, run).read_text())
    assert "source failed." in text
    assert "has been damaged since" in text


def test_settings_that_are_not_the_recipes_are_listed(dlm: Dlm, store: Store):
    run = create_run(store, toy_plan(total__number=5), "local", "r1")
    dlm("report", "r1")
    assert "total.number 1 5" in text_of(page_of(run))


# Looks


def test_page_of_a_huge_run_stays_small():
    names = [f"step-{i:04d}" for i in range(1000)]
    steps = [step_view(name, "running" if i % 2 else "failed") for i, name in enumerate(names)]
    events = [event(1, "run_started")]
    for i in range(20_000):
        name, long = names[i % 700], f"message {i} " + "x" * 20_000 * (i % 700 == 0)
        events.append(event(2 + i / 100, "step_started", name, epoch=i))
        failure = {**FAILURE, "message": long, "traceback": long}
        events.append(event(2.005 + i / 100, "step_retry", name, failure=failure, backoff_s=1.0))
        events.append(event(2.005 + i / 100, "shard_retry", "step-0000", shard=f"s{i}", failure=FAILURE, backoff_s=1.0))
    costs = Costs({(attempt, name): Cost(name, attempt, 1, 1.0, 1.0, 1.0) for name in names for attempt in range(3)})
    page = render(snapshot(steps, events, costs=costs), 3.0)
    assert len(page) < 3_000_000
    text = text_of(page)
    assert "850 more steps are not drawn; the table has them." in text
    assert f"{1000 - MOST_ROWS} more steps are not listed." in text
    assert f"{60_001 - MOST_EVENTS:,} earlier ones are in the folder events of the run." in text
    assert f"{20_001 - MOST_TROUBLES:,} earlier ones are not shown." in text
    assert "and 19,995 more" in text


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("colours", "ground"), [(LIGHT, "#ffffff"), (LIGHT, "#f6f7f9"), (DARK, "#181e28"), (DARK, "#10141b")]
)
def test_what_a_status_means_is_readable(colours: dict[str, str], ground: str):
    for name, colour in colours.items():
        low, high = sorted((_luminance(colour), _luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_every_status_has_a_sign_beside_its_name():
    statuses = ("committed", "running", "failed", "blocked", "stopped", "queued", "pending", "skipped")
    page = render(snapshot([step_view(s, s) for s in statuses], []), 3.0)
    for status in statuses:
        assert f"{drawings.mark_of(status)} {status}</span>" in page


def test_queue_reason_and_progress_stand_on_the_page():
    waiting = step_view("train", "queued")
    waiting = StepView(**{**vars(waiting), "detail": "wants 8 GPUs, the cluster has 4"})
    going_on = StepView(**{**vars(step_view("map", "running")), "done": 30.0, "total": 120.0, "detail": "30 of 120"})
    page = render(snapshot([waiting, going_on], []), 3.0)
    assert "wants 8 GPUs, the cluster has 4" in page
    assert 'value="0.2500" aria-label="map: 25%"' in page
    assert "▶ running 25%" in page


def test_time_line_shortens_the_pauses_between_attempts():
    events: list[Event] = []
    for attempt, start in ((1, 100.0), (2, 1_000_000.0)):
        events += [event(start, "run_started", attempt=attempt)]
        events += [event(start, "step_started", "a", attempt=attempt, epoch=attempt)]
        events += [event(start + 50, "step_retry", "a", attempt=attempt, failure=FAILURE, backoff_s=1.0)]
    drawn = drawings.time_line([step_view("a")], tell(events, False, 0.0))
    bars = [tuple(map(float, b)) for b in re.findall(r'<rect x="([\d.]+)" y="\S+" width="([\d.]+)" height="14"', drawn)]
    (x1, width1), (x2, width2) = bars[:2]
    assert width1 == pytest.approx(width2, abs=0.2)
    assert width1 > 300
    assert 0 < x2 - (x1 + width1) < width1 / 2
    assert "↻ tried again, 1m40s in 2 attempts" in drawn


def test_worker_that_died_is_told_in_a_line_with_the_whole_message_below():
    message = "RayTaskError: \x1b[36mray::train()\x1b[39m\n  File x\nIts process has died. Causes include:"
    killed = FAILURE | {"type": "WorkerDied", "message": message}
    events = [event(1, "run_started"), event(1, "step_started", "a", epoch=1)]
    events += [event(2, "step_retry", "a", failure=killed, backoff_s=1.0)]
    source = render(snapshot([step_view("a", "running")], events), 3.0)
    assert '<p class="message">a worker ended without a result: Its process has died</p>' in source
    assert "<summary>The whole message</summary>" in source
    assert "Causes include:" in source
    assert failure_words("ValueError", "\x1b[1mno such field\x1b[0m\nat all") == "no such field\nat all"
    assert failure_words("WorkerDied", "") == "a worker ended without a result"


def test_time_line_has_its_words_beside_the_stretches_of_attempts():
    events = [
        event(0, "run_started"),
        event(0, "step_started", "a", epoch=1),
        event(50, "step_committed", "a", elapsed_s=50.0),
        event(100, "run_started", attempt=2),
        event(150, "step_started", "b", attempt=2, epoch=1),
        event(200, "step_committed", "b", attempt=2, elapsed_s=50.0),
    ]
    drawn = drawings.time_line([step_view("a"), step_view("b")], tell(events, False, 0.0))
    wide, narrow = (ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", drawn))
    ends = [float(r.get("x", "")) + float(r.get("width", "")) for r in wide.iterfind("rect[@class='band']")]
    words = [float(text.get("x", "")) for text in wide.iterfind("text[@class='legend']")]
    assert len(words) == 2
    assert min(words) > max(ends)
    bands = [(float(r.get("y", "")), float(r.get("height", ""))) for r in narrow.iterfind("rect[@class='band']")]
    lines = [float(text.get("y", "")) for text in narrow.iterfind("text[@class='legend']")]
    assert (len(bands), len(lines)) == (4, 2)
    assert not any(top - 1 < y < top + height + 11 for y in lines for top, height in bands)


def test_time_of_a_step_is_that_which_status_tells():
    events = [event(0, "run_started"), event(0, "step_started", "a", epoch=1)]
    events += [event(50, "run_started", attempt=2), event(50, "step_started", "a", attempt=2, epoch=2)]
    history = tell([*events, event(60, "step_committed", "a", attempt=2, elapsed_s=10.0)], False, 0.0)
    made = dataclasses.replace(step_view("a"), manifest=Manifest("corpus", "f" * 64, 1, {}, {}, [], elapsed_s=9.96))
    assert drawings.seconds_taken(made, history) == 9.96
    assert "✓ committed · 10.0s" in drawings.graph([made], history)
    assert drawings.seconds_taken(step_view("a", "running"), tell(events, True, 70.0)) == 20.0
    assert drawings.seconds_taken(step_view("b", "pending"), history) is None


def test_folded_graph_leads_an_edge_around_a_box_that_lies_between():
    nodes = [svg.Node(name) for name in ("root", "left", "above", "below")]
    layout = svg.Layout(node_width=100, node_height=40, gap_x=20, gap_y=10, layers_per_row=2)
    edges = {("root", "left"), ("left", "above"), ("left", "below")}
    drawing = svg.layered_graph(nodes, edges, layout)
    down = re.findall(r'd="M(\d+) (\d+)V', drawing.body)
    assert len(down) == 1  # to the box right below; the other edge leaves at the side
    assert svg.implied_edges(edges) == set()


def test_watcher_without_a_coordinator_tells_what_an_interrupted_step_had_done(store: Store):
    plan = toy_plan()
    run = create_run(store, plan, "local", "r1")
    events = begun(run)
    events.write("run_started")
    events.write("step_started", "source", epoch=1)
    progress = {"done": 3, "total": 12, "figures": {"loss": 1.5}, "time": 1.0}
    (run.directory / "work" / "001" / "source" / "000001" / "progress.json").write(json.dumps(progress).encode())
    seen = Watcher(store, run, plan).look(None, 1000)
    assert seen.status == "interrupted"
    (source, *_) = seen.steps
    assert (source.status, source.done, source.total) == ("interrupted", 3.0, 12.0)


def test_attempts_of_the_run_are_listed_with_where_they_ran():
    events = [
        event(1_000, "run_started", executor="ray", address="auto", job=""),
        event(2_000, "run_started", attempt=2, executor="ray", address="http://head:8265", job="raysubmit_1"),
        event(2_001, "step_started", "a", attempt=2, epoch=1),
        event(2_060, "run_ended", attempt=2, status="cancelled"),
    ]
    source = render(snapshot([step_view("a", "stopped")], events, "cancelled"), 3.0)
    text = text_of(source)
    assert source.count('<table class="flow">') == 2  # of steps and of attempts: a phone would cut them off
    where = "executor ray, address http://head:8265, job raysubmit_1"
    assert f"Attempt 2 cancelled on request 1970-01-01 00:33:20 1m00s {where}" in text
    killed = "Attempt 1 ended without a last entry: its coordinator was killed, or interrupted 1970-01-01 00:16:40 0.0s"
    assert f"{killed} executor ray, address auto" in text
    assert "This run was cancelled. What was finished is kept." in text
    assert "dlm resume r1" in text


def test_run_whose_stage_is_not_known_here_has_a_page(store: Store):
    plan = toy_plan()
    strange = dataclasses.replace(plan.steps[-1], stage="nowhere.to_be_found")
    run = store.create_run(
        "r1",
        {
            "plan": to_json(dataclasses.replace(plan, steps=[*plan.steps[:-1], strange])) | {"recipe": "mine:own"},
            "executor": "local",
            "settings": [],
        },
    )
    text = text_of(write_report(store, run).read_text())
    assert "Recipe mine:own · 0 of 4 steps done" in text
    assert re.search(r"total +○ unknown", text)
    assert "mine:own is no recipe that comes with dlm" in text
