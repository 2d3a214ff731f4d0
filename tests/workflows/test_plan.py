import dataclasses
import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from benchmarks.adaptation_checkpoint import make_checkpoint
from pipeline.artifact import read_json
from pipeline.config import apply_settings, to_json
from pipeline.errors import CorruptionError, UserError
from pipeline.stage import stage_fingerprint
from tests.support.toy_stages.source import config as source_config
from tests.support.toy_stages.total import config as total_config
from tests.support.toy_workflow import fabricate, toy_plan
from workflows import runs
from workflows.plan import Plan, check_drift, explain, make_plan, resolved, step_config
from workflows.recipes.quickstart import quickstart
from workflows.step import Step, Workflow, load_stage
from workflows.store import Store

TRAINED = ["pretrain", "convert", "evaluate", "generate", "report"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A corpus for recipes that are planned and not run."""
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be")
    return path


def fingerprints(plan: Plan) -> dict[str, str]:
    return {step.name: step.fingerprint for step in plan.steps}


def changed(a: Plan, b: Plan) -> set[str]:
    return {name for name, value in fingerprints(a).items() if fingerprints(b)[name] != value}


def downstream(workflow: Workflow, name: str) -> set[str]:
    found = {name}
    for _ in workflow.steps:
        found |= {step.name for step in workflow.steps if found & set(step.inputs.values())}
    return found


def reasons(plan: Plan, store: Store) -> dict[str, str]:
    return {action.step: f"{action.action}: {action.reason}" for action in explain(plan, store)}


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_plan_fingerprints_are_the_same_in_another_process():
    code = (
        "import json; from tests.support.toy_workflow import toy_plan;"
        "print(json.dumps({s.name: s.fingerprint for s in toy_plan().steps}))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert json.loads(other.stdout) == fingerprints(toy_plan())


def test_plan_survives_the_round_trip_through_run_json(store: Store, text: Path):
    plan = runs.plan_recipe("quickstart", [("corpus.source", str(text))])
    assert runs.frozen_plan(runs.create_run(store, plan, "local", "r1")) == plan


def test_plan_with_a_missing_input_file_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        runs.plan_recipe("quickstart", [("corpus.source", str(tmp_path / "nowhere.txt"))])


def _fields(config: Any, path: str, run_only: bool = False) -> Iterator[tuple[str, Any, Any, bool]]:
    """(dotted path, type, value, whether it is execution) of every leaf of a configuration."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        below = f"{path}.{field.name}"
        is_execution = run_only or bool(field.metadata.get("execution"))
        if dataclasses.is_dataclass(value):
            yield from _fields(value, below, is_execution)
        else:
            yield below, hints[field.name], value, is_execution


def _others(kind: Any, value: Any) -> list[Any]:
    """Other values that a field may take, the likeliest first."""
    if isinstance(value, bool):
        return [not value]
    if typing.get_origin(kind) is Literal:
        return [choice for choice in typing.get_args(kind) if choice != value]
    if isinstance(value, int):
        return [value + 1, value * 2, value * 4, max(1, value // 2)]
    if isinstance(value, float):
        return [value * 0.5, value * 2.0, 0.25]
    if isinstance(value, str):
        return [value + "x"]
    if value == {}:
        return [{"text": 2.0}]
    if isinstance(value, tuple | list):
        return [[*value, item] for item in ("more", 3, 0.5, "json:loads")] + [[item, item] for item in value]
    if value is None:
        return [3, 2, 0.5, "other", {}, {"kind": "linear", "factor": 2.0}, True]
    return []


NOT_ALONE = {f"pretrain.architecture.{name}" for name in ("moe", "time_conditioning", "head_bias")} | {
    "corpus.hub_split", "corpus.hub_revision", "pretrain.short_step_min", "pretrain.phases", "pretrain.ep_size",
    "pretrain.objective.cart_p", "tokenizer.rare_token_id", "pretrain.adaptation.mask_noise_std",
    "pretrain.adaptation.mask_noise_steps",
    "pretrain.average.keep", "pretrain.average.count", "pretrain.average.every_steps", "pretrain.objective.mask_rates",
    "pretrain.objective.search_mask_rates", "pretrain.router_loss.balance", "pretrain.router_loss.z",
    "pretrain.router_loss.group_seqs", "pretrain.router_loss.bias_rate",
    "pretrain.optimizer.lr_scale.experts", "pretrain.optimizer.muon_momentum",
    "pretrain.optimizer.muon_iterations", "pretrain.optimizer.lr_schedule.decay_share",
    "pretrain.optimizer.lr_schedule.decay", "pretrain.optimizer.lr_schedule.drop_share",
    "pretrain.optimizer.lr_schedule.drop_scale", "generate.refresh_every", "generate.sampler.per_pass",
    "generate.sampler.is_tempered", "generate.sampler.order_temperature", "generate.sampler.tau",
    "generate.sampler.factor", "generate.sampler.gamma", "generate.sampler.remasking", "generate.sampler.eta",
    "generate.sampler.num_states", "generate.sampler.quotas", "generate.sampler.takes_eos_last",
    "generate.sampler.look_every",
}  # fmt: skip
"""Settings that change only together with others, or that the stage refuses."""


def _changes(workflow: Workflow, other_text: str) -> Iterator[tuple[str, bool, Workflow]]:
    """The workflow with one setting changed, for every setting of every step."""
    configs = {step.name: step.config for step in workflow.steps}
    for step in workflow.steps:
        for path, kind, value, is_execution in _fields(step.config, step.name):
            if path in ("convert.weights", "pretrain.accept_changed_identity"):
                continue  # refused: any other unless the training keeps an average; in every workflow
            candidates = [other_text] if path in ("corpus.source", "tokenizer.file") else _others(kind, value)
            for candidate in candidates:
                try:
                    new = apply_settings(configs, [(path, candidate)])
                except UserError:
                    continue
                if to_json(new[step.name]) != to_json(step.config):
                    steps = tuple(Step(s.name, s.stage, new[s.name], s.inputs) for s in workflow.steps)
                    yield path, is_execution, Workflow(workflow.name, "", steps)
                    break
            else:
                if path in NOT_ALONE:
                    continue
                raise AssertionError(f"no other value found for {path}: {value!r}; extend _others")


def test_plan_of_quickstart_changes_exactly_downstream_of_an_identity_setting_and_nowhere_for_execution(text: Path):
    workflow = runs.configured("quickstart", [("corpus.source", str(text))])
    other_text = text.with_name("other.txt")
    other_text.write_text("that is the question")
    plan = make_plan(workflow, {})
    seen: dict[str, bool] = {}
    for path, is_execution, other in _changes(workflow, str(other_text)):
        reads_other_data = path in ("corpus.source", "tokenizer.file")
        expected = set() if is_execution and not reads_other_data else downstream(workflow, path.split(".")[0])
        assert changed(plan, make_plan(other, {})) == expected, path
        seen[path] = is_execution
    assert seen["pretrain.workers"]
    assert seen["pretrain.zero_stage"]
    assert not seen["pretrain.num_steps"]
    assert not seen["pretrain.noise_seed"]
    assert not seen["pretrain.architecture.d_model"]


def test_plan_follows_the_content_of_outside_files_not_their_place(text: Path):
    plan = runs.plan_recipe("quickstart", [("corpus.source", str(text))])
    elsewhere = text.parent / "elsewhere" / text.name
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(text.read_bytes())
    moved = runs.plan_recipe("quickstart", [("corpus.source", str(elsewhere))])
    assert moved.step("corpus").external == plan.step("corpus").external
    assert changed(plan, moved) == set()
    text.write_text("to be or not to bee")
    edited = runs.plan_recipe("quickstart", [("corpus.source", str(text))])
    assert changed(plan, edited) == {step.name for step in plan.steps}


def test_plan_follows_the_code_version(monkeypatch: pytest.MonkeyPatch):
    plan = toy_plan()
    monkeypatch.setattr(source_config, "STAGE", replace(source_config.STAGE, code_version=2))
    assert changed(plan, toy_plan()) == {"source", "aside", "double", "total"}


# --- explain --------------------------------------------------------------------------------------------------------


def test_explain_an_empty_store_says_never_run(store: Store):
    assert set(reasons(toy_plan(), store).values()) == {"run: never run"}


def test_explain_a_full_store_says_cached(store: Store):
    plan = toy_plan()
    fabricate(store, plan)
    assert {action.action for action in explain(plan, store)} == {"cached"}


def test_explain_a_changed_setting_names_it_with_both_values_and_what_follows(store: Store):
    fabricate(store, toy_plan())
    found = reasons(toy_plan(double__number=5), store)
    assert found["double"] == "run: changed since run test: number 1 -> 5"
    assert found["total"] == "run: input will be rebuilt: value (double)"
    assert found["source"].startswith("cached")
    assert found["aside"].startswith("cached")


def test_explain_names_the_smallest_difference_of_several_artifacts(store: Store):
    fabricate(store, toy_plan(source__number=3, double__number=3))
    fabricate(store, toy_plan(source__number=3, double__number=9))
    assert reasons(toy_plan(double__number=9), store)["double"] == "run: input will be rebuilt: value (source)"


def test_explain_an_input_that_exists_but_is_another_says_input_changed(store: Store):
    fabricate(store, toy_plan())
    fabricate(store, toy_plan(source__number=4), "source")
    found = reasons(toy_plan(source__number=4), store)
    assert found["source"].startswith("cached")
    assert found["double"] == "run: input changed: value"


def test_explain_an_execution_setting_changes_nothing(store: Store):
    fabricate(store, toy_plan())
    assert {a.action for a in explain(toy_plan(total__workers=5, source__trouble="user"), store)} == {"cached"}


def test_explain_a_changed_code_version_says_so(store: Store, monkeypatch: pytest.MonkeyPatch):
    fabricate(store, toy_plan())
    monkeypatch.setattr(source_config, "STAGE", replace(source_config.STAGE, code_version=2))
    assert reasons(toy_plan(), store)["source"] == "run: changed since run test: code_version 1 -> 2"


def test_explain_changed_outside_data_says_so(store: Store, text: Path):
    fabricate(store, toy_plan(source__path=str(text)))
    text.write_text("longer than before, by a few bytes")
    assert (
        reasons(toy_plan(source__path=str(text)), store)["source"] == "run: outside data changed since run test: bytes"
    )


@pytest.mark.parametrize("trace", ["shards/0.json", "state/step-000100/model.safetensors"])
def test_explain_unfinished_work_says_started_before(store: Store, trace: str):
    plan = toy_plan()
    path = store.artifact("toy-double", plan.step("double").fingerprint).directory.path / trace
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert reasons(plan, store)["double"] == "run: started before and not finished"


def test_explain_ignores_an_artifact_whose_configuration_has_an_older_shape(store: Store):
    plan = toy_plan()
    fabricate(store, plan, "source")
    place = store.artifact("toy-source", plan.step("source").fingerprint)
    committed = place.committed()
    assert committed is not None
    manifest = read_json(committed.path / "manifest.json")
    manifest["config"]["colour"] = manifest["config"].pop("number")
    (committed.path / "manifest.json").write_text(json.dumps(manifest))
    assert reasons(toy_plan(source__number=2), store)["source"] == "run: never run"


def test_explain_a_damaged_artifact_names_what_to_delete(store: Store):
    plan = toy_plan()
    fabricate(store, plan)
    place = store.artifact("toy-source", plan.step("source").fingerprint)
    committed = place.committed()
    assert committed is not None
    (committed.path / "value.txt").unlink()
    with pytest.raises(CorruptionError, match=f"delete {place.directory.path}"):
        explain(plan, store)


def test_explain_quickstart_with_more_steps_names_training_and_what_follows(store: Store, text: Path):
    source = ("corpus.source", str(text))
    fabricate(store, runs.plan_recipe("quickstart", [source]))
    steps = next(step.config.num_steps for step in quickstart().steps if step.name == "pretrain")
    actions = explain(runs.plan_recipe("quickstart", [source, ("pretrain.num_steps", steps + 1)]), store)
    assert [action.step for action in actions if action.action == "run"] == TRAINED
    (training,) = [action for action in actions if action.step == "pretrain"]
    assert training.reason == f"changed since run test: num_steps {steps} -> {steps + 1}"


# --- settings that do not fit each other ------------------------------------------------------------------------------


@pytest.fixture
def books_and_code(text: Path) -> list[tuple[str, Any]]:
    """Settings for a corpus of two sources."""
    (text.parent / "code.txt").write_text("print()")
    return [("corpus.source", {"books": str(text), "code": str(text.parent / "code.txt")})]


def test_plan_with_a_mixture_of_a_source_that_the_corpus_lacks_is_refused(books_and_code: list[tuple[str, Any]]):
    with pytest.raises(UserError, match=r"pretrain\.mixture\.cod: .*did you mean code\? allowed here: books, code"):
        runs.plan_recipe("quickstart", [*books_and_code, ("pretrain.mixture", {"books": 1, "cod": 2})])
    with pytest.raises(UserError, match=r"pretrain\.mixture\.web: 'web' .*corpus; allowed here: books, code"):
        runs.plan_recipe("quickstart", [*books_and_code, ("pretrain.mixture.web", 1.0)])


def test_plan_with_a_mixture_of_a_source_that_is_held_out_whole_is_refused(books_and_code: list[tuple[str, Any]]):
    whole = ("corpus.source.code.held_out_fraction", 1.0)
    with pytest.raises(UserError, match=r"pretrain\.mixture\.code: corpus\.source\.code\.held_out_fraction is 1"):
        runs.plan_recipe("quickstart", [*books_and_code, whole, ("pretrain.mixture", {"code": 1})])


def test_plan_with_a_mixture_of_sources_of_the_corpus_is_made(books_and_code: list[tuple[str, Any]]):
    plan = runs.plan_recipe("quickstart", [*books_and_code, ("pretrain.mixture", {"code": 2})])
    assert plan.step("pretrain").config["mixture"] == {"code": 2.0}


def test_plan_that_accepts_a_changed_identity_is_refused_since_it_would_have_no_effect():
    with pytest.raises(
        UserError, match=r"pretrain\.accept_changed_identity is true, which has no effect in a workflow"
    ):
        runs.plan_recipe("quickstart", [("pretrain.accept_changed_identity", True)])


def test_check_of_a_stage_gets_the_configurations_it_depends_on_by_path_of_inputs(monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    monkeypatch.setattr(total_config, "STAGE", replace(total_config.STAGE, check=lambda *given: seen.append(given)))
    plan = toy_plan(source__number=2, double__number=3, aside__number=5)
    ((config, upstream, step),) = seen
    assert (to_json(config), step) == (plan.step("total").config, "total")
    assert {path: value["number"] for path, value in upstream.items()} == {"value": 3, "value.value": 2, "aside": 5}


# --- drift ----------------------------------------------------------------------------------------------------------


def test_drift_of_an_untouched_plan_is_none(text: Path):
    assert check_drift(toy_plan(source__path=str(text))) == {}


def test_drift_of_the_code_version_is_found(monkeypatch: pytest.MonkeyPatch):
    plan = toy_plan()
    monkeypatch.setattr(source_config, "STAGE", replace(source_config.STAGE, code_version=3))
    assert check_drift(plan) == {"source": {"code_version": (1, 3)}, "aside": {"code_version": (1, 3)}}


def test_drift_of_an_outside_file_is_found(text: Path):
    plan = toy_plan(source__path=str(text))
    before = text.stat().st_size
    text.write_text("short")
    assert check_drift(plan) == {"source": {"external.bytes": (before, 5)}}


def test_drift_of_a_setting_that_came_with_newer_code_is_one_only_if_it_decides_what_comes_out(text: Path):
    plan = toy_plan()
    (old,) = [step for step in plan.steps if step.name == "double"]
    for field, expected in (("workers", {}), ("number", {"double": {"config.number": (None, 1)}})):
        config = {name: value for name, value in old.config.items() if name != field}
        steps = [replace(step, config=config) if step is old else step for step in plan.steps]
        assert check_drift(replace(plan, steps=steps)) == expected


def test_salt_gives_another_address_and_no_salt_the_one_that_it_always_was():
    plan = toy_plan()
    steps = [Step(s.name, s.stage, step_config(s), s.inputs) for s in plan.steps]
    again, salted = resolved(steps), resolved(steps, salts={"double": "x"})
    assert again == plan.steps
    assert {s.name for s, t in zip(plan.steps, salted, strict=True) if s.fingerprint != t.fingerprint} == {
        "double", "total",
    }  # fmt: skip
    for step in plan.steps:
        stage, inputs = load_stage(step.stage), {n: plan.step(s).fingerprint for n, s in step.inputs.items()}
        assert step.fingerprint == stage_fingerprint(stage, step_config(step), inputs, step.external)


def test_plan_of_first_weights_of_another_architecture_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"that the workflow trains before: d_model is 128 there and 64 here"):
        runs.plan_recipe("dream_tiny", [("pretrain.architecture.d_model", 64)])
    both = [(f"{step}.architecture.d_model", 64) for step in ("ar_pretrain", "pretrain")]
    assert runs.plan_recipe("dream_tiny", both).step("pretrain").config["architecture"]["d_model"] == 64
    architecture = make_checkpoint(tmp_path / "given")
    path = ("import_checkpoint.path", str(tmp_path / "given"))
    with pytest.raises(UserError, match=rf"of the weights in {tmp_path}/given: .*num_layers is 2 there and 30 here"):
        runs.plan_recipe("smollm2_to_diffusion", [path])
    theirs = ("pretrain.architecture", to_json(architecture))
    assert runs.plan_recipe("smollm2_to_diffusion", [path, theirs]).step("pretrain").config["init_seed"] == 0
    experts = {"num_experts": 4, "top_k": 2, "d_ff_expert": 48}
    with pytest.raises(UserError, match=r"pretrain\.architecture is not that of the weights in .*moe") as refused:
        runs.plan_recipe("smollm2_to_diffusion", [path, theirs, ("ar_init.upcycle", experts)])
    told = re.search(r"--set 'pretrain\.architecture=(\{.*\})'$", str(refused.value))
    assert told is not None
    with_experts = ("pretrain.architecture", json.loads(told[1]))
    planned = runs.plan_recipe("smollm2_to_diffusion", [path, with_experts, ("ar_init.upcycle", experts)])
    assert planned.step("pretrain").config["architecture"]["moe"]["num_experts"] == 4
    with pytest.raises(UserError, match=r"cannot be upcycled: moe\.d_ff_expert is 47"):
        runs.plan_recipe("smollm2_to_diffusion", [path, theirs, ("ar_init.upcycle", {**experts, "d_ff_expert": 47})])


def test_plan_of_first_weights_knows_the_rotary_base_that_the_training_before_ends_with():
    phases = ("ar_pretrain.phases", {"short": {}, "long": {"rope_base": 500_000.0}})
    with pytest.raises(UserError, match=r"rope_base is 500000\.0 there and 1000000\.0 here"):
        runs.plan_recipe("dream_tiny", [phases])
    theirs = ("pretrain.architecture.rope_base", 500_000.0)
    assert runs.plan_recipe("dream_tiny", [phases, theirs]).step("pretrain").config["phases"] == {}


def test_plan_of_a_checkpoint_reads_its_configuration_as_the_import_does(tmp_path: Path):
    architecture = make_checkpoint(tmp_path / "given")
    given = [
        ("import_checkpoint.path", str(tmp_path / "given")),
        ("pretrain.architecture", to_json(architecture)),
    ]
    file = tmp_path / "given" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "hidden_size": 64}))
    with pytest.raises(UserError, match="d_model is 64 there and 32 here"):
        runs.plan_recipe("smollm2_to_diffusion", given)
    file.write_text("{")
    with pytest.raises(CorruptionError, match=r"config\.json is no JSON"):
        runs.plan_recipe("smollm2_to_diffusion", given)
