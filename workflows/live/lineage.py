"""Where everything came from: each artifact, what it was made from, with which settings, by whom."""

import json
import time
from collections.abc import Mapping
from typing import Any

from workflows.live.snapshot import Snapshot, StepView
from workflows.progress import duration
from workflows.report.text import ABSENT, Cell, Html, Number, count, note, plain, scaled, section, table

_MOST_CONFIG_CHARS = 100_000
"""Of all configurations together."""
_MOST_CHANGES = 40
_MOST_VALUE_CHARS = 200


def lineage(seen: Snapshot, most_rows: int) -> str:
    """The section of the page."""
    head: list[Cell] = ["Artifact", "Made from", "Made by run", "Started (UTC)", Number("Time"), Number("Size")]
    head += [Number("Code version")]
    rows = [_row(step, seen) for step in seen.steps[:most_rows]]
    return section(
        "Lineage",
        table(head, rows),
        note(
            "An artifact is addressed by its stage and the first digits of the fingerprint of all that determines it; "
            f"{ABSENT}: not made yet."
        ),
        _environments(seen),
        _changes(seen),
        _configurations(seen),
    )


def _row(step: StepView, seen: Snapshot) -> list[Cell]:
    planned = step.planned
    sources = [f"{name} ({source})" if name != source else name for name, source in planned.inputs.items()]
    made_from = ", ".join([*sources, *([] if planned.external is None else ["data from outside"])])
    address = Html(f'{plain(step.name)}<br><code title="{plain(planned.fingerprint)}">{plain(step.address)}</code>')
    code = Number(str(planned.code_version))
    made = step.manifest
    if made is None:
        return [address, made_from, ABSENT, ABSENT, Number(ABSENT), Number(ABSENT), code]
    by = "this run" if step.made_by == seen.run_id else step.made_by
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(made.started_at))
    size = Number(scaled(sum(record.size_bytes for record in made.files), "B"))
    return [address, made_from, by, started, Number(duration(made.elapsed_s)), size, code]


def _words(environment: Mapping[str, str]) -> str:
    versions = [f"{name} {v}" for name, v in environment.items() if name != "machine" and v != "absent"]
    return ", ".join(versions) + (f" on {environment['machine']}" if "machine" in environment else "")


def _environments(seen: Snapshot) -> str:
    """With which packages; step by step only where they differ from those that the run was planned with."""
    planned = _words(seen.environment)
    others = {
        step.name: words
        for step in seen.steps
        if step.manifest is not None and (words := _words(step.manifest.environment)) != planned
    }
    differing = "".join(note(f"{name} was made with {words}.") for name, words in list(others.items())[:_MOST_CHANGES])
    return note(f"Planned with {planned}.") + differing


def _shown(value: Any) -> str:
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= _MOST_VALUE_CHARS else words[:_MOST_VALUE_CHARS] + "…"


def _changes(seen: Snapshot) -> str:
    """Settings that are not the recipe's."""
    if seen.changes is None:
        return note(f"{seen.workflow} is no recipe that comes with dlm, so settings are not compared with it.")
    found = [
        (f"{step}.{field}", old, new) for step, fields in seen.changes.items() for field, (old, new) in fields.items()
    ]
    if not found:
        return note("All settings are those of the recipe.")
    rows: list[list[Cell]] = [
        [Html(f"<code>{plain(path)}</code>"), _shown(old), _shown(new)] for path, old, new in found[:_MOST_CHANGES]
    ]
    more = len(found) - _MOST_CHANGES
    remark = note(f"{count(more)} more are not listed.") if more > 0 else ""
    return "<h3>Settings that are not the recipe's</h3>" + table(["Setting", "Recipe", "This run"], rows) + remark


def _configurations(seen: Snapshot) -> str:
    whole = json.dumps({step.name: step.planned.config for step in seen.steps}, indent=2, ensure_ascii=False)
    cut = whole[:_MOST_CONFIG_CHARS]
    more = f"\n[{count(len(whole) - len(cut))} characters more are in run.json]" if len(cut) < len(whole) else ""
    return f"<details><summary>Configuration of every step</summary><pre>{plain(cut + more)}</pre></details>"
