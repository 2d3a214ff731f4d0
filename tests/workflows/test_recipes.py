"""Recipes: every one can be planned, says what is not published, and has a tiny one of the same course."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dlm_core.models.presets import PRESETS
from pipeline.errors import UserError
from pipeline.pretrain.config import PretrainConfig
from pipeline.tokenizer.config import TokenizerConfig
from tests.support.executors import RAY_LIMIT_S
from tests.support.tiny_run import write_text
from tests.workflows.conftest import Dlm
from workflows import listings, runs
from workflows.recipes import RECIPES, load_recipe
from workflows.store import Store

PAIRS = [
    ("mdlm_tiny", "mdlm_lm1b"),
    ("mdlm_tiny", "mdlm_owt"),
    ("bd3lm_tiny", "bd3lm_owt"),
    ("llada_tiny", "llada_8b"),
    ("llada_moe_tiny", "llada_moe_7b"),
    ("llada2_tiny", "llada2_mini"),
    ("dream_tiny", "dream_7b"),
]
ADAPTED = ["dream_7b", "smollm2_to_diffusion"]
"""They go on from a checkpoint that does not come with them, whose tokenizer they take."""


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
MAX_EXAMPLE_LINES = 12
OWN = """
from workflows.step import Step, Workflow
from tests.support.toy_stages.trouble import ToyConfig

def toy(number=1):
    return Workflow("my toy/1", "small", (Step("source", "tests.support.toy_stages.source", ToyConfig(number)),))

def wants(text, *, more): ...
def raises(): return toy("x")
def nothing(): ...
def elsewhere(): return Workflow("w", "", (Step("a", "no_such_stages.a", None),))
def no_stage(): return Workflow("w", "", (Step("a", "tests.support", None),))
count = 3
"""
OWN_STAGE = """
from dataclasses import dataclass
from pipeline.stage import Stage

@dataclass(frozen=True)
class Hello: ...

STAGE = Stage("hello", "task", Hello, "own_stages.run")
"""
OWN_STAGE_RECIPE = """
from own_stages.config import Hello
from workflows.step import Step, Workflow

def hello():
    return Workflow("hello", "a stage of one's own", (Step("greet", "own_stages", Hello()),))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, empty; what is imported from it is forgotten.  Workers find the tests' own stages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    forget_modules(tmp_path)


def forget_modules(folder: Path) -> None:
    """As if nothing had been imported from a folder."""
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


