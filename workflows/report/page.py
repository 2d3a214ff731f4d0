"""The report as one HTML page that needs nothing else: no scripts, no fonts, no network."""

import json
import time
from collections.abc import Mapping, Sequence

from pipeline.artifact import Manifest
from pipeline.lineage import told
from pipeline.weights import Origin
from workflows.progress import duration
from workflows.report import sections, svg
from workflows.report.data import ReportData
from workflows.report.style import page_style
from workflows.report.tasks import tasks
from workflows.report.text import Cell, Html, Number, listed, note, plain, scaled, section, table


def render_page(data: ReportData, run_id: str = "") -> str:
    """The whole page; ``run_id`` is the run that makes it."""
    body = "".join(
        [
            _missing(data),
            sections.tiles(data),
            sections.evaluation(data),
            tasks(data),
            sections.training("Training", data.metrics, data.stats("pretrain"), data.results.get("unigram_entropy")),
            sections.samples(data),
            _pipeline(data),
            sections.corpus(data),
            sections.rows(data),
            _provenance(data),
        ]
    )
    made_in = f" Made in the run {run_id}." if run_id else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{plain(data.title)}</title><style>{page_style()}</style></head><body>"
        f'<header><h1>{plain(data.title)}</h1><p class="lead">{plain(_lead(data) + made_in)}</p></header>'
        f"<main>{body}</main></body></html>\n"
    )


def _lead(data: ReportData) -> str:
    manifests = data.manifests.values()
    if not manifests:
        return "Nothing has finished yet."
    total = duration(sum(m.elapsed_s for m in manifests))
    last = time.strftime("%Y-%m-%d %H:%M", time.gmtime(max(m.started_at + m.elapsed_s for m in manifests)))
    return f"{len(manifests)} stages in {total} of work, the last finished {last} UTC."


def _missing(data: ReportData) -> str:
    if not data.missing:
        return ""
    verb = "is" if len(data.missing) == 1 else "are"
    sentence = f"This run is unfinished: {listed(data.missing)} {verb} missing, and so is what they would show."
    return f'<section class="missing"><p>{plain(sentence)}</p></section>'


# Pipeline


def pipeline_edges(manifests: Mapping[str, Manifest]) -> set[svg.Edge]:
    """(a, b) wherever the fingerprint of artifact a is among the inputs of b."""
    name_of = {manifest.fingerprint: name for name, manifest in manifests.items()}
    return {
        (name_of[source], name)
        for name, manifest in manifests.items()
        for source in manifest.inputs.values()
        if source in name_of
    }


def _pipeline(data: ReportData) -> str:
    if not data.manifests:
        return ""
    total_s = sum(m.elapsed_s for m in data.manifests.values())
    nodes = [
        svg.Node(name, duration(m.elapsed_s), share=m.elapsed_s / total_s if total_s else 0.0)
        for name, m in data.manifests.items()
    ]
    graph = svg.layered_graph(nodes, pipeline_edges(data.manifests))
    figure = svg.embed(graph, "Graph of the artifacts and the time each took", "figure graph")
    return section(
        "Pipeline",
        f'<div class="scroll">{figure}</div>',
        note(
            "Each box is a committed artifact, with the time its stage took and, as a bar, its share of the whole. "
            "An arrow leads to what was made from it; the faint ones skip a step."
        ),
    )


# Provenance


def _provenance(data: ReportData) -> str:
    if not data.manifests:
        return ""
    environments = [m.environment for m in data.manifests.values()]
    alike = all(environment == environments[0] for environment in environments)
    head: list[Cell] = ["Artifact", "Stage", "Fingerprint", Number("Code version"), "Started (UTC)"]
    head += [Number("Elapsed"), Number("Size"), *([] if alike else ["Packages"])]
    rows: list[list[Cell]] = []
    for name, m in data.manifests.items():
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(m.started_at))
        size = scaled(sum(record.size_bytes for record in m.files), "B")
        fingerprint = Html(f'<code title="{plain(m.fingerprint)}">{plain(m.fingerprint[:12])}</code>')
        row: list[Cell] = [name, m.stage, fingerprint, Number(str(m.code_version)), started]
        row += [Number(duration(m.elapsed_s)), Number(size), *([] if alike else [_packages(m.environment)])]
        rows.append(row)
    parts = [table(head, rows)]
    if alike:
        parts.append(note(f"All of them ran with {_packages(environments[0])}."))
    if data.lineage:
        parts += ["<h3>Where the weights come from</h3>", _lineage(data.lineage)]
    configs = {name: m.config for name, m in data.manifests.items()}
    parts.append(
        "<details><summary>Configuration of every stage</summary>"
        f"<pre>{plain(json.dumps(configs, indent=2, ensure_ascii=False))}</pre></details>"
    )
    return section("Provenance", *parts)


def _lineage(lineage: Sequence[Origin]) -> str:
    rows: list[list[Cell]] = [
        [
            f"{number}. {origin.kind}",
            Html("<br>".join(plain(f"{name}: {words}") for name, words in told(origin, hash_chars=12))),
        ]
        for number, origin in enumerate(lineage, 1)
    ]
    return table(["What happened", "What is known of it"], rows)


def _packages(environment: Mapping[str, str]) -> str:
    versions = [f"{name} {v}" for name, v in environment.items() if name != "machine" and v != "absent"]
    return ", ".join(versions) + (f" on {environment['machine']}" if "machine" in environment else "")
