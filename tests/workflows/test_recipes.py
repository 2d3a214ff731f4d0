"""Recipes: every one can be planned, says what is not published, and has a tiny one of the same course."""

from pathlib import Path
from typing import Any

import pytest

from dlm_core.models.presets import PRESETS
from pipeline.errors import UserError
from pipeline.pretrain.config import PretrainConfig
from pipeline.tokenizer.config import TokenizerConfig
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
]


def config_of(recipe: str, step: str = "pretrain") -> Any:
    """Configuration of a step of a recipe."""
    return next(s.config for s in load_recipe(recipe).steps if s.name == step)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_its_name_and_can_be_planned(name: str) -> None:
    workflow = load_recipe(name)
    assert workflow.name == name
    plan = runs.plan_recipe(name, [])
    assert [step.name for step in plan.steps] == [step.name for step in workflow.steps]


@pytest.mark.parametrize("name", RECIPES)
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
    for field in ("kind", "weighting", "masking", "schedule", "search_mask_rates", "within_documents"):
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


LARGE = [large for _, large in PAIRS]


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


def test_block_sizes_of_llada2_are_published_and_the_shares_of_its_phases_are_not() -> None:
    settings = listings.recipe(load_recipe("llada2_mini"))["settings"]
    phases = {name for name in settings if name.startswith("pretrain.phases.")}
    assert phases == {f"pretrain.phases.{name}.share" for name in config_of("llada2_mini").phases}
    assert {"pretrain.architecture.init", "pretrain.architecture.init_std"} <= settings.keys()


def test_tiny_recipes_and_the_quickstart_have_a_text_and_no_deviation() -> None:
    for name in RECIPES.keys() - set(LARGE):
        assert config_of(name, "corpus").source
        assert listings.recipe(load_recipe(name))["deviations"] == []
