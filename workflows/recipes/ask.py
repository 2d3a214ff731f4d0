"""Questions put to a checkpoint that is there, without a training."""

from pipeline.import_checkpoint.config import ImportConfig
from pipeline.tasks.config import TasksConfig
from pipeline.tokenizer.config import TokenizerConfig
from workflows.step import Step, Workflow


def ask() -> Workflow:
    """Tasks of a checkpoint of another project, or of an export of this one; a second checkpoint may score samples."""
    to_ask = {
        "weights": "import_checkpoint",
        "tokenizer": "tokenizer",
        "scorer": "import_scorer",
        "scorer_tokenizer": "scorer_tokenizer",
    }
    return Workflow(
        "ask",
        "a checkpoint -> the questions of your files: choices, texts, answers, gaps, programs, samples",
        (
            Step("import_checkpoint", "pipeline.import_checkpoint", ImportConfig()),
            Step("tokenizer", "pipeline.tokenizer", TokenizerConfig(), {"checkpoint": "import_checkpoint"}),
            Step("import_scorer", "pipeline.import_checkpoint", ImportConfig(), optional=True),
            Step(
                "scorer_tokenizer",
                "pipeline.tokenizer",
                TokenizerConfig(),
                {"checkpoint": "import_scorer"},
                optional=True,
            ),
            Step("tasks", "pipeline.tasks", TasksConfig(), to_ask),
        ),
        deviations=(
            "neither the checkpoint nor the questions come with the recipe; import_checkpoint.path and tasks.tasks are "
            "to be given",
        ),
    )
