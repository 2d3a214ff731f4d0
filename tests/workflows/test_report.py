"""The report page, its drawings and the README picture, from small made-up artifacts."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dlm_core.models.config import Architecture, ModelConfig
from pipeline.artifact import MANIFEST, Manifest, record_files, write_json
from pipeline.config import to_json
from pipeline.errors import CorruptionError, UserError
from pipeline.stage import StageContext
from pipeline.weights import ModelRecord, Origin, save_record
from workflows.report import svg
from workflows.report.chart import Line, line_chart, nice_ticks, thin
from workflows.report.config import STAGE, ReportConfig
from workflows.report.film import film_strip
from workflows.report.loss import trailing_mean
from workflows.report.page import pipeline_edges
from workflows.report.run import render_partial, run
from workflows.report.text import plain, scaled

VOID = {"meta", "br", "link", "img", "hr", "input"}
INPUTS = {
    "corpus": ("corpus", []),
    "tokenizer": ("tokenizer", ["corpus"]),
    "tokens": ("tokenization", ["corpus", "tokenizer"]),
    "rows": ("packing", ["tokens", "tokenizer"]),
    "pretrain": ("pretrain", ["rows", "tokenizer"]),
    "weights": ("convert", ["pretrain"]),
    "evaluation": ("evaluate", ["weights", "tokens", "tokenizer", "corpus"]),
    "samples": ("generate", ["weights", "tokenizer"]),
    "tasks": ("tasks", ["weights", "tokenizer"]),
}
RESULTS = {
    "nelbo": 3.21474, "nelbo_mc_se": 0.01234, "nelbo_doc_se": 0.05678, "ppl_bound": 24.89667, "bpb_bound": 1.91283,
    "bpb_bound_mc_se": 0.00734, "unigram_entropy": 6.43219, "unigram_bpb": 3.82736, "xz_bytes": 21_037, "num_docs": 57,
    "xz_bpb": 1.68297, "num_bytes": 100_001, "num_tokens": 41_235, "num_replicates": 8, "nelbo_mc_interval": [3.1, 3.3],
}  # fmt: skip
TASK: dict[str, Any] = {
    "kind": "multiple_choice", "sha256": "ab", "n": 1234, "num_failed": 1, "num_cut": 3,
    "failed": [{"number": 7, "reason": "choice 1 has <99> tokens"}],
    "settings": {"estimator": "bound", "num_masks": 64},
    "metrics": {
        "acc": {"value": 0.4321, "unit": "share", "doc_se": 0.0512, "mc_se": 0.0034, "interval": [0.3333, 0.5432]},
        "margin": {"value": 1.25, "unit": "nats", "doc_se": None, "mc_se": None, "interval": None},
    },
}  # fmt: skip
STATS: dict[str, dict[str, Any]] = {
    "corpus": {
        "train_docs": 1234, "train_bytes": 5_000_000, "held_out_docs": 57, "held_out_bytes": 100_001,
        "sources": {
            "notes & <b>": {
                "files": 3, "records": 1300, "broken": 4, "docs": 1291, "bytes": 5_100_001,
                "dropped": {"empty": 5}, "replaced_by_file": {"a.txt": 2},
                "skipped_by_file": {},
            }
        },
    },
    "tokenizer": {"vocab_size": 4096},
    "tokens": {
        "vocab_size": 4096, "train_docs": 1234, "train_tokens": 2_000_000, "held_out_docs": 57,
        "held_out_tokens": 41_235,
    },
    "rows": {
        "seq_len": 512, "rows": 3_900, "tokens": 1_996_800 - 512, "padding_share": 512 / 1_996_800,
        "shards": [
            {"name": "train-web-00000", "source": "web", "docs": 700, "tokens": 999_000, "rows": 2_000},
            {"name": "train-books-00000", "source": "books", "docs": 500, "tokens": 900_000, "rows": 1_800},
            {"name": "train-web-00001", "source": "web", "docs": 34, "tokens": 97_288, "rows": 100},
        ],
    },
    "pretrain": {"num_params": 4_190_000, "tokens": 409_600, "final_loss": 3.3, "tokens_per_s": 12_345.6,
        "epochs_web": 0.125, "epochs_books": 1.5,
    },
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "rows": {"policy": "best_fit", "block_size": 16},
    "pretrain": {"mixture": {"web": 1.0, "books": 3.0}},
}
SAMPLE = {
    "text": "<script>alert(1)</script>\n & done",
    "ids": [1, 2, 3],
    "steps": [0, 1, 2],
    "frames": [
        [None, None, None],
        ["<script>alert(1)</script>", None, None],
        ["<script>alert(1)</script>", "\n", " & done"],
    ],
}


def _fingerprint(name: str) -> str:
    return f"{list(INPUTS).index(name):x}" * 64


def make_artifact(root: Path, name: str, **changes: Any) -> Path:
    stage, sources = INPUTS[name]
    out = root / name
    out.mkdir(parents=True)
    if name == "pretrain":
        losses = [None if i == 7 else 8.0 - i / 25 for i in range(100)]
        records = [
            {"step": i, "loss": loss, "tokens": 4096 * i, **changes.get("logged", {"nelbo": loss})}
            for i, loss in enumerate(losses)
        ]
        (out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    elif name == "evaluation":
        write_json(out / "results.json", changes.get("results", RESULTS))
    elif name == "weights":
        model = ModelConfig(Architecture(), 4096, 0)
        save_record(out, ModelRecord(model, 512, "masked_nelbo", lineage=changes.get("lineage", [])))
    elif name == "tasks":
        write_json(out / "results.json", {"tasks": changes.get("tasks", {"which": TASK})})
    elif name == "samples":
        (out / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    manifest = Manifest(
        stage=stage,
        fingerprint=_fingerprint(name),
        code_version=3,
        config={"note": "</pre><script>", **changes.get("config", CONFIGS.get(name, {}))},
        inputs={source: _fingerprint(source) for source in sources},
        files=record_files(out),
        stats={**STATS.get(name, {}), **changes.get("stats", {})},
        started_at=1.7e9,
        elapsed_s=10.0 + len(name),
        environment=changes.get("environment", {"python": "3.11.9", "torch": "2.10.0", "deepspeed": "absent"}),
    )
    write_json(out / MANIFEST, manifest)
    return out


def make_artifacts(root: Path, *names: str) -> dict[str, Path]:
    return {name: make_artifact(root, name) for name in names or INPUTS}


class Page(HTMLParser):
    """Fails on a tag that is not closed in order; collects tags, texts and the attributes with addresses."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.headings = re.findall(r"<h2>(.*?)</h2>", source)
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def render(artifacts: dict[str, Path], out: Path, title: str = "A run") -> tuple[str, Page]:
    render_partial(title, artifacts, out)
    source = out.read_text(encoding="utf-8")
    return source, Page(source)


