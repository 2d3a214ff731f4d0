"""Recipes that are wrong, each in its own way."""

from tests.support.toy_stages.trouble import ToyConfig
from tests.support.toy_workflow import STAGES
from workflows.step import Step, Workflow


def _workflow(*steps: Step) -> Workflow:
    return Workflow("bad", "wrong", steps)


def circle() -> Workflow:
    """Two maps that wait for each other."""
    config = ToyConfig()
    return _workflow(
        Step("source", f"{STAGES}.double", config, {"value": "double"}),
        Step("double", f"{STAGES}.double", config, {"value": "source"}),
    )


def stageless() -> Workflow:
    """A stage that is no package."""
    return _workflow(Step("source", f"{STAGES}.nothing", ToyConfig()))


def sourceless() -> Workflow:
    """An input that no step makes."""
    return _workflow(Step("double", f"{STAGES}.double", ToyConfig(), {"value": "somewhere"}))


def short_of_inputs() -> Workflow:
    """A stage without the input that it takes."""
    return _workflow(Step("double", f"{STAGES}.double", ToyConfig()))
