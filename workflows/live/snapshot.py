"""What the page of a run shows, read from the store, and from the coordinator where there is one."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.auth import redacted_in, secret_values
from pipeline.artifact import Manifest, checked
from pipeline.config import diff, to_json
from pipeline.errors import CorruptionError, UserError
from pipeline.storage import Place
from workflows import runs
from workflows.copies import local_copy, scratch
from workflows.live.history import Costs, History, tell, with_last_signs
from workflows.live.readers import CostReader, MetricsReader
from workflows.plan import Plan, PlannedStep
from workflows.progress import progress_words, seconds_left
from workflows.recipes import RECIPES
from workflows.report.data import Metrics, ReportData, collect
from workflows.state import StepState
from workflows.step import load_stage
from workflows.store import ArtifactPlace, RunPlace, Store
from workflows.summary import Event, RunSummary, read_events, summarise

_STAGE_INPUTS = {
    "corpus": "corpus",
    "tokenizer": "tokenizer",
    "tokenization": "tokens",
    "packing": "rows",
    "pretrain": "pretrain",
    "convert": "weights",
    "evaluate": "evaluation",
    "tasks": "tasks",
    "generate": "samples",
}
"""What the sections of a report call what a stage makes."""
_METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class StepView:
    """Where one step stands."""

    name: str
    stage: str
    status: str
    detail: str
    """Why it stands there, or how far it has come."""
    started_s: float
    """0 if it did not start in this attempt of the run."""
    ended_s: float
    done: float
    total: float
    """0 if nothing tells how much there is to do."""
    address: str
    planned: PlannedStep
    manifest: Manifest | None = None
    made_by: str = ""
    """The run that made it."""


@dataclass(frozen=True)
class Training:
    """What a training has measured so far."""

    step: str
    metrics: Metrics
    stats: Mapping[str, Any]
    is_going_on: bool


@dataclass(frozen=True)
class Snapshot:
    """A run at a moment."""

    run_id: str
    workflow: str
    status: str
    made_at_s: float
    store: str
    facts: Mapping[str, str]
    """What else was written down when the run was created, in words."""
    environment: Mapping[str, str]
    steps: tuple[StepView, ...]
    status_detail: str = ""
    history: History = field(default_factory=History)
    costs: Costs = field(default_factory=Costs)
    events: tuple[Mapping[str, Any], ...] = ()
    trainings: tuple[Training, ...] = ()
    results: ReportData | None = None
    changes: Mapping[str, Mapping[str, tuple[Any, Any]]] | None = None
    """Step -> setting -> (the recipe's, this run's); None where it does not come with dlm."""
    problems: tuple[str, ...] = ()
    """What could not be read."""

    @property
    def is_live(self) -> bool:
        """Whether there is more to come without anybody doing anything."""
        return self.status == "running"


def view_of(state: StepState) -> dict[str, Any]:
    """What a coordinator knows of a step beyond the store, copied: the state goes on changing."""
    found = {
        "status": state.status,
        "detail": state.reason,
        "started_s": state.started_at,
        "ended_s": state.ended_at,
    }
    return found | _progress(dict(state.progress), state.first_progress, state.status)


def _progress(progress: Mapping[str, Any], first: tuple[float, float] | None, status: str) -> dict[str, Any]:
    found: dict[str, Any] = {"done": float(progress.get("done", 0)), "total": float(progress.get("total", 0))}
    if status != "running":
        return found
    return found | {"detail": ", ".join(progress_words(progress, seconds_left(progress, first)))}


class Watcher:
    """Takes snapshots of one run; what cannot change is read once."""

    def __init__(self, store: Store, run: RunPlace, plan: Plan) -> None:
        self._store, self._run, self._plan = store, run, plan
        self._events: dict[str, Event] = {}
        self._costs = CostReader(run, [step.name for step in plan.steps])
        self._metrics: dict[str, MetricsReader] = {}
        self._committed: dict[str, tuple[Place, Manifest, str]] = {}
        self._results: tuple[frozenset[str], ReportData | None, str] | None = None
        self._secrets = secret_values()
        self._stages = {step.name: _stage_name(step) for step in plan.steps}
        self._facts = self._clean(_facts(run))
        self._changes = _changes(plan)

    def look(self, views: Mapping[str, Mapping[str, Any]] | None, most_calls: int) -> Snapshot:
        """The run as it is now.

        Args:
            views: ``view_of`` of every step, from the coordinator that works on the run; None where only the store is
                asked.
            most_calls: calls whose costs are read at most, of those that are not known to be over.
        """
        now_s = time.time()
        summary = summarise(self._store, self._run, self._events) if views is None else None
        events = read_events(self._run, self._events)
        history = tell(events, summary is None or summary.status == "running", now_s)
        costs = self._costs.read(most_calls)
        problems: list[str] = []
        if summary is not None:
            views = self._views(summary, history)
        assert views is not None
        steps = tuple(self._step(step, views[step.name], problems) for step in self._plan.steps)
        results = self._read_results(problems)
        return Snapshot(
            run_id=self._run.run_id,
            workflow=self._plan.recipe or self._plan.workflow,
            status=summary.status if summary else history.sessions[-1].outcome if history.sessions else "running",
            status_detail=self._clean(summary.detail) if summary else "",
            made_at_s=now_s,
            store=self._clean(self._store.url),
            facts=self._facts,
            environment=self._clean(self._plan.environment),
            steps=steps,
            history=with_last_signs(history, costs),
            costs=costs,
            events=tuple(events),
            trainings=tuple(self._trainings(steps, problems)),
            results=results,
            changes=self._clean(self._changes),
            problems=tuple(self._clean(problems)),
        )

    def _clean(self, value: Any) -> Any:
        """A value with the secrets that this process knows out of every text in it."""
        return redacted_in(value, self._secrets)

    def _views(self, summary: RunSummary, history: History) -> dict[str, dict[str, Any]]:
        """Where the steps stand, as the store tells."""
        found: dict[str, dict[str, Any]] = {}
        for step in summary.steps:
            last = next(reversed(history.spans_of(step.step)), None)
            view: dict[str, Any] = {"status": step.status, "detail": step.detail}
            view |= {"started_s": last.start_s if last else 0.0, "ended_s": last.end_s if last else 0.0}
            found[step.step] = view | _progress(step.progress or {}, None, step.status)
        return found

    def _step(self, step: PlannedStep, view: Mapping[str, Any], problems: list[str]) -> StepView:
        stage = self._stages[step.name]
        place = self._store.artifact(stage, step.fingerprint)
        if step.name not in self._committed and view["status"] in ("committed", "cached"):
            try:
                if (found := place.committed_manifest()) is not None:
                    self._committed[step.name] = (*found, place.made_by())
            except CorruptionError as error:
                problems.append(str(error))
        committed = self._committed.get(step.name)
        return StepView(
            name=step.name,
            stage=stage,
            status=view["status"],
            detail=self._clean(view["detail"]),
            started_s=view["started_s"],
            ended_s=view["ended_s"],
            done=view["done"],
            total=view["total"],
            address=place.address if stage else "",
            planned=step,
            manifest=committed[1] if committed else None,
            made_by=committed[2] if committed else "",
        )

    def _sources(self) -> dict[str, str]:
        """Names that the sections of a report have for inputs -> step that makes them."""
        by_stage = {self._stages[step.name]: step for step in self._plan.steps}
        if (report := by_stage.get("report")) is not None:
            return dict(report.inputs)
        return {name: by_stage[stage].name for stage, name in _STAGE_INPUTS.items() if stage in by_stage}

    def _read_results(self, problems: list[str]) -> ReportData | None:
        sources = {name: step for name, step in self._sources().items() if step in self._committed}
        if self._results is None or self._results[0] != frozenset(sources):
            data, fault = None, ""
            try:
                there = {name: local_copy(self._committed[step][0]) for name, step in sources.items()}
                data = collect(self._run.run_id, there, sources, with_metrics=False)
            except (CorruptionError, UserError, OSError) as error:
                fault = f"the results could not be read: {error}"
            self._results = frozenset(sources), data, fault
        if self._results[2]:
            problems.append(self._results[2])
        return self._results[1]

    def _trainings(self, steps: Iterable[StepView], problems: list[str]) -> Iterable[Training]:
        for step in steps:
            if step.stage != "pretrain":
                continue
            committed = self._committed.get(step.name)
            try:
                reader = self._metrics_reader(step, committed[0] if committed else None)
                metrics = reader.read()
            except (CorruptionError, OSError) as error:
                problems.append(f"the metrics of {step.name} could not be read: {error}")
                continue
            stats = committed[1].stats if committed else {}
            yield Training(step.name, metrics, stats, step.status == "running")

    def _metrics_reader(self, step: StepView, committed: Place | None) -> MetricsReader:
        key = f"{step.name}{'' if committed is None else ', committed'}"
        if key not in self._metrics:
            if committed is None:
                state = ArtifactPlace(self._store.root / "artifacts" / step.address).state
                path = (state.path if state.is_local else scratch(state)) / _METRICS
            else:
                path = checked(local_copy(committed), _METRICS)
            self._metrics[key] = MetricsReader(path)
        return self._metrics[key]


def _stage_name(step: PlannedStep) -> str:
    """Empty for a stage of the user's own that cannot be imported here: where it lies cannot be told, all else can."""
    try:
        return load_stage(step.stage).name
    except UserError:
        return ""


def _facts(run: RunPlace) -> dict[str, str]:
    """What run.json says beside the plan."""
    frozen = run.plan()
    facts = {"Command": runs.command_of(run), "Executor": str(frozen["executor"])}
    for name, value in frozen.items():
        if name in ("plan", "executor", "settings") or value in ("", None, [], {}):
            continue
        words = ", ".join(f"{key} {one}" for key, one in value.items()) if isinstance(value, dict) else str(value)  # pyright: ignore
        facts[name.replace("_", " ").capitalize()] = words
    return facts


def _changes(plan: Plan) -> dict[str, dict[str, tuple[Any, Any]]] | None:
    """Settings of each step that are not those of the recipe as it is now."""
    if plan.workflow not in RECIPES:
        return None
    defaults = {step.name: to_json(step.config) for step in RECIPES[plan.workflow]().steps}
    return {step.name: diff(defaults.get(step.name, {}), step.config) for step in plan.steps}