def test_report_of_a_whole_run_is_well_formed_and_self_contained(tmp_path: Path):
    source, page = render(make_artifacts(tmp_path), tmp_path / "report.html", title="Run <1>")
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert page.addresses == []
    assert "url(" not in source
    assert "@import" not in source
    assert "Run <1>" in page.text
    for drawing in re.findall(r'<svg class="figure.*?</svg>(?=</div>)', source):
        ElementTree.fromstring(drawing)
    assert len(re.findall(r'<svg class="figure', source)) == 3  # the curve also as a phone shows it, and the graph
    assert "unfinished" not in page.text


def test_report_shows_the_figures_of_results_json(tmp_path: Path):
    _, page = render(make_artifacts(tmp_path), tmp_path / "report.html")
    for figure in ("3.2147", "0.0123", "0.0568", "24.8967", "1.9128", "0.0073", "6.4322", "3.8274", "1.6830"):
        assert figure in page.texts, figure
    assert "57 documents, 41,235 tokens, 100,001 bytes (21,037 after xz -9)" in page.text
    assert "from 8 independent draws (95 %: 3.1000 to 3.3000 nats/token); doc_se" in page.text
    assert {"nelbo", "ppl_bound", "bpb_bound", "mc_se", "doc_se"} <= set(page.texts)
    assert not {"ppl", "bpb", "nll"} & set(page.texts)


