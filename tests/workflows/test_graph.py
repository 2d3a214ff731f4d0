import importlib.util
from dataclasses import replace

import pytest

from pipeline.errors import UserError
from pipeline.evaluate.config import EvaluateConfig
from pipeline.export.config import ExportConfig
from pipeline.import_checkpoint.config import ImportConfig
from pipeline.tokenizer.config import TokenizerConfig
from tests.support.toy_workflow import toy_workflow
from workflows.graph import ordered_steps, wanted_steps
from workflows.recipes import RECIPES
from workflows.step import Step, Workflow, load_stage

TOY = toy_workflow()
SOURCE, DOUBLE, ASIDE, TOTAL = TOY.steps


def order(*steps):
    return [step.name for step in ordered_steps(Workflow("toy", "", steps))]


def test_order_inputs_come_before_their_users():
    assert order(TOTAL, DOUBLE, SOURCE, ASIDE) == ["source", "double", "aside", "total"]


def test_order_otherwise_as_written():
    assert order(ASIDE, SOURCE) == ["aside", "source"]
    assert order(SOURCE, ASIDE) == ["source", "aside"]


def test_order_of_an_empty_workflow_is_empty():
    assert order() == []


@pytest.mark.parametrize("name", RECIPES)
def test_order_of_every_recipe_is_topological(name):
    seen: set[str] = set()
    for step in ordered_steps(RECIPES[name]()):
        assert set(step.inputs.values()) <= seen
        seen.add(step.name)
    assert len(seen) == len(RECIPES[name]().steps)


def wanted(*steps):
    return {step.name: dict(step.inputs) for step in wanted_steps(Workflow("toy", "", steps))}


def test_an_optional_step_that_lacks_what_its_user_gives_is_left_out_with_all_that_would_come_of_it():
    given = Step("given", "pipeline.import_checkpoint", ImportConfig(), optional=True)
    words = Step("words", "pipeline.tokenizer", TokenizerConfig(), {"checkpoint": "given"}, optional=True)
    last = replace(words, name="last", inputs={"checkpoint": "given"}, optional=False)
    assert wanted(words, given, last) == {"last": {}}
    ready = replace(given, config=ImportConfig("x"))
    everything = {"words": {"checkpoint": "given"}, "given": {}, "last": {"checkpoint": "given"}}
    assert wanted(words, ready, last) == everything
    assert wanted(words, replace(given, optional=False), last) == everything  # to be refused when it is run


def test_an_optional_step_that_cannot_run_here_is_refused_when_it_is_run_and_not_left_out(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    given = Step("given", "pipeline.import_checkpoint", ImportConfig("x"))
    last = Step("last", "pipeline.export", ExportConfig(proof="logits"), {"weights": "given"}, optional=True)
    ready = load_stage(last.stage).ready
    assert ready is not None
    with pytest.raises(UserError):
        ready(last.config, last.name)
    assert wanted(given, last) == {"given": {}, "last": {"weights": "given"}}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((replace(DOUBLE, inputs={"value": "double"}),), ["cycle", "double"]),
        (
            (replace(DOUBLE, inputs={"value": "again"}), replace(DOUBLE, name="again", inputs={"value": "double"})),
            ["cycle", "again", "double"],
        ),
        ((SOURCE, replace(DOUBLE, inputs={"value": "sauce"})), ["double", "sauce", "source"]),
        ((SOURCE, replace(DOUBLE, inputs={"number": "source"})), ["double", "value", "number"]),
        ((SOURCE, replace(DOUBLE, inputs={})), ["double", "value"]),
        ((replace(SOURCE, inputs={"value": "source"}),), ["source", "value"]),
        ((SOURCE, replace(SOURCE)), ["source", "same name"]),
        ((replace(SOURCE, config=EvaluateConfig()),), ["source", "EvaluateConfig", "ToyConfig"]),
        ((replace(SOURCE, config={"number": 1}),), ["source", "dict", "ToyConfig"]),
    ],
    ids=[
        "self-cycle", "cycle", "unknown-step", "unknown-input", "missing-input", "input-of-a-source", "duplicate",
        "config-of-another-stage", "config-as-dict",
    ],
)  # fmt: skip
def test_order_of_a_wrong_graph_is_refused_naming_the_culprits(steps, words):
    with pytest.raises(UserError) as error:
        order(*steps)
    for word in words:
        assert word in str(error.value)
