"""The command line of lm-evaluation-harness, with the model and the tasks of this project."""

from argparse import Namespace
from pathlib import Path

from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging

import pipeline.harness

TASKS = Path(pipeline.harness.__file__).parent / "tasks"


def run_harness() -> None:
    """Do what the words of this process say, as the harness's own command does."""
    setup_logging()
    parser = HarnessCLI()
    parser.execute(with_ours(parser.parse_args()))


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