def test_report_of_a_training_that_lost_metrics_says_so_and_counts_its_steps(tmp_path: Path):
    artifacts = make_artifacts(tmp_path)
    shutil.rmtree(artifacts["pretrain"])
    lost = {"missing_metrics": 28, "tokens": 128 * 4096, "tokens_per_s": None}
    make_artifact(tmp_path, "pretrain", stats=lost)
    _, page = render(artifacts, tmp_path / "report.html")
    assert "128 steps of 4,096 tokens" in page.text
    assert "Steps whose metrics were lost: 28." in page.text
    assert "Training speed" not in page.texts


def test_report_of_an_adapted_model_says_where_it_came_from(tmp_path: Path):
    artifacts = make_artifacts(tmp_path, *(name for name in INPUTS if name not in ("pretrain", "weights")))
    imported = {"name": "<b>Smol</b>", "sha256": {"Smol.Q4_1.gguf": "ab12" * 16}, "dequantised_by": "transformers 5"}
    before = [
        Origin("imported", {**imported, "dtype": ["F32", "Q4_1"], "license": "apache-2.0"}),
        Origin("trained", {"objective": "autoregressive_nll", "tokens": 81_090, "average_steps": []}),
        Origin("initialised", {"made": {"embedding.weight": "the mean of 9 rows in row 9"}, "copied": 181}),
    ]
    stats = {"lineage": to_json(before)}
    artifacts["pretrain"] = make_artifact(tmp_path, "pretrain", stats=stats)
    lineage = [*before, Origin("trained", {"objective": "masked_nelbo", "tokens": 409_600})]
    artifacts["weights"] = make_artifact(tmp_path, "weights", lineage=lineage)
    _, page = render(artifacts, tmp_path / "report.html")
    for told in (
        "1. imported", "name: <b>Smol</b>", "sha256: Smol.Q4_1.gguf ab12ab12ab12", "dequantised by: transformers 5",
        "dtype: F32, Q4_1", "licence: apache-2.0", "2. trained", "tokens: 81,090", "3. initialised",
        "made anew: embedding.weight (the mean of 9 rows in row 9)", "tensors copied: 181", "4. trained",
        "409,600, beginning from given weights with 81,090 more on record; see Provenance",
    ):  # fmt: skip
        assert told in page.texts, told
    assert "average steps" not in page.text
    _, page = render(make_artifacts(tmp_path / "scratch"), tmp_path / "scratch.html")
    assert "409,600" in page.texts
    assert "Where the weights come from" not in page.texts


@pytest.mark.parametrize(("objective", "has_masks"), [("masked_nelbo", True), ("autoregressive_nll", False)])
def test_report_speaks_of_masks_where_there_are_some(objective: str, has_masks: bool, tmp_path: Path):
    artifacts = make_artifacts(tmp_path)
    shutil.rmtree(artifacts["pretrain"])
    make_artifact(tmp_path, "pretrain", stats={"objective": objective})
    _, page = render(artifacts, tmp_path / "report.html")
    assert ("Each step draws its masks anew, hence the scatter." in page.text) == has_masks


def test_report_shows_what_each_stage_counted(tmp_path: Path):
    _, page = render(make_artifacts(tmp_path), tmp_path / "report.html")
    for figure in ("1,234", "5,000,000", "2,000,000", "4,190,000", "409,600", "12.3 k", "5 empty", "2.50"):
        assert figure in page.texts, figure
    assert "Steps without a finite loss: 1." in page.text
    assert "100 steps of 4,096 tokens; the mean loss of the last 50 is 3.3000 nats/token." in page.text
    assert "metrics were lost" not in page.text
    assert "unigram entropy (held out), 6.43" in page.texts
    assert "5" * 12 in page.texts
    assert "All of them ran with python 3.11.9, torch 2.10.0." in page.text


