"""The report as one HTML page that needs nothing else: no scripts, no fonts, no network."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pipeline.artifact import Manifest
from workflows.report import svg
from workflows.report.data import ReportData, likelihood_figures
from workflows.report.film import sample_strips
from workflows.report.loss import loss_chart
from workflows.report.panels import panels
from workflows.report.style import page_style
from workflows.report.text import (
    ABSENT,
    Cell,
    Html,
    Number,
    count,
    decimals,
    duration,
    listed,
    note,
    plain,
    scaled,
    section,
    table,
)


def render_page(data: ReportData) -> str:
    """The whole page."""
    body = "".join(
        [
            _missing(data),
            _tiles(data),
            _evaluation(data),
            _training(data),
            _samples(data),
            _pipeline(data),
            _corpus(data),
            _rows(data),
            _provenance(data),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{plain(data.title)}</title><style>{page_style()}</style></head><body>"
        f'<header><h1>{plain(data.title)}</h1><p class="lead">{plain(_lead(data))}</p></header>'
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


# Headline figures


def _tiles(data: ReportData) -> str:
    tiles: list[str] = []
    if r := data.results:
        figures = likelihood_figures(r)
        nll, bpb = r[figures.nll], r[figures.bpb]
        if figures.is_exact:
            tiles += [
                _tile("Negative log-likelihood, held out", decimals(nll), "", "nats/token, exact for next tokens"),
                _tile("Bits per byte", decimals(bpb), "", "bits/byte, held out; exact"),
            ]
        else:
            noise, bits_noise = (f"± {decimals(r[f'{name}_mc_se'])}" for name in (figures.nll, figures.bpb))
            tiles += [
                _tile(
                    "NELBO, held out (upper bound)",
                    decimals(nll),
                    noise,
                    "nats/token; ± is mc_se, the noise of the drawn masks",
                ),
                _tile("Bits per byte (upper bound)", decimals(bpb), bits_noise, "bits/byte, held out; ± is mc_se"),
            ]
        tiles += [
            _tile("xz -9, same text", decimals(r["xz_bpb"]), "", "bits/byte"),
            _tile("Unigram entropy", decimals(r["unigram_entropy"]), "", "nats/token of the same text"),
        ]
    if stats := data.stats("pretrain"):
        tiles += [
            _tile("Parameters", scaled(stats["num_params"]), "", count(stats["num_params"])),
            _tile("Tokens trained on", scaled(stats["tokens"]), "", count(stats["tokens"])),
        ]
        if (speed := stats["tokens_per_s"]) is not None:
            tiles.append(_tile("Training speed", scaled(speed), "tokens/s", "at the median step"))
    if stats := data.stats("tokenizer"):
        tiles.append(
            _tile("Vocabulary", count(stats["vocab_size"]), "tokens", "masks and other special tokens included")
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(name: str, value: str, error: str, detail: str) -> str:
    small = f" <small>{plain(error)}</small>" if error else ""
    return (
        f'<dl class="tile"><dt>{plain(name)}</dt><dd><div class="value">{plain(value)}{small}</div>'
        f'<div class="detail">{plain(detail)}</div></dd></dl>'
    )


# Evaluation


def unigram_verdict(results: Mapping[str, Any]) -> str:
    """Whether the model has learnt more than how frequent each token is."""
    figures = likelihood_figures(results)
    name, gap = "loss" if figures.is_exact else "bound", results["unigram_entropy"] - results[figures.nll]
    if gap <= 0:
        return f"The {name} is {-gap:.4f} nats/token above the unigram entropy: nothing is shown to be learnt yet."
    return f"The {name} is {gap:.4f} nats/token below the unigram entropy."


def xz_verdict(results: Mapping[str, Any]) -> str:
    """Whether the model is ahead of xz -9 or behind it, by how much, and whether the noise could turn it."""
    named = likelihood_figures(results)
    bound, xz = results[named.bpb], results["xz_bpb"]
    gap = abs(bound - xz)
    figures = f"{'' if named.is_exact else 'at most '}{bound:.4f} bits/byte against {xz:.4f}"
    noise = ", within twice the mc_se" if gap < 2 * results[f"{named.bpb}_mc_se"] else ""
    if bound < xz:
        return (
            f"The model is ahead of xz -9 by {gap:.4f} bits/byte on the held-out text ({figures}{noise}); "
            "the size of the model itself is not counted."
        )
    return (
        f"The model is behind xz -9 by {gap:.4f} bits/byte on the held-out text ({figures}{noise}): "
        "xz -9 is the yardstick that it has yet to beat."
    )


def _evaluation(data: ReportData) -> str:
    r = data.results
    if not r:
        return ""
    figures = likelihood_figures(r)
    mc_se = {name: None if figures.is_exact else r[f"{name}_mc_se"] for name in (figures.nll, figures.bpb)}
    se = {
        figures.nll: (mc_se[figures.nll], r[f"{figures.nll}_doc_se"]),
        figures.bpb: (mc_se[figures.bpb], None),
    }
    of_model = (
        [
            ("nll", "nats/token", "Negative log-likelihood, each token given those before it"),
            ("ppl", "per token", "exp(nll), the perplexity"),
            ("bpb", "bits/byte", "The same per byte of text, comparable between tokenizers"),
        ]
        if figures.is_exact
        else [
            ("nelbo", "nats/token", "Negative evidence lower bound: an upper bound of the negative log-likelihood"),
            ("ppl_bound", "per token", "exp(nelbo), an upper bound of the perplexity"),
            ("bpb_bound", "bits/byte", "The same bound per byte of text, comparable between tokenizers"),
        ]
    )
    quantities = [
        *of_model,
        (
            "unigram_entropy",
            "nats/token",
            "Entropy of the token frequencies of this text: the loss without any context",
        ),
        ("unigram_bpb", "bits/byte", "The same entropy per byte"),
        ("xz_bpb", "bits/byte", "This text compressed by xz -9 as one stream"),
    ]
    rows: list[list[Cell]] = [
        [
            Html(f"<code>{name}</code>"),
            Number(decimals(r[name])),
            *(Number(decimals(error)) for error in se.get(name, (None, None))),
            unit,
            meaning,
        ]
        for name, unit, meaning in quantities
    ]
    head: list[Cell] = ["Quantity", Number("Value"), Number("mc_se"), Number("doc_se"), "Unit", "What it is"]
    return section(
        "Evaluation on held-out text",
        f'<p class="verdict">{plain(unigram_verdict(r))} {plain(xz_verdict(r))}</p>',
        table(head, rows),
        note(
            f"{count(r['num_docs'])} documents, {count(r['num_tokens'])} tokens, {count(r['num_bytes'])} bytes "
            f"({count(r['xz_bytes'])} after xz -9). The two standard errors answer different questions: mc_se is "
            f"the noise of the masks for this text, from {r['num_replicates']} independent draws; doc_se is the "
            f"spread over documents, as if others had been held out. {ABSENT}: exact for this text, or not estimated."
        ),
    )


# Training


def _training(data: ReportData) -> str:
    if not data.metrics:
        return ""
    losses = [line["loss"] for line in data.metrics]
    num_finite = sum(loss is not None for loss in losses)
    unigram: float | None = data.results.get("unigram_entropy")
    chart = loss_chart(data.metrics, unigram)
    if chart is None:
        return section("Training", note("No step had a finite loss."))
    stats = data.stats("pretrain")
    num_missing: int = stats.get("missing_metrics", 0)  # absent from artifacts of earlier versions
    num_steps = len(losses) + num_missing
    remarks = [
        f"{count(num_steps)} steps of {count(stats['tokens'] // num_steps)} tokens; "
        f"the mean of the last {min(50, num_finite)} is "
        f"{stats['final_loss']:.4f} nats/token."
    ]
    if stats.get("objective") != "autoregressive_nll":
        remarks.append("Each step draws its masks anew, hence the scatter.")
    if chart.num_outside:
        remarks.append(f"Steps outside the frame: {count(chart.num_outside)}.")
    if num_finite < len(losses):
        remarks.append(f"Steps without a finite loss: {count(len(losses) - num_finite)}.")
    if num_missing:
        remarks.append(f"Steps whose metrics were lost: {count(num_missing)}.")
    if unigram is None:
        remarks.append("The level of the unigram entropy comes with the evaluation.")
    figure = svg.embed(chart.drawing, "Training loss by step", "figure chart")
    return section("Training", f'<div class="scroll">{figure}</div>', note(" ".join(remarks)), _panels(data))


def _panels(data: ReportData) -> str:
    """What else was measured, by step."""
    drawn = [
        f"<figure><figcaption>{plain(panel.title)}</figcaption>"
        f"{svg.embed(panel.drawing, panel.title + ' by step', 'figure')}</figure>"
        for panel in panels(data.metrics)
    ]
    explanation = (
        "Pale lines are single steps, of which up to a hundredth lie outside a frame; an error bar is one standard "
        "error; phases are shaded in turn."
    )
    return f'<div class="panels">{"".join(drawn)}</div>{note(explanation)}' if drawn else ""


# Samples


def _samples(data: ReportData) -> str:
    if not data.samples:
        return ""
    legend = (
        '<p class="note">Every sample starts as nothing but masks <i class="key"></i>; each row is one moment, '
        "labelled with the steps done, and <mark>marked</mark> is what was revealed since the row above. "
        "Line ends are shown as ⏎. Nothing was selected: these are all the samples that were drawn.</p>"
    )
    return section("Samples emerging from masks", legend, *sample_strips(data.samples))


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


# Corpus and tokenizer


def _corpus(data: ReportData) -> str:
    parts: list[str] = []
    corpus, tokens, tokenizer = data.stats("corpus"), data.stats("tokens"), data.stats("tokenizer")
    head: list[Cell] = ["Split"]
    rows: list[list[Cell]] = [["training"], ["held out"]]
    columns = [("docs", "Documents", corpus), ("bytes", "Bytes", corpus), ("tokens", "Tokens", tokens)]
    for key, heading, stats in columns:
        if stats:
            head.append(Number(heading))
            for row, split in zip(rows, ("train", "held_out"), strict=True):
                row.append(Number(count(stats[f"{split}_{key}"])))
    if corpus and tokens:
        head.append(Number("Bytes per token"))
        for row, split in zip(rows, ("train", "held_out"), strict=True):
            row.append(Number(f"{corpus[f'{split}_bytes'] / max(1, tokens[f'{split}_tokens']):.2f}"))
    if corpus or tokens:
        parts.append(table(head, rows))
    if tokenizer:
        parts.append(note(f"The vocabulary has {count(tokenizer['vocab_size'])} tokens."))
    if corpus:
        parts += ["<h3>Sources and what was left out</h3>", _sources(corpus["sources"])]
    return section("Corpus and tokenizer", *parts) if parts else ""


def _sources(sources: Mapping[str, Mapping[str, Any]]) -> str:
    numbers = ("Files", "Records", "Broken", "Documents", "Bytes")
    head: list[Cell] = ["Source", *map(Number, numbers), "Dropped", Number("Repaired"), Number("Skipped")]
    rows: list[list[Cell]] = [
        [
            name,
            *(Number(count(found[key])) for key in ("files", "records", "broken", "docs", "bytes")),
            ", ".join(f"{count(number)} {reason}" for reason, number in found["dropped"].items()) or "0",
            Number(count(sum(found["replaced_by_file"].values()))),
            Number(count(sum(found["skipped_by_file"].values()))),
        ]
        for name, found in sources.items()
    ]
    explanation = (
        "Broken records could not be read; they and the skipped documents, left out for bytes that are not UTF-8, "
        "are listed in rejects.jsonl. Repaired documents had such bytes replaced. A duplicate is a text that stands "
        "earlier in the corpus, in any source."
    )
    return table(head, rows) + note(explanation)


# Rows of training


def _rows(data: ReportData) -> str:
    packed = data.stats("rows")
    if not packed:
        return ""
    by_source: dict[str, Counter[str]] = {}
    for shard in packed["shards"]:
        by_source.setdefault(shard["source"], Counter()).update({key: shard[key] for key in ("docs", "tokens", "rows")})
    trained = data.manifests.get("pretrain")
    mixture: Mapping[str, float] = trained.config.get("mixture", {}) if trained else {}
    head: list[Cell] = ["Source", *map(Number, ("Documents", "Tokens", "Rows", "Share of training", "Epochs"))]
    rows: list[list[Cell]] = []
    for source, counts in sorted(by_source.items()):
        share = mixture.get(source, 0) / sum(mixture.values()) if mixture else counts["rows"] / packed["rows"]
        epochs = data.stats("pretrain").get(f"epochs_{source}" if mixture else "epochs", 0.0) if trained else None
        numbers = [count(counts[key]) for key in ("docs", "tokens", "rows")]
        shown = [*numbers, f"{100 * share:.2f} %", "" if epochs is None else f"{epochs:.3f}"]
        rows.append([source, *map(Number, shown)])
    config = data.manifests["rows"].config
    remark = (
        f"Rows of {count(packed['seq_len'])} tokens, packed by the policy {config['policy']} with blocks of "
        f"{config['block_size']}; {100 * packed['padding_share']:.2f} % of them is padding."
    )
    return section("Rows of training", table(head, rows), note(remark))


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
    configs = {name: m.config for name, m in data.manifests.items()}
    parts.append(
        "<details><summary>Configuration of every stage</summary>"
        f"<pre>{plain(json.dumps(configs, indent=2, ensure_ascii=False))}</pre></details>"
    )
    return section("Provenance", *parts)


def _packages(environment: Mapping[str, str]) -> str:
    versions = [f"{name} {v}" for name, v in environment.items() if name != "machine" and v != "absent"]
    return ", ".join(versions) + (f" on {environment['machine']}" if "machine" in environment else "")
