"""Recipes: every one can be planned, says what is not published, and has a tiny one of the same course."""

from typing import Any

import pytest

from dlm_core.models.presets import PRESETS
from pipeline.errors import UserError
from pipeline.pretrain.config import PretrainConfig
from pipeline.tokenizer.config import TokenizerConfig
from workflows import runs
from workflows.recipes import RECIPES, load_recipe

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