def test_report_escapes_text_from_samples_sources_and_configurations(tmp_path: Path):
    source, page = render(make_artifacts(tmp_path), tmp_path / "report.html")
    assert "<script" not in source
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert "notes & <b>" in page.texts


@pytest.mark.parametrize("absent", list(INPUTS))
def test_report_with_one_artifact_missing_names_it(absent: str, tmp_path: Path):
    artifacts = make_artifacts(tmp_path, *(name for name in INPUTS if name != absent))
    _, page = render(artifacts, tmp_path / "report.html")
    assert f"This run is unfinished: {absent} is missing" in page.text


def test_report_of_a_run_without_evaluation_shows_the_rest(tmp_path: Path):
    _, page = render(make_artifacts(tmp_path, "corpus", "tokenizer", "tokens", "pretrain"), tmp_path / "report.html")
    assert "weights, evaluation, samples and tasks are missing" in page.text
    assert page.headings == ["Training", "Pipeline", "Corpus and tokenizer", "Provenance"]
    assert "xz" not in page.text


def test_report_of_nothing_is_a_page(tmp_path: Path):
    _, page = render({}, tmp_path / "report.html")
    assert page.headings == []
    assert "Nothing has finished yet" in page.text


def test_report_stage_writes_what_the_partial_report_writes(tmp_path: Path):
    artifacts = make_artifacts(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    stats = run(ReportConfig(title="A run"), artifacts, StageContext(out, tmp_path / "state", "f" * 64))
    source, _ = render(artifacts, tmp_path / "partial.html")
    assert (out / "report.html").read_text(encoding="utf-8") == source
    assert stats == {"size_bytes": len(source.encode())}


def test_report_of_damaged_results_is_refused(tmp_path: Path):
    artifacts = make_artifacts(tmp_path)
    file = artifacts["evaluation"] / "results.json"
    file.write_text(file.read_text().replace("3.21474", "2.21474"))
    with pytest.raises(CorruptionError, match=r"results\.json"):
        render(artifacts, tmp_path / "report.html")


def test_report_of_an_unfinished_artifact_is_refused(tmp_path: Path):
    artifacts = make_artifacts(tmp_path)
    (artifacts["samples"] / MANIFEST).unlink()
    with pytest.raises(UserError, match="not a finished artifact"):
        render(artifacts, tmp_path / "report.html")


def test_report_of_broken_json_lines_is_refused(tmp_path: Path):
    artifacts = make_artifacts(tmp_path, "corpus", "samples")
    (artifacts["samples"] / MANIFEST).unlink()
    (artifacts["samples"] / "samples.jsonl").write_text('{"text": \n')
    manifest = Manifest("generate", "9" * 64, 1, {}, {}, record_files(artifacts["samples"]))
    write_json(artifacts["samples"] / MANIFEST, manifest)
    with pytest.raises(CorruptionError, match="JSON Lines"):
        render(artifacts, tmp_path / "report.html")


def test_report_of_stages_run_with_different_packages_lists_them_by_stage(tmp_path: Path):
    artifacts = make_artifacts(tmp_path, "corpus")
    artifacts["tokenizer"] = make_artifact(
        tmp_path, "tokenizer", environment={"python": "3.12.0", "machine": "aarch64"}
    )
    _, page = render(artifacts, tmp_path / "report.html")
    assert {"python 3.11.9, torch 2.10.0", "python 3.12.0 on aarch64"} <= set(page.texts)


def test_report_of_a_single_held_out_document_has_no_doc_se(tmp_path: Path):
    artifacts = make_artifacts(tmp_path, "corpus")
    artifacts["evaluation"] = make_artifact(tmp_path, "evaluation", results={**RESULTS, "nelbo_doc_se": None})
    _, page = render(artifacts, tmp_path / "report.html")
    assert "0.0568" not in page.texts
    assert "None" not in page.text


def test_rows_are_shown_by_source_with_their_share_and_epochs(tmp_path: Path) -> None:
    _, page = render(make_artifacts(tmp_path, "rows", "pretrain"), tmp_path / "report.html")
    for words in (
        "books 500 900,000 1,800 75.00 % 1.500",
        "web 734 1,096,288 2,100 25.00 % 0.125",
        "Rows of 512 tokens, packed by the policy best_fit with blocks of 16; 0.03 % of them is padding.",
    ):
        assert words in page.text


def test_rows_without_a_mixture_have_the_shares_of_their_number(tmp_path: Path) -> None:
    artifacts = make_artifacts(tmp_path, "rows")
    _, page = render(artifacts, tmp_path / "report.html")
    assert f"books 500 900,000 1,800 {100 * 1800 / 3900:.2f} %" in page.text


def test_pipeline_edges_match_inputs_by_fingerprint():
    stages = {"words": ("a" * 64, {}), "model": ("b" * 64, {"tokens": "a" * 64, "elsewhere": "c" * 64})}
    manifests = {name: Manifest(name, own, 1, {}, inputs, []) for name, (own, inputs) in stages.items()}
    assert pipeline_edges(manifests) == {("words", "model")}


def test_film_strip_marks_what_a_frame_reveals():
    strip = film_strip([0, 4, 9], [[None, None, None], ["a", None, "<"], ["a", "b", "<"]])
    rows = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", strip)
    assert rows == [
        ("step 0", "<i></i><i></i><i></i>"),
        ("step 4", "<mark>a</mark><i></i><mark>&lt;</mark>"),
        ("step 9", "a<mark>b</mark>&lt;"),
    ]


def test_film_strip_with_a_frame_missing_is_refused():
    with pytest.raises(ValueError, match="zip"):
        film_strip([0, 1], [[None]])


def test_trailing_mean_skips_steps_without_a_number():
    assert trailing_mean([None, 2.0, 4.0, None, 6.0], 2) == [None, 2.0, 3.0, 4.0, 6.0]


def test_thin_keeps_the_extremes_and_stays_below_the_limit():
    points: list[tuple[float, float | None]] = [(float(i), 0.0) for i in range(10_000)]
    points[1234], points[7777], points[50] = (1234.0, 9.0), (7777.0, -9.0), (50.0, None)
    kept = thin(points, 200)
    assert len(kept) <= 200
    assert {(1234.0, 9.0), (7777.0, -9.0)} <= set(kept)
    assert kept == sorted(kept, key=lambda point: point[0])


@pytest.mark.parametrize(
    ("low", "high", "target", "expected"),
    [(0.0, 10.0, 5, [0, 2, 4, 6, 8, 10]), (2.9, 3.35, 5, [2.9, 3.0, 3.1, 3.2, 3.3]), (4.0, 4.0, 5, [4.0])],
)
def test_nice_ticks_are_round_and_inside_the_range(low: float, high: float, target: int, expected: list[float]):
    assert nice_ticks(low, high, target) == pytest.approx(expected)


def test_line_chart_interrupts_a_line_at_a_gap():
    line = Line([(0, 1.0), (1, None), (2, 2.0), (3, 3.0)], "loss", "raw")
    chart = line_chart([line], [], x_label="step", y_label="nats", y_range=(0, 4))
    root = ElementTree.fromstring(f"<svg>{chart.body}</svg>")
    drawn = [path.get("d", "") for path in root.iterfind("svg/path")]
    assert [re.sub(r"[-\d. ]", "", path) for path in drawn] == ["MhMhL"]


@pytest.mark.parametrize("points", [[], [(5.0, 1.0)], [(0.0, 2.0), (1.0, 2.0)]])
def test_line_chart_of_hardly_anything_is_well_formed(points: list[tuple[float, float | None]]):
    chart = line_chart([Line(points, "x", "raw")], [], x_label="a", y_label="b", y_range=(2, 2))
    assert len(ElementTree.fromstring(f"<svg>{chart.body}</svg>")) > 0
    assert "nan" not in chart.body


def test_layers_are_the_longest_path_and_a_cycle_is_refused():
    assert svg.layers("abcd", [("a", "b"), ("b", "c"), ("a", "c"), ("d", "c")]) == {"a": 0, "b": 1, "c": 2, "d": 1}
    with pytest.raises(AssertionError, match="cycle"):
        svg.layers("ab", [("a", "b"), ("b", "a")])


def test_implied_edges_are_those_with_a_longer_way_round():
    assert svg.implied_edges([("a", "b"), ("b", "c"), ("a", "c"), ("c", "d"), ("a", "d")]) == {("a", "c"), ("a", "d")}


def _boxes(drawing: svg.Drawing) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(f"<svg>{drawing.body}</svg>")
    rects = [r for r in root.iterfind("rect") if r.get("class") == "box"]
    return [(float(r.get("x", "")), float(r.get("y", ""))) for r in rects]


@pytest.mark.parametrize("layers_per_row", [0, 2, 3])
def test_layered_graph_overlaps_no_boxes_and_stays_inside_its_area(layers_per_row: int):
    nodes = [svg.Node(name, "x" * 80, "map", 0.5) for name in INPUTS]
    edges = [(source, name) for name, (_, sources) in INPUTS.items() for source in sources]
    layout = svg.Layout(layers_per_row=layers_per_row)
    drawing = svg.layered_graph(nodes, edges, layout)
    boxes = _boxes(drawing)
    assert len(set(boxes)) == len(INPUTS)
    for i, (x, y) in enumerate(boxes):
        assert 0 <= x <= drawing.width - layout.node_width
        assert 0 <= y <= drawing.height - layout.node_height
        assert all(abs(x - a) >= layout.node_width or abs(y - b) >= layout.node_height for a, b in boxes[:i])
    if not layers_per_row:
        assert drawing.body.count('class="edge"') + drawing.body.count('class="lane"') == len(edges)


def test_report_inputs_are_those_that_the_page_knows():
    assert (*STAGE.inputs, *STAGE.optional_inputs) == tuple(INPUTS)


def test_report_config_without_a_title_is_refused():
    with pytest.raises(ValueError, match="title is '  '"):
        ReportConfig(title="  ")


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [(4_190_000, "", "4.19 M"), (1.2e9, "", "1.2 B"), (1.2e9, "B", "1.2 GB"), (12, "B", "12 B"), (7, "", "7")],
)
def test_scaled_names_the_magnitude(value: float, unit: str, expected: str):
    assert scaled(value, unit) == expected


def test_plain_shows_control_characters_as_pictures():
    assert plain("a\x00\x1b\n\t<&") == "a␀␛\n\t&lt;&amp;"


def test_report_of_an_exact_likelihood_calls_nothing_a_bound(tmp_path: Path):
    exact = {"nelbo": "nll", "ppl_bound": "ppl", "bpb_bound": "bpb"}
    results: dict[str, Any] = {}
    for name, value in RESULTS.items():
        word = next((word for word in sorted(exact, key=len, reverse=True) if name.startswith(word)), "")
        results[exact.get(word, "") + name.removeprefix(word)] = value
    artifacts = {"evaluation": make_artifact(tmp_path, "evaluation", results=results)}
    _, page = render(artifacts, tmp_path / "report.html")
    assert {"nll", "ppl", "bpb"} <= set(page.texts)
    assert "Negative log-likelihood, held out" in page.texts
    assert not any("bound" in text.lower() for text in page.texts)
