"""What the report shows."""

from dataclasses import dataclass

from pipeline.stage import Stage


@dataclass(frozen=True)
class ReportConfig:
    """A page about one run."""

    title: str = "Masked diffusion language model"


STAGE = Stage(
    name="report",
    kind="task",
    config=ReportConfig,
    module="workflows.report.run",
    inputs=("corpus", "tokenizer", "tokens", "pretrain", "weights", "evaluation", "samples"),
)
