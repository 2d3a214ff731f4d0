"""The command line of lm-evaluation-harness, with the model and the tasks of this project."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging, simple_parse_args_string

import pipeline.harness
from pipeline.errors import UserError
from pipeline.harness.model import DenoiserLM

TASKS = Path(pipeline.harness.__file__).parent / "tasks"
_NO_TASK = "Tasks not found: "
"""How the harness begins what it says of names that it does not know."""


def run_harness() -> None:
    """Do what the words of this process say, as the harness's own command does.

    Raises UserError for a task that it lacks, and, before it lists those that it has, for settings of the model.
    """
    setup_logging()
    parser = HarnessCLI()
    args = with_ours(parser.parse_args())
    check_model_args(args)
    try:
        parser.execute(args)
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
    said = _said(args)
    ours = {"include_path": str(TASKS)}
    if args.command == "run" and said.get("model") == pipeline.harness.NAME:
        ours |= {"device": "auto", "batch_size": "auto"}
    return Namespace(**vars(args) | {name: value for name, value in ours.items() if said.get(name) is None})


def check_model_args(args: Namespace) -> None:
    """UserError for arguments with which the model dlm could not be asked; its weights are not read."""
    said = _said(args)
    if args.command != "run" or said.get("model") != pipeline.harness.NAME:
        return
    given = said.get("model_args") or {}
    given = simple_parse_args_string(given) if isinstance(given, str) else given
    DenoiserLM.create_from_arg_obj(given, said)


def _said(args: Namespace) -> dict[str, Any]:
    """Arguments of a command, those of its file behind those of its words."""
    file = getattr(args, "config", None)
    return {**(EvaluatorConfig.load_yaml_config(file) if file else {}), **{k: v for k, v in vars(args).items() if v}}
