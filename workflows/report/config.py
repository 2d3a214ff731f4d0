"""What the report is called and what it is made from."""

from dataclasses import dataclass

from pipeline.stage import Stage


@dataclass(frozen=True)
class ReportConfig:
    """One page about one run."""

    title: str = "Masked diffusion language model"

    def __post_init__(self) -> None:
        if not self.title.strip():
            raise ValueError(f"title is {self.title!r}; give the page a name")


STAGE = Stage(
    name="report",
    kind="task",
    config=ReportConfig,
    module="workflows.report.run",
    inputs=("corpus", "tokenizer", "tokens", "rows", "pretrain", "weights", "evaluation"),
    optional_inputs=("samples", "tasks"),
)
