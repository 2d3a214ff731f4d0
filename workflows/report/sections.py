"""The sections of a report that show results, one function each; a section about what is not there is empty."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from workflows.report import svg
from workflows.report.chart import Size
from workflows.report.data import Metrics, ReportData, likelihood_figures, tokens_before, weights_evaluated
from workflows.report.film import sample_strips
from workflows.report.loss import WIDE, drawn_loss, loss_chart
from workflows.report.panels import panels
from workflows.report.text import ABSENT, Cell, Html, Number, count, decimals, note, plain, scaled, section, table

# Headline figures


def tiles(data: ReportData) -> str:
    """The headline figures."""
    tiles: list[str] = []
    if r := data.results:
        of_which = f", of {words}" if (words := weights_evaluated(data)) else ""
        figures = likelihood_figures(r)
        nll, bpb = r[figures.nll], r[figures.bpb]
        if figures.is_exact:
            tiles += [
                _tile(
                    "Negative log-likelihood, held out",
                    decimals(nll),
                    "",
                    f"nats/token, exact for next tokens{of_which}",
                ),
                _tile("Bits per byte", decimals(bpb), "", f"bits/byte, held out; exact{of_which}"),
            ]
        else:
            noise, bits_noise = (f"± {decimals(r[f'{name}_mc_se'])}" for name in (figures.nll, figures.bpb))
            tiles += [
                _tile(
                    "NELBO, held out (upper bound)",
                    decimals(nll),
                    noise,
                    f"nats/token{of_which}; ± is mc_se, the noise of the drawn masks",
                ),
                _tile(
                    "Bits per byte (upper bound)",
                    decimals(bpb),
                    bits_noise,
                    f"bits/byte, held out{of_which}; ± is mc_se",
                ),
            ]
        tiles += [
            _tile("xz -9, same text", decimals(r["xz_bpb"]), "", "bits/byte"),
            _tile("Unigram entropy", decimals(r["unigram_entropy"]), "", "nats/token of the same text"),
        ]
    if stats := data.stats("pretrain"):
        tiles += [
            _tile("Parameters", scaled(stats["num_params"]), "", count(stats["num_params"])),
            _tile("Tokens trained on", scaled(stats["tokens"]), "", count(stats["tokens"]) + _besides(stats)),
        ]
        if (speed := stats["tokens_per_s"]) is not None:
            tiles.append(_tile("Training speed", scaled(speed), "tokens/s", "at the median step"))
    if stats := data.stats("tokenizer"):
        tiles.append(
            _tile("Vocabulary", count(stats["vocab_size"]), "tokens", "masks and other special tokens included")
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _besides(stats: Mapping[str, Any]) -> str:
    """What the tokens of a training come on top of."""
    before = tokens_before(stats)
    if before is None:
        return ""
    known = f" with {count(before)} more on record" if before else ""
    return f", beginning from given weights{known}; see Provenance"


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


def evaluation(data: ReportData) -> str:
    """The likelihood of held-out text."""
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
    lines: list[list[Cell]] = [
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
        table(head, lines),
        note(
            f"{f'Of {words}. ' if (words := weights_evaluated(data)) else ''}"
            f"{count(r['num_docs'])} documents, {count(r['num_tokens'])} tokens, {count(r['num_bytes'])} bytes "
            f"({count(r['xz_bytes'])} after xz -9). The two standard errors answer different questions: mc_se is "
            f"the noise of the masks for this text, from {r['num_replicates']} independent draws"
            f"{_whatever_is_drawn(r)}; doc_se is the spread over documents, as if others had been held out. {ABSENT}: "
            "exact for this text, or not estimated."
        ),
    )


def _whatever_is_drawn(results: Mapping[str, Any]) -> str:
    figures = likelihood_figures(results)
    ends = results.get(f"{figures.nll}_mc_interval")  # absent from earlier versions
    if figures.is_exact or ends is None:
        return ""
    return f" (95 %: {decimals(ends[0])} to {decimals(ends[1])} nats/token)"


# Training


_NARROW = Size(width=350, height=260, left=50, right=8, top=52, bottom=44)
"""Of a chart on a phone."""


def training(
    title: str, metrics: Metrics, stats: Mapping[str, Any], unigram: float | None, is_going_on: bool = False
) -> str:
    """Curves of a training; ``stats`` are those of its artifact, empty before it is committed."""
    if not metrics.lines:
        return ""
    drawn = [loss_chart(metrics.lines, unigram, size) for size in (WIDE, _NARROW)]
    charts = [chart for chart in drawn if chart is not None]
    if not charts:
        return section(title, note("No step had a finite loss."))
    num_missing: int = stats.get("missing_metrics", 0)  # absent from artifacts of earlier versions
    num_steps = metrics.num_steps + num_missing
    loss = drawn_loss(metrics.lines)
    unit = "nats/token" if loss.key == "loss" and loss.is_in_nats else "as it is weighted, which is no bound"
    remarks = [_progress_remark(metrics, unit, is_going_on)]
    if stats:
        num_averaged = min(50, metrics.num_steps - metrics.num_not_finite)
        remarks = [
            f"{count(num_steps)} steps of {count(stats['tokens'] // num_steps)} tokens; "
            f"the mean loss of the last {num_averaged} is {stats['final_loss']:.4f} {unit}."
        ]
    if stats.get("objective") != "autoregressive_nll":
        remarks.append("Each step draws its masks anew, hence the scatter.")
    if charts[0].num_outside:
        remarks.append(f"Steps outside the frame: {count(charts[0].num_outside)}.")
    if metrics.num_not_finite:
        remarks.append(f"Steps without a finite loss: {count(metrics.num_not_finite)}.")
    if metrics.every > 1:
        remarks.append(f"Of {metrics.every} steps one is shown.")
    if num_missing:
        remarks.append(f"Steps whose metrics were lost: {count(num_missing)}.")
    if unigram is None and loss.is_in_nats:
        remarks.append("The level of the unigram entropy comes with the evaluation.")
    figures = [svg.embed(chart.drawing, "Training loss by step", "figure chart") for chart in charts]
    return section(title, svg.for_both_widths(*figures), note(" ".join(remarks)), _panels(metrics))


def _progress_remark(metrics: Metrics, unit: str, is_going_on: bool) -> str:
    last = metrics.lines[-1]
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f} {unit}"
    step = count(last["step"] + 1)
    return f"{'So far' if is_going_on else 'It stopped after'} {step} steps; the loss of the last is {loss}."


def _panels(metrics: Metrics) -> str:
    """What else was measured, by step."""
    drawn = [
        f"<figure><figcaption>{plain(panel.title)}</figcaption>"
        f"{svg.embed(panel.drawing, panel.title + ' by step', 'figure')}</figure>"
        for panel in panels(metrics.lines)
    ]
    explanation = (
        "Pale lines are single steps, of which up to a hundredth lie outside a frame; an error bar is one standard "
        "error; phases are shaded in turn."
    )
    return f'<div class="panels">{"".join(drawn)}</div>{note(explanation)}' if drawn else ""


# Samples


def samples(data: ReportData) -> str:
    """Texts, and how they emerged."""
    if not data.samples:
        return ""
    legend = (
        '<p class="note">Every sample starts as nothing but masks <i class="key"></i>; each row is one moment, '
        "labelled with the steps done, and <mark>marked</mark> is what was revealed since the row above. "
        "Line ends are shown as ⏎. Nothing was selected: these are all the samples that were drawn.</p>"
    )
    return section("Samples emerging from masks", legend, *sample_strips(data.samples))


# Corpus and tokenizer


def corpus(data: ReportData) -> str:
    """What was read, and what was left out."""
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


def rows(data: ReportData) -> str:
    """What training saw of each source."""
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
