"""The command line of lm-evaluation-harness, with the model and the tasks of this project."""

from argparse import Namespace
from pathlib import Path

from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging

import pipeline.harness
from pipeline.errors import UserError

TASKS = Path(pipeline.harness.__file__).parent / "tasks"
_NO_TASK = "Tasks not found: "
"""How the harness begins what it says of names that it does not know."""


def run_harness() -> None:
    """Do what the words of this process say, as the harness's own command does; UserError for a task it lacks."""
    setup_logging()
    parser = HarnessCLI()
    try:
        parser.execute(with_ours(parser.parse_args()))
    except ValueError as error:
        if not str(error).startswith(_NO_TASK):
            raise
        ours = ", ".join(sorted(path.stem for path in TASKS.glob("*.yaml")))
        raise UserError(
            f"there is no task {str(error).removeprefix(_NO_TASK)}; this project's are {ours}, and all are listed by: "
            "python -m pipeline.harness ls tasks"
        ) from None


def with_ours(args: Namespace) -> Namespace:
    """Arguments of a command, where nothing was said of them, as this project means them.

    The harness would say the device "cuda:0" and the batch size 1 to a model, which could not tell them from a wish.
    """
    file = getattr(args, "config", None)
    said = {**(EvaluatorConfig.load_yaml_config(file) if file else {}), **{k: v for k, v in vars(args).items() if v}}
    ours = {"include_path": str(TASKS)}
    if args.command == "run" and said.get("model") == pipeline.harness.NAME:
        ours |= {"device": "auto", "batch_size": "auto"}
    return Namespace(**vars(args) | {name: value for name, value in ours.items() if said.get(name) is None})
