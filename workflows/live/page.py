"""The page of a run as HTML: one file that needs nothing else and, while the run goes on, loads itself again."""

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from workflows.causes import ended_words, failure_words
from workflows.cost import Cost, total_of
from workflows.live import drawings
from workflows.live.drawings import mark_of
from workflows.live.history import Trouble
from workflows.live.lineage import lineage
from workflows.live.snapshot import Snapshot, StepView
from workflows.live.style import SCRIPT, run_style
from workflows.progress import duration
from workflows.report import sections
from workflows.report.style import page_style
from workflows.report.tasks import tasks
from workflows.report.text import Cell, Html, Number, count, note, plain, section, table
from workflows.summary import UNFINISHED

MOST_TROUBLES = 30
MOST_EVENTS = 100
MOST_ROWS = 400
"""Of a table."""
_MOST_CHARS = 4000
"""Of a message, and of a traceback."""
_MOST_SHARDS = 5

_MEANS: Mapping[str, str] = {
    "user": "Something that was given does not fit; it would fail again. Change it, and run with the change.",
    "transient": "A connection or a service failed; such failures are tried again.",
    "infra": "A process, a node or its place was lost; the step goes on from what it had saved.",
    "memory": "Memory or disk ran out; it is tried once more. Give it more room, or smaller pieces.",
    "poison": "It failed again and again at the same place, so trying on would not help.",
    "unschedulable": "Nothing has the room that it wants. Add resources, or ask for less.",
    "numerics": "The figures went wrong (not finite, or too many updates refused); it would fail again.",
    "code": "The program failed in a way that nobody foresaw; the traceback tells where.",
}


def render(seen: Snapshot, every_s: float) -> str:
    """The whole page; while the run goes on it loads itself again about as often as it is written."""
    refresh_s = max(3, round(every_s))
    results = seen.results
    parts = [
        _banner(seen),
        _progress(seen),
        _steps(seen),
        _troubles(seen),
        sections.tiles(results) if results else "",
        _time_line(seen),
        _costs(seen),
        *_trainings(seen),
        sections.evaluation(results) if results else "",
        tasks(results) if results else "",
        sections.samples(results) if results else "",
        sections.corpus(results) if results else "",
        sections.rows(results) if results else "",
        lineage(seen, MOST_ROWS),
        _events(seen),
    ]
    script = f"<script>{SCRIPT}</script>" if seen.is_live else ""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    without = f'<noscript><meta http-equiv="refresh" content="{refresh_s}"></noscript>' if seen.is_live else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{without}'
        f"<title>{mark_of(_sign(seen))} {plain(seen.run_id)}</title><style>{page_style()}{run_style()}</style></head>"
        f'<body data-made="{seen.made_at_s:.0f}" data-every="{refresh_s}">'
        f"{_header(seen)}<main>{''.join(parts)}</main>{script}</body></html>\n"
    )


def _sign(seen: Snapshot) -> str:
    return "committed" if seen.status == "succeeded" else seen.status


