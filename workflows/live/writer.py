"""Keeps the page of a run up to date while a coordinator works on it, and brings it up to date when none does."""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workflows.copies import scratch
from workflows.lease import lease_is_free
from workflows.live.page import render
from workflows.live.snapshot import Watcher, view_of
from workflows.plan import Plan
from workflows.report.text import plain
from workflows.runs import frozen_plan
from workflows.state import StepState
from workflows.store import RunPlace, Store

PAGE = "report.html"
_EVERY_S = 3.0
_EVERY_REMOTE_S = 30.0
_LEAST_REST = 20.0
"""Times as long as a page took to make, until the next one: on a busy machine it takes no more than a twentieth."""
_CALLS_A_TIME = 1000
_CALLS_A_TIME_REMOTE = 50
_EVERYTHING = 10**9


class LiveReport:
    """The page of a run that a coordinator of this process works on.

    Made in a thread, so that a slow store never keeps the coordinator waiting; nothing that goes wrong with it reaches
    the coordinator.  The page itself then says what went wrong, and ``problem`` does.

        with LiveReport(store, run, plan) as report:
            Coordinator(..., on_change=report.update).run()
    """

    def __init__(self, store: Store, run: RunPlace, plan: Plan, every_s: float | None = None) -> None:
        self._store, self._run, self._plan = store, run, plan
        self._every_s = every_s or (_EVERY_S if run.directory.is_local else _EVERY_REMOTE_S)
        self._calls = _CALLS_A_TIME if run.directory.is_local else _CALLS_A_TIME_REMOTE
        self._watcher: Watcher | None = None
        self._views: Mapping[str, Mapping[str, Any]] | None = None
        self._is_wanted, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)
        self._next_s = 0.0
        self.problem = ""
        """Why the newest page could not be made or written; empty if it could."""

    def __enter__(self) -> "LiveReport":
        self._thread.start()
        return self

    def update(self, states: Sequence[StepState]) -> None:
        """Take note of where the steps stand; cheap, may be called as often as they change."""
        if time.monotonic() < self._next_s or self._is_wanted.is_set():
            return
        self._views = {state.step.name: view_of(state) for state in states}
        self._is_wanted.set()

    def __exit__(self, *details: object) -> None:
        """The last page, from the store: also of a run that ended in an error."""
        self._is_over.set()
        self._is_wanted.set()
        self._thread.join()
        if self._views is not None:  # else the run was never begun here, and the page is somebody else's
            self._watcher = None
            self._write(None, _EVERYTHING)

    def _work(self) -> None:
        while self._is_wanted.wait():
            if self._is_over.is_set():
                return
            start_s = time.monotonic()
            self._write(self._views, self._calls)
            took_s = time.monotonic() - start_s
            self._next_s = time.monotonic() + max(self._every_s, _LEAST_REST * took_s)
            self._is_wanted.clear()
            if self._is_over.is_set():
                return  # it was told so before the line above took that back

    def _write(self, views: Mapping[str, Mapping[str, Any]] | None, most_calls: int) -> None:
        try:
            self._watcher = self._watcher or Watcher(self._store, self._run, self._plan)
            page = render(self._watcher.look(views, most_calls), self._every_s)
            self.problem = ""
        except Exception as error:  # noqa: BLE001 - a page must never stop a run; it says what went wrong instead
            self.problem = f"the page of the run could not be made: {type(error).__name__}: {error}"
            page = _apology(self._run.run_id, self.problem)
        try:
            (self._run.directory / PAGE).write(page.encode(errors="backslashreplace"), is_durable=False)
        except Exception as error:  # noqa: BLE001 - as above; a store that cannot be written stops the run by itself
            self.problem = f"the page of the run could not be written: {type(error).__name__}: {error}"


def _apology(run_id: str, problem: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta http-equiv="refresh" content="10">'
        f"<title>{plain(run_id)}</title></head><body><h1>{plain(run_id)}</h1><p>{plain(problem)}</p>"
        "<p>The run itself is not touched by this; dlm status tells where it stands.</p></body></html>\n"
    )


def write_report(store: Store, run: RunPlace) -> Path:
    """A file of this machine with the page of a run, made anew unless a coordinator keeps it up to date."""
    place = run.directory / PAGE
    if lease_is_free(run.lease_dir) or not place.exists():
        page = render(Watcher(store, run, frozen_plan(run)).look(None, _EVERYTHING), _EVERY_S)
        place.write(page.encode(errors="backslashreplace"))
    if place.is_local:
        return place.path
    copy = scratch(place)
    copy.parent.mkdir(parents=True, exist_ok=True)
    place.storage.download(place.key, copy)
    return copy