def write_module(path: Path, text: str) -> None:
    """A module that was not there a moment ago."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    importlib.invalidate_caches()


def config_of(recipe: str, step: str = "pretrain") -> Any:
    """Configuration of a step of a recipe."""
    return next(s.config for s in load_recipe(recipe).steps if s.name == step)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_its_name_and_can_be_planned(name: str) -> None:
    workflow = load_recipe(name)
    assert workflow.name == name
    plan = runs.plan_recipe(name, [])
    assert [step.name for step in plan.steps] == [step.name for step in workflow.steps if not step.optional]


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "ask"])
def test_recipe_evaluates_the_averages_where_there_are_some(name: str) -> None:
    has_averages = config_of(name).optimizer.ema_decay > 0
    assert config_of(name, "convert").weights == ("ema" if has_averages else "last")


def test_averages_that_a_training_would_not_keep_are_refused_when_it_is_planned() -> None:
    with pytest.raises(UserError, match=r'convert\.weights is "ema", but pretrain\.optimizer\.ema_decay is 0'):
        runs.plan_recipe("mdlm_tiny", [("pretrain.optimizer.ema_decay", 0)])


def test_checkpoints_that_a_training_would_not_keep_to_be_averaged_are_refused_when_it_is_planned() -> None:
    with pytest.raises(UserError, match=r'convert\.weights is "average", but pretrain\.average\.keep is "none"'):
        runs.plan_recipe("quickstart", [("convert.weights", "average")])
    average = {"keep": "last", "count": 2, "every_steps": 5}
    runs.plan_recipe("quickstart", [("convert.weights", "average"), ("pretrain.average", average)])


@pytest.mark.parametrize(("tiny", "large"), PAIRS)
def test_tiny_recipe_has_the_course_of_the_large_one(tiny: str, large: str) -> None:
    small, big = config_of(tiny), config_of(large)
    assert small.optimizer.kind == big.optimizer.kind
    assert small.optimizer.lr_schedule.kind == big.optimizer.lr_schedule.kind
    assert (small.optimizer.ema_decay > 0) == (big.optimizer.ema_decay > 0)
    assert small.short_step_share == big.short_step_share
    assert small.router_loss == big.router_loss
    names = ("kind", "weighting", "masking", "schedule", "search_mask_rates", "within_documents", "target_offset")
    for field in names:
        assert getattr(small.objective, field) == getattr(big.objective, field), field
    for field in ("norm", "activation", "tied_head", "head_bias", "qk_norm", "rope_fraction"):
        assert getattr(small.architecture, field) == getattr(big.architecture, field), field
    assert (small.architecture.moe is None) == (big.architecture.moe is None)
    if tiny != "llada2_tiny":  # which has fewer block sizes on the way
        assert {n: p.share for n, p in small.phases.items()} == {n: p.share for n, p in big.phases.items()}
    grows = [[bool(span.block_size), bool(span.seq_len)] for span in small.spans]
    assert [g for n, g in enumerate(grows) if n == 0 or g != grows[n - 1]] == [
        g
        for n, g in enumerate([[bool(span.block_size), bool(span.seq_len)] for span in big.spans])
        if n == 0 or g != [bool(big.spans[n - 1].block_size), bool(big.spans[n - 1].seq_len)]
    ]


@pytest.mark.parametrize(
    ("recipe", "preset"),
    [
        ("mdlm_owt", "mdlm-small"),
        ("bd3lm_owt", "bd3lm-small"),
        ("llada_8b", "llada-8b"),
        ("llada_moe_7b", "llada-moe-7b-a1b"),
        ("llada2_mini", "llada2-mini"),
    ],
)
def test_large_recipe_ends_with_the_published_model(recipe: str, preset: str) -> None:
    config: PretrainConfig = config_of(recipe)
    published = PRESETS[preset]
    tokenizer: TokenizerConfig = config_of(recipe, "tokenizer")
    assert tokenizer.vocab_size == published.model.vocab_size
    changed = {
        name
        for name in config.architecture.__dataclass_fields__
        if getattr(config.architecture, name) != getattr(published.model.architecture, name)
    }
    assert changed <= {"rope_base"}
    assert config.spans[-1].rope_base == published.model.architecture.rope_base


@pytest.mark.parametrize(
    ("recipe", "trillions"), [("llada_8b", 2.3), ("llada_moe_7b", 21.0), ("mdlm_owt", 0.524), ("bd3lm_owt", 0.524)]
)
def test_large_recipe_trains_on_the_published_number_of_tokens(recipe: str, trillions: float) -> None:
    config = config_of(recipe)
    seq_len = config_of(recipe, "packing").seq_len
    assert config.num_steps * config.global_batch_seqs * seq_len / 1e12 == pytest.approx(trillions, rel=0.01)


def test_rates_of_llada_are_the_published_ones() -> None:
    config = config_of("llada_8b")
    share = {0.3: 4e-4, 0.7: 1e-4, 0.99999: 1e-5}
    for done, wanted in share.items():
        step = int(done * config.num_steps)
        assert config.optimizer.lr_at(step, config.num_steps) == pytest.approx(wanted, rel=0.01)


LARGE = [large for _, large in PAIRS if large not in ADAPTED]


@pytest.mark.parametrize("name", LARGE)
def test_large_recipe_is_not_run_before_its_text_is_given(dlm: Dlm, store: Store, name: str) -> None:
    done = dlm("run", name, "--executor", "local")
    assert (done.code, done.stdout) == (2, "")
    assert "corpus.source is empty" in done.stderr
    assert "--set corpus.source=PATH" in done.stderr
    assert store.runs() == []


@pytest.mark.parametrize("options", [[], ["--dry-run", "--gpu", "b200"], ["--deepspeed"], ["--settings"]])
def test_large_recipe_is_planned_and_sized_without_its_text(dlm: Dlm, options: list[str]) -> None:
    done = dlm("plan", "mdlm_owt", *options)
    assert done.code == 0, done.stderr


def test_text_that_is_given_makes_a_large_recipe_a_run(store: Store, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl", seed=0, num_docs=3)
    plan = runs.plan_recipe("mdlm_owt", [("corpus.source", str(text))])
    assert runs.create_run(store, plan, "local").plan()["executor"] == "local"


@pytest.mark.parametrize("name", LARGE)
def test_large_recipe_tells_what_is_its_own(name: str) -> None:
    found = listings.recipe(load_recipe(name))
    assert {"tokenizer.vocab_size", "tokenizer.max_train_bytes"} <= found["settings"].keys()
    words = " ".join(found["deviations"])
    assert "corpus.source" in words
    assert "takes the place of" in words
    assert ("dropout" in words) == (name in ("mdlm_lm1b", "mdlm_owt", "bd3lm_owt"))
    schedule = config_of(name).optimizer.lr_schedule
    is_marked = "pretrain.optimizer.lr_schedule.decay" in found["settings"]
    assert is_marked == (schedule.kind == "wsd")


@pytest.mark.parametrize("name", ADAPTED)
def test_adapted_recipe_is_not_run_before_checkpoint_and_text_are_given_and_says_so(
    dlm: Dlm, store: Store, tmp_path: Path, name: str
) -> None:
    text = write_text(tmp_path / "text.jsonl", seed=0, num_docs=3)
    for given, wanted in (([], "import_checkpoint.path is empty"), ([f"corpus.source={text}"], "import_checkpoint")):
        words = [word for setting in given for word in ("--set", setting)]
        done = dlm("run", name, "--executor", "local", *words)
        assert (done.code, done.stdout) == (2, "")
        assert wanted in done.stderr
    assert store.runs() == []
    deviations = " ".join(listings.recipe(load_recipe(name))["deviations"])
    assert "import_checkpoint.path" in deviations
    assert "corpus.source" in deviations


@pytest.mark.parametrize("name", [*ADAPTED, "dream_tiny"])
def test_adapted_recipe_is_sized_by_the_published_model_of_its_shape(dlm: Dlm, name: str) -> None:
    done = dlm("plan", name, "--dry-run", "--gpu", "b200")
    assert done.code == 0, done.stderr


def test_checkpoint_of_an_unknown_shape_is_sized_by_its_own_configuration(dlm: Dlm, tmp_path: Path) -> None:
    other = ("--set", "pretrain.architecture.num_layers=3", "--dry-run")
    done = dlm("plan", "smollm2_to_diffusion", *other)
    assert done.code == 2
    assert "import_checkpoint.path is ''" in done.stderr
    assert "which has no config.json" in done.stderr


def test_block_sizes_of_llada2_are_published_and_the_shares_of_its_phases_are_not() -> None:
    settings = listings.recipe(load_recipe("llada2_mini"))["settings"]
    phases = {name for name in settings if name.startswith("pretrain.phases.")}
    assert phases == {f"pretrain.phases.{name}.share" for name in config_of("llada2_mini").phases}
    assert {"pretrain.architecture.init", "pretrain.architecture.init_std"} <= settings.keys()


def test_tiny_recipes_and_the_quickstart_have_a_text_and_no_deviation() -> None:
    for name in RECIPES.keys() - {"ask", *LARGE, *ADAPTED}:
        assert config_of(name, "corpus").source
        assert listings.recipe(load_recipe(name))["deviations"] == []


def test_recipe_of_ones_own_is_planned_run_and_told_again_as_it_was_typed(dlm: Dlm, here: Path, store: Store) -> None:
    (here / "log").mkdir()
    write_module(here / "own_recipes.py", OWN)
    arguments = ("own_recipes:toy", "--set", f"source.log={here / 'log'}")
    planned = dlm("plan", *arguments)
    assert (planned.code, "never run" in planned.stdout) == (0, True), planned.stderr
    done = dlm("run", *arguments, "--executor", "local")
    assert done.code == 0, done.stderr
    (run,) = store.runs()
    assert run.run_id.startswith("my-toy-1-")
    plan = runs.frozen_plan(run)
    assert (plan.workflow, plan.recipe) == ("my toy/1", "own_recipes:toy")
    assert runs.command_of(run) == f"dlm run own_recipes:toy --executor local --set source.log={here / 'log'}"


EXECUTORS = ["local", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.timeout(RAY_LIMIT_S)])]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_workers_find_stages_of_ones_own_where_dlm_was_called(
    dlm: Dlm, here: Path, store: Store, monkeypatch: pytest.MonkeyPatch, executor: str
) -> None:
    write_module(here / "own_stages" / "__init__.py", "")
    write_module(here / "own_stages" / "config.py", OWN_STAGE)
    write_module(
        here / "own_stages" / "run.py", "def run(config, inputs, context): (context.out / 'a').write_text('b')"
    )
    write_module(here / "own_hello.py", OWN_STAGE_RECIPE)
    done = dlm("run", "own_hello:hello", "--executor", executor)
    assert done.code == 0, done.stderr
    (run,) = store.runs()
    assert (runs.committed_outputs(store, run)["greet"] / "a").read_bytes() == b"b"
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    sys.path.remove(str(here))
    forget_modules(here)
    listed, shown, resumed = dlm("list"), dlm("status", run.run_id), dlm("resume", run.run_id)
    assert (listed.code, run.run_id in listed.stdout, "succeeded" in listed.stdout) == (0, True, True), listed.stderr
    assert shown.code == 0, shown.stderr
    assert "there is no module 'own_stages'" in shown.stdout
    assert resumed.code == 2
    assert "stage 'own_stages': there is no module 'own_stages'" in resumed.stderr
    assert "go to the directory that has it" in resumed.stderr


def test_command_of_a_recipe_of_ours_names_it(dlm: Dlm, log: Path, store: Store) -> None:
    logs = [word for step in ("source", "aside") for word in ("--set", f"{step}.log={log}")]
    dlm("run", "toy", "--executor", "local", "--set", "source.trouble=user", *logs)
    (run,) = store.runs()
    assert runs.command_of(run).startswith("dlm run toy --executor local --set source.trouble=user")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("own_recipes:", r"not of the form package\.module:function"),
        ("own_recipes:toy:1", r"not of the form package\.module:function"),
        ("own recipes:toy", r"not of the form package\.module:function"),
        ("other_recipes:toy", r"there is no module 'other_recipes', neither installed nor in the current directory"),
        ("own_recipes.toy:toy", r"there is no module 'own_recipes\.toy'"),
        ("own_recipes:toys", r"own_recipes\.py has no function 'toys'; did you mean toy\?"),
        ("own_recipes:qqq", r"has no function 'qqq'; define it there"),
        ("own_recipes:count", r"count is something of type int; it must be a function"),
        ("own_recipes:wants", r"wants text, more; a recipe takes no arguments"),
        ("own_recipes:raises", r"failed: TypeError: .*\(.*trouble\.py, line \d+\)"),
        ("own_recipes:nothing", r"returned nothing; it must return a workflows\.step\.Workflow"),
        ("own_recipes:elsewhere", r"stage 'no_such_stages\.a': there is no module 'no_such_stages'"),
        ("own_recipes:no_stage", r"stage 'tests\.support': there is no module 'tests\.support\.config'"),
        ("broken_syntax:toy", r"cannot be imported: SyntaxError: .*broken_syntax\.py, line 1"),
        ("broken_import:toy", r"cannot be imported: ModuleNotFoundError: No module named 'no_such'.*broken_import\.py"),
        ("broken_start:toy", r"cannot be imported: ZeroDivisionError: .*broken_start\.py, line 2\)"),
        ("own_recipes.toy", r"there is no recipe 'own_recipes\.toy'.*one of your own is given as module:function"),
    ],
)
def test_recipe_of_ones_own_that_cannot_be_had_is_refused_with_what_to_do(
    dlm: Dlm, here: Path, store: Store, recipe: str, words: str
) -> None:
    for name, text in {
        "own_recipes": OWN,
        "broken_syntax": "def toy(:",
        "broken_import": "import no_such",
        "broken_start": "\n1 / 0",
    }.items():
        write_module(here / f"{name}.py", text)
    done = dlm("run", recipe, "--executor", "local")
    assert done.code == 2
    assert re.search(words, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not store.runs()


def test_recipe_in_the_readme_is_short_and_runs(dlm: Dlm, here: Path, store: Store) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) <= MAX_EXAMPLE_LINES
    (command,) = re.findall(r"^    dlm run (my_recipes:\w+)", README, flags=re.MULTILINE)
    write_module(here / "my_recipes.py", code)
    (here / "notes").mkdir()
    for number in range(30):
        (here / "notes" / f"{number}.txt").write_text(f"Note {number}: {'a word and another. ' * (number + 1)}")
    done = dlm("run", command, "--executor", "local")
    assert done.code == 0, done.stderr
    (run,) = store.runs()
    outputs = runs.committed_outputs(store, run)
    assert list(outputs) == ["corpus", "tokenizer"]
    assert (outputs["tokenizer"] / "tokenizer.json").exists()