def _utc(at_s: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    return time.strftime(form, time.gmtime(at_s))


# Head


def _header(seen: Snapshot) -> str:
    sessions = seen.history.sessions
    over = sum(step.status in ("committed", "cached") for step in seen.steps)
    words = [f"Recipe {seen.workflow}", f"{over} of {len(seen.steps)} steps done"]
    if sessions:
        worked_s = sum(s.end_s - s.start_s for s in sessions)
        attempts = f"{len(sessions)} attempt{'s' if len(sessions) != 1 else ''}"
        words += [f"{attempts}, {duration(worked_s)} in all", f"started {_utc(sessions[0].start_s)} UTC"]
    made = f"Made <time>{_utc(seen.made_at_s)} UTC</time>"
    if seen.is_live:
        fresh = (
            f'{made}<span id="age"></span>. It loads itself again while the run goes on. '
            '<button type="button" id="hold" hidden aria-pressed="false">Hold still</button>'
        )
    else:
        end = _END.get(seen.status, "This run is over.")
        fresh = f"{made}. {end}{plain(f' ({seen.status_detail})' if seen.status_detail else '')}"
    facts = {"Store": seen.store, **seen.facts}
    listed = "".join(f"<dt>{plain(name)}</dt><dd>{_code(value)}</dd>" for name, value in facts.items())
    status = f'<span class="badge {plain(_sign(seen))}">{mark_of(_sign(seen))} {plain(seen.status)}</span>'
    return (
        f'<header><h1>{plain(seen.run_id)} {status}</h1><p class="lead">{plain(" · ".join(words))}</p>'
        f'<p class="note" id="fresh">{fresh}</p>'
        f"<details><summary>How it was started</summary><dl class='facts'>{listed}</dl></details></header>"
    )


_END = {
    "succeeded": "This run is over: everything was made.",
    "partial": "This run is over: the steps that it was asked for are made.",
    "failed": "This run is over: it failed. What was finished is kept.",
    "stopped": "This run was stopped on request. What was finished is kept.",
    "cancelled": "This run was cancelled. What was finished is kept.",
    "interrupted": "Nobody works on this run: what did ended without a word. What was finished is kept.",
    "submitted": "Nobody has begun to work on this run.",
}


def _code(value: str) -> str:
    return f"<code>{plain(_cut(value))}</code>"


def _cut(value: str) -> str:
    """The beginning and the end of a long text."""
    if len(value) <= _MOST_CHARS:
        return value
    half = _MOST_CHARS // 2
    return f"{value[:half]}\n[{count(len(value) - 2 * half)} characters left out]\n{value[-half:]}"


def _banner(seen: Snapshot) -> str:
    """What whoever looks should know first: what failed, how to go on, and what the page could not read."""
    parts: list[str] = []
    if seen.is_live:
        parts.append('<section class="alert" id="stale" role="status" hidden><p></p></section>')
    failed = [step for step in seen.steps if step.status in ("failed", "damaged")]
    for step in failed[:3]:
        message = plain(_cut(step.detail))
        parts.append(
            f'<section class="alert bad"><p><strong>{mark_of("failed")} {plain(step.name)} failed.</strong> '
            f'<span class="message">{message}</span></p></section>'
        )
    if seen.status in UNFINISHED:
        parts.append(
            f'<section class="alert"><p>To go on with it: <code>dlm resume {plain(seen.run_id)} --store '
            f"{plain(seen.store)}</code></p></section>"
        )
    for problem in seen.problems[:5]:
        words = f"This page lacks something: {_cut(problem)}"
        parts.append(f'<section class="alert bad"><p class="message">{plain(words)}</p></section>')
    return "".join(parts)


# Steps


def _progress(seen: Snapshot) -> str:
    """What is being worked on."""
    parts: list[str] = []
    for step in seen.steps:
        if step.status == "running":
            bar = ""
            if step.total:
                share = min(1.0, step.done / step.total)
                label = f"{step.name}: {share:.0%}"
                bar = f'<progress max="1" value="{share:.4f}" aria-label="{plain(label)}">{share:.0%}</progress>'
            detail = plain(_cut(step.detail))
            parts.append(f'<div class="now"><h3>{plain(step.name)}</h3>{bar}<p class="detail">{detail}</p></div>')
    return section("Being worked on", *parts[:MOST_ROWS]) if parts else ""


def _steps(seen: Snapshot) -> str:
    rows: list[list[Cell]] = []
    for step in seen.steps[:MOST_ROWS]:
        attempts = len(seen.history.spans_of(step.name))
        rows.append(
            [
                step.name,
                Html(_badge(step.status)),
                Number("" if (took_s := drawings.seconds_taken(step, seen.history)) is None else duration(took_s)),
                Html(f"{attempts}<span class='on-phone'> attempts</span>" if attempts > 1 else ""),
                Html(f'<span class="message">{plain(_cut(_detail(step, seen)))}</span>'),
            ]
        )
    head: list[Cell] = ["Step", "Status", Number("Time"), "Attempts", "Detail"]
    if all(Html("") == row[3] for row in rows):
        head, rows = [head[i] for i in (0, 1, 2, 4)], [[row[i] for i in (0, 1, 2, 4)] for row in rows]
    more = len(seen.steps) - MOST_ROWS
    remark = note(f"{count(more)} more steps are not listed.") if more > 0 else ""
    legend = note(
        "An arrow leads from what is made to what is made from it; on a narrow screen arrows that others imply are "
        f"left out.{drawings.left_out(seen.steps)}"
    )
    return section("Steps", drawings.graph(seen.steps, seen.history), legend, _flowing(table(head, rows)), remark)


def _flowing(shown: str) -> str:
    """A table whose rows become paragraphs on a phone, where it would be cut off."""
    return shown.replace("<table>", '<table class="flow">', 1)


def _badge(status: str) -> str:
    return f'<span class="badge {plain(status)}">{mark_of(status)} {plain(status)}</span>'


def _detail(step: StepView, seen: Snapshot) -> str:
    if step.status == "cached" and step.made_by:
        return "made before by this run" if step.made_by == seen.run_id else f"made by the run {step.made_by}"
    return step.detail


# Failures


def _troubles(seen: Snapshot) -> str:
    troubles = seen.history.troubles
    if not troubles and not seen.history.warnings:
        return ""
    shown = [_trouble(trouble, seen) for trouble in reversed(troubles[-MOST_TROUBLES:])]
    if len(troubles) > MOST_TROUBLES:
        shown.append(note(f"{count(len(troubles) - MOST_TROUBLES)} earlier ones are not shown."))
    shown += [note(f"Warning of {_cut(warning)}") for warning in seen.history.warnings[-MOST_TROUBLES:]]
    return section("Failures, the latest first", *shown)


def _trouble(trouble: Trouble, seen: Snapshot) -> str:
    times = f"{count(trouble.count)} times, the last at" if trouble.count > 1 else "at"
    where = f"{times} {_utc(trouble.time_s)} UTC in attempt {trouble.attempt} of the run; {trouble.after}"
    shards = ""
    if trouble.shards:
        more = f" and {count(len(trouble.shards) - _MOST_SHARDS)} more" if len(trouble.shards) > _MOST_SHARDS else ""
        shards = f'<p class="detail">Shards: {plain(", ".join(trouble.shards[:_MOST_SHARDS]) + more)}</p>'
    traceback = ""
    if trouble.traceback:
        summary = "Traceback, or the last output" + (f", of rank {trouble.rank}" if trouble.rank else "")
        traceback = f"<details><summary>{summary}</summary><pre>{plain(_cut(trouble.traceback))}</pre></details>"
    words = failure_words(trouble.kind, trouble.message)
    if words != trouble.message:
        whole = f"<details><summary>The whole message</summary><pre>{plain(_cut(trouble.message))}</pre></details>"
        traceback = whole + traceback
    call = f"{trouble.step}-{trouble.shards[-1]}" if trouble.shards else trouble.step
    folder = f"work/{trouble.attempt:03d}/{call}"
    logs = f'<p class="detail">Logs: {_code(f"{seen.store}/runs/{seen.run_id}/{folder}")}</p>'
    return (
        f'<article class="trouble"><h3>{mark_of("failed")} {plain(trouble.step)}: {plain(trouble.kind)}</h3>'
        f'<p class="detail">{plain(where)}</p><p class="message">{plain(_cut(words))}</p>'
        f'<p class="detail"><strong>{plain(trouble.error_class)}.</strong> {plain(_MEANS.get(trouble.error_class, ""))}'
        f"</p>{shards}{traceback}{logs}</article>"
    )


# Time, curves, cost


def _time_line(seen: Snapshot) -> str:
    drawn = drawings.time_line(seen.steps, seen.history)
    if not drawn or not seen.history.spans:
        return ""
    explanation = (
        "A bar is an attempt of a step, with how the last of them ended; a dashed one was killed or tried again."
    )
    if len(seen.history.sessions) > 1:
        explanation += " Pauses between attempts of the run are shortened."
    return section("Time line", drawn, note(explanation), _sessions(seen))


def _sessions(seen: Snapshot) -> str:
    """The attempts of the run, if there are several or something is known of where it ran."""
    sessions = seen.history.sessions
    if len(sessions) < 2 and not any(session.about for session in sessions):
        return ""
    rows: list[list[Cell]] = [
        [
            Html(f"<span class='on-phone'>Attempt </span>{s.attempt}"),
            ended_words(s.outcome),
            _utc(s.start_s),
            Number(duration(s.end_s - s.start_s)),
            s.about,
        ]
        for s in reversed(sessions[-MOST_ROWS:])
    ]
    head: list[Cell] = ["Attempt of the run", "It was or is", "Started (UTC)", Number("Time"), "Where"]
    return _flowing(table(head, rows))


def _trainings(seen: Snapshot) -> Sequence[str]:
    unigram = seen.results.results.get("unigram_entropy") if seen.results else None
    several = len(seen.trainings) > 1
    return [
        sections.training(
            f"Training: {t.step}" if several else "Training", t.metrics, t.stats, unigram, is_going_on=t.is_going_on
        )
        for t in seen.trainings
    ]


def _costs(seen: Snapshot) -> str:
    of = seen.costs.of
    if not of:
        return ""
    order = {step.name: place for place, step in enumerate(seen.steps)}
    has_gpus = any(cost.gpu_s for cost in of.values())
    attempts = sorted({attempt for attempt, _ in of})
    head: list[Cell] = ["Step", Number("Attempt"), Number("CPU time"), *([Number("GPU time")] if has_gpus else [])]
    head.append(Number("Processes"))
    keys = sorted(of, key=lambda key: (order[key[1]], key[0]))
    rows = [_cost_row(step, str(attempt), of[attempt, step], has_gpus) for attempt, step in keys[:MOST_ROWS]]
    if len(attempts) > 1:
        for attempt in attempts[-MOST_ROWS:]:
            of_attempt = total_of(cost for cost in of.values() if cost.attempt == attempt)
            rows.append(_cost_row("all steps", str(attempt), of_attempt, has_gpus))
    rows.append(_cost_row("the whole run", "", total_of(of.values()), has_gpus))
    words = ["CPU time of the processes of each step, and of those that they started, in each attempt of the run."]
    if has_gpus:
        words.append("GPU time is that of GPUs held, busy or not.")
    if seen.costs.num_unread:
        words.append(f"{count(seen.costs.num_unread)} processes are not counted yet.")
    if len(keys) > MOST_ROWS:
        words.append(f"{count(len(keys) - MOST_ROWS)} more rows are not listed, but counted.")
    return section("Cost", table(head, rows), note(" ".join(words)))


def _cost_row(name: str, attempt: str, cost: Cost, has_gpus: bool) -> list[Cell]:
    gpu = [Number(duration(cost.gpu_s))] if has_gpus else []
    return [name, Number(attempt), Number(duration(cost.cpu_s)), *gpu, Number(count(cost.processes))]


# Events


def _events(seen: Snapshot) -> str:
    if not seen.events:
        return ""
    rows: list[list[Cell]] = [
        [
            _utc(event["time"], "%m-%d %H:%M:%S"),
            str(event["attempt"]),
            str(event["kind"]),
            str(event["step"]),
            _rest(event),
        ]
        for event in reversed(seen.events[-MOST_EVENTS:])
    ]
    more = len(seen.events) - MOST_EVENTS
    remark = note(f"{count(more)} earlier ones are in the folder events of the run.") if more > 0 else ""
    shown = table(["When (UTC)", "Attempt", "What", "Step", "Details"], rows)
    return section(
        "Events", f"<details><summary>{count(len(rows))} events, the latest first</summary>{shown}{remark}</details>"
    )


def _rest(event: Mapping[str, Any]) -> str:
    """What else an event says, in a line; of a failure its message, which stands in full above."""
    rest = {k: v for k, v in event.items() if k not in ("time", "attempt", "kind", "step")}
    if isinstance(rest.get("failure"), dict):
        rest["failure"] = rest["failure"]["message"]
    words = ", ".join(f"{k} {v if isinstance(v, str) else json.dumps(v)}" for k, v in rest.items())
    return words if len(words) <= 200 else words[:200] + "…"
