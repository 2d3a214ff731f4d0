"""One self-contained HTML page about a run, finished or not."""

from collections.abc import Collection, Mapping
from pathlib import Path

from pipeline.stage import StageContext, Stats
from workflows.report.config import ReportConfig
from workflows.report.data import INPUTS, collect
from workflows.report.page import render_page

REPORT_FILE = "report.html"


def run(config: ReportConfig, inputs: Mapping[str, Path], context: StageContext) -> Stats:
    """Write report.html from the artifacts of a finished run."""
    context.progress(0, 1)
    out = context.out / REPORT_FILE
    render_partial(config.title, inputs, out, wanted=inputs, run_id=context.labels.get("run_id", ""))
    context.progress(1, 1)
    return {"size_bytes": out.stat().st_size}


def render_partial(
    title: str, artifacts: Mapping[str, Path], out: Path, wanted: Collection[str] = INPUTS, run_id: str = ""
) -> None:
    """Write the page from whichever artifacts there are; it says which are missing.

    Args:
        title: heading of the page.
        artifacts: directory of each committed artifact, by the names of the stage's inputs.
        out: the file to write.
        wanted: names of the inputs that the run makes.
        run_id: the run that makes the page.
    """
    page = render_page(collect(title, artifacts, wanted), run_id)
    out.write_text(page, encoding="utf-8", errors="backslashreplace")
