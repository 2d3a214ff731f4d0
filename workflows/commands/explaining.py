"""``dlm explain``: why a step would run, field by field."""

import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from glob import glob
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.config import flatten
from pipeline.corpus.config import CorpusConfig
from pipeline.errors import CorruptionError, UserError
from workflows import runs
from workflows.amendments import Drift, refuse_outdated
from workflows.commands.common import (
    DEFAULT_STORE,
    JsonOption,
    SetOption,
    StoreOption,
    find_store,
    found_or_suggested,
    parse_settings,
    print_json,
    print_line,
    store_option,
)
from workflows.commands.completing import complete_runs_and_recipes, complete_steps
from workflows.outside import FileChange, changed_corpus_files
from workflows.plan import Nearest, Plan, PlannedStep, check_drift, find_nearest, step_config
from workflows.plan import explain as actions_of
from workflows.recipes import RECIPES
from workflows.step import load_stage
from workflows.store import Store

_MOST_FILES = 20


def explain(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_RECIPE",
            help="Name of a recipe, or else a run id.",
            autocompletion=complete_runs_and_recipes,
        ),
    ],
    step: Annotated[
        str, typer.Argument(metavar="[STEP]", help="One step; all by default.", autocompletion=complete_steps)
    ] = "",
    settings: SetOption = [],  # noqa: B006 - typer reads it, nobody changes it
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show for each step what would happen and why, with every field that differs from the nearest artifact.

    Of a run also what would come out otherwise now, which a resume refuses.
    """
    place = find_store(store)
    plan = _plan_of(place, what, settings)
    drifted = {} if _is_recipe(what) else _drift_of(place, what, plan)
    names = [planned.name for planned in plan.steps]
    if step:
        names = [found_or_suggested("step", step, names)]
    rows: list[dict[str, Any]] = []
    for action in actions_of(plan, place):
        if action.step not in names:
            continue
        planned = plan.step(action.step)
        stage = load_stage(planned.stage)
        nearest = find_nearest(plan, planned, stage, place) if action.action == "run" else None
        where = place.artifact(stage.name, planned.fingerprint)
        made_by = where.made_by()
        drift = Nearest(made_by, where, drifted[action.step]) if action.step in drifted else None
        row = {
            **vars(action),
            "artifact": str(where.directory),
            "from_run": made_by,
            "accepted": _changes_json(accepted_changes(planned)),
            "nearest": None if nearest is None else _compared(planned, nearest),
            "drifted": None if drift is None else _compared(planned, drift),
        }
        rows.append(row)
        if not as_json:
            _print(row, plan, planned)
    if as_json:
        print_json(rows)


def _is_recipe(what: str) -> bool:
    return what in RECIPES or ":" in what


def _plan_of(store: Store, what: str, settings: list[str]) -> Plan:
    if _is_recipe(what):
        return runs.plan_recipe(what, parse_settings(settings))
    known = [run.run_id for run in store.runs()]
    found_or_suggested("recipe or run", what, [*RECIPES, *known])
    if settings:
        raise UserError(
            f"--set {settings[0]} would change nothing: the settings of run {what} are frozen. Explain its recipe "
            "instead"
        )
    return runs.frozen_plan(store.run(what))


def _drift_of(store: Store, run_id: str, plan: Plan) -> Drift:
    drifted = check_drift(plan)
    refuse_outdated(drifted, runs.command_of(store.run(run_id)) + store_option(store))
    return drifted


def _compared(step: PlannedStep, with_: Nearest) -> dict[str, Any]:
    """In what a step differs from an artifact, down to the files outside."""
    files = changed_content(step, with_)
    newer = [] if files else changed_files(step, with_)
    return {
        "run_id": with_.run_id,
        "artifact": str(with_.place.directory),
        "changes": _changes_json(with_.changes),
        "files": [{**vars(file), "told": file.told} for file in files],
        "files_changed_since": [path for path, _ in newer],
    }


def _changes_json(changes: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    return {field: {"from": old, "to": new} for field, (old, new) in changes.items()}


def accepted_changes(step: PlannedStep) -> dict[str, tuple[Any, Any]]:
    """Fields in which a step would have come out otherwise when it was accepted as it was -> (committed, then)."""
    frozen = flatten({"config": step.config, "code_version": step.code_version, "external": step.external})
    return {field: (frozen.get(field), value) for field, value in step.accepted.items()}


def changed_content(step: PlannedStep, nearest: Nearest) -> list[FileChange]:
    """Files of a corpus that have other bytes than those which the nearest artifact was made of."""
    config = step_config(step)
    if not isinstance(config, CorpusConfig):
        return []
    keys = [key.split(".") for key in nearest.changes if key.partition(".")[0] == "external"]
    return changed_corpus_files(config, {key[1] for key in keys if len(key) > 1}, nearest.place)


def changed_files(step: PlannedStep, nearest: Nearest) -> list[tuple[str, float]]:
    """Outside files that a step reads and that were written after the nearest artifact was begun, with when.

    Only if it was made from other outside data: the files of the sources that differ, as far as they lie on this
    machine.
    """
    keys = [key.split(".")[1:2] for key in nearest.changes if key.partition(".")[0] == "external"]
    if not keys:
        return []
    try:
        committed = nearest.place.committed_manifest()
    except CorruptionError:
        return []  # damaged since it was compared with; verify tells
    since = committed[1].started_at if committed is not None else 0.0
    sources = {key[0] for key in keys if key}
    texts = [os.path.expanduser(text) for name, text in _texts(step.config) if _is_of(name, sources, step.config)]
    paths = [
        Path(path) for text in texts if os.sep in text or Path(text).exists() for path in glob(text, recursive=True)
    ]
    files = {file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))}
    dated = [(str(file), file.stat().st_mtime) for file in sorted(files) if file.is_file()]
    return [(file, when) for file, when in dated if since and when >= since]


def _is_of(name: str, sources: set[str], config: Any) -> bool:
    """Whether a setting is about one of the sources, if settings are told apart by source at all."""
    named = sources & {part for path in flatten(config) for part in path.split(".")}
    return not named or bool(named & set(name.split(".")))


def _texts(config: Any) -> Iterator[tuple[str, str]]:
    """All strings of a configuration by their path, those of lists too."""
    for path, value in flatten(config).items():
        for item in value if isinstance(value, list) else [value]:  # pyright: ignore[reportUnknownVariableType]
            if isinstance(item, str) and item:
                yield path, item


def _told(field: str) -> str:
    kind, _, name = field.partition(".")
    return {"config": name, "external": f"outside data {name}".rstrip()}.get(kind, field)


def _print(row: dict[str, Any], plan: Plan, step: PlannedStep) -> None:
    by = f", made by run {row['from_run']}" if row["from_run"] else ""
    print_line(f"{row['step']}  {row['action']}: {row['reason']}{by}")
    print_line(f"  artifact  {row['artifact']}")
    for field, change in row["accepted"].items():
        old, new = (json.dumps(change[side]) for side in ("from", "to"))
        print_line(f"  accepted as it was, although {_told(field)} differs: {old} -> {new}")
    if row["accepted"] and row["action"] == "run":
        print_line(f"  and is gone since: the run goes on only with --rebuild {step.name}")
    if (drifted := row["drifted"]) is not None:
        print_line("  drifted   it would come out otherwise now")
        _print_changes(drifted, step)
        again = f"--rebuild {step.name}" if row["action"] == "run" else f"--accept-drift or --rebuild {step.name}"
        print_line(f"    dlm resume refuses that without {again}")
    if (nearest := row["nearest"]) is not None:
        print_line(f"  nearest   {nearest['artifact']}, made by run {nearest['run_id']}")
        _print_changes(nearest, step)


def _print_changes(compared: Mapping[str, Any], step: PlannedStep) -> None:
    for field, change in compared["changes"].items():
        kind, _, name = field.partition(".")
        old, new = (json.dumps(change[side]) for side in ("from", "to"))
        if kind == "inputs":
            made = f" (step {step.inputs[name]})" if name in step.inputs else ""
            old, new = (str(change[side] or "none")[:12] for side in ("from", "to"))
            print_line(f"    input {name}{made}: {old} -> {new}")
        else:
            print_line(f"    {_told(field)}: {old} -> {new}")
    for file in compared["files"][:_MOST_FILES]:
        print_line(f"    file {file['source']}: {file['told']}")
    if len(compared["files"]) > _MOST_FILES:
        print_line(f"    and {len(compared['files']) - _MOST_FILES} more files")
    files = compared["files_changed_since"]
    for path in files[:_MOST_FILES]:
        written = datetime.fromtimestamp(Path(path).stat().st_mtime)
        print_line(f"    written since then: {path} ({written:%Y-%m-%d %H:%M:%S})")
    if len(files) > _MOST_FILES:
        print_line(f"    and {len(files) - _MOST_FILES} more files")
