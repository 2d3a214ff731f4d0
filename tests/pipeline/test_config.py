import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import (
    apply_settings,
    diff,
    execution,
    fingerprint,
    flatten,
    from_json,
    identity,
    parse_json,
    parse_value,
    to_json,
)
from pipeline.corpus.config import CorpusConfig, Source
from pipeline.corpus.filters import Filters
from pipeline.errors import UserError
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.optimizer_config import OptimizerConfig
from pipeline.pretrain.phases import Phase
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import TokenizerConfig
from tests.pipeline.conftest import python
from tests.support.config_fields import ALL_CONFIGS, CHANGED, EXECUTION, EXECUTION_NOT_ALONE, NOT_ALONE


def _with(kind: type, path: str, value: Any) -> Any:
    return apply_settings({"it": kind()}, [(f"it.{path}", value)])["it"]


def _cases(table: dict[type, dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(kind, path, value, id=f"{kind.__name__}.{path}")
        for kind, fields in table.items()
        for path, value in fields.items()
    ]


@pytest.mark.parametrize("kind", ALL_CONFIGS)
def test_json_round_trip_gives_the_same_config(kind: type) -> None:
    text = json.dumps(to_json(kind()))
    assert from_json(kind, json.loads(text)) == kind()


@given(
    lr=st.floats(1e-9, 1e3),
    weight_decay=st.integers(0, 3) | st.floats(0, 3),
    num_steps=st.integers(1, 10**12),
    precision=st.sampled_from(["fp32", "bf16"]),
    mixture=st.dictionaries(st.sampled_from(["code", "books"]), st.integers(1, 9) | st.sampled_from([0.5, 2.0])),
)
def test_json_round_trip_keeps_every_value_and_the_fingerprint(
    lr: float,
    weight_decay: float,
    num_steps: int,
    precision: Any,
    mixture: dict[str, float],
) -> None:
    config = PretrainConfig(
        optimizer=OptimizerConfig(lr=lr, weight_decay=weight_decay),
        num_steps=num_steps,
        precision=precision,
        mixture=mixture,
    )
    again = from_json(PretrainConfig, json.loads(json.dumps(to_json(config))))
    assert again == config
    assert fingerprint(identity(again)) == fingerprint(identity(config))


@dataclasses.dataclass(frozen=True)
class Floats:
    """Every way in which a float may be declared."""

    plain: float = 0.5
    optional: float | None = None
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    nested: dict[str, dict[str, float]] | None = None
    either: int | float = 0


def test_whole_numbers_in_float_fields_are_floats_as_after_a_round_trip() -> None:
    config = Floats(1, 2, {"a": 3, "b": 0.5}, {"c": {"d": 4}}, 5)
    written = (
        '{"plain": 1.0, "optional": 2.0, "shares": {"a": 3.0, "b": 0.5}, "nested": {"c": {"d": 4.0}}, "either": 5}'
    )
    assert json.dumps(to_json(config)) == json.dumps(identity(config)) == written
    assert json.dumps(to_json(from_json(Floats, json.loads(written)))) == written


@pytest.mark.parametrize("kind", ALL_CONFIGS)
def test_every_field_is_in_one_of_the_two_tables_here(kind: type) -> None:
    tables: list[dict[type, dict[str, Any]]] = [CHANGED, EXECUTION, NOT_ALONE, EXECUTION_NOT_ALONE]
    listed = {name: value for table in tables for name, value in table.get(kind, {}).items()}
    assert set(flatten(to_json(kind()))) - {""} == set(listed)


@pytest.mark.parametrize(("kind", "path", "value"), _cases(CHANGED))
def test_fingerprint_with_an_identity_field_changed_differs(kind: type, path: str, value: Any) -> None:
    changed = _with(kind, path, value)
    assert fingerprint(identity(changed)) != fingerprint(identity(kind()))
    assert list(diff(identity(kind()), identity(changed))) == [path]


@pytest.mark.parametrize(("kind", "path", "value"), _cases(NOT_ALONE))
def test_fingerprint_of_a_part_with_a_field_that_needs_others_differs(kind: type, path: str, value: Any) -> None:
    before, after = map(identity, value)
    assert path.rpartition(".")[2] in {name.partition(".")[0] for name in diff(before, after)}
    assert fingerprint(before) != fingerprint(after)


@pytest.mark.parametrize(("kind", "path", "value"), _cases(EXECUTION))
def test_fingerprint_with_an_execution_field_changed_stays(kind: type, path: str, value: Any) -> None:
    changed = _with(kind, path, value)
    assert changed != kind()
    assert fingerprint(identity(changed)) == fingerprint(identity(kind()))
    assert path not in flatten(identity(kind()))


@pytest.mark.parametrize(("kind", "path", "value"), _cases(EXECUTION_NOT_ALONE))
def test_fingerprint_with_an_execution_field_that_needs_others_stays(kind: type, path: str, value: Any) -> None:
    before, after = value
    assert before != after
    assert identity(before) == identity(after)
    assert path not in flatten(identity(before))


def test_fingerprint_is_the_hash_of_sorted_compact_ascii_json() -> None:
    text = r'{"a":{},"b":[1,2.5,"\u00e9",null,true]}'
    assert fingerprint({"b": (1, 2.5, "é", None, True), "a": {}}) == hashlib.sha256(text.encode()).hexdigest()


def test_fingerprint_in_processes_with_other_hash_seeds_is_the_same() -> None:
    program = (
        "from pipeline.config import fingerprint, identity\n"
        "from pipeline.pretrain.config import PretrainConfig\n"
        "print(fingerprint({'c': identity(PretrainConfig()), **dict.fromkeys({'x', 'y', 'z', 'w'}, 1)}))"
    )
    found = [python("-c", program, PYTHONHASHSEED=seed) for seed in ("0", "4242")]
    here = fingerprint({"c": identity(PretrainConfig()), **dict.fromkeys("wxyz", 1)})
    assert [process.stdout.strip() for process in found] == [here, here], found[0].stderr


@pytest.mark.parametrize("value", [print, lambda: 0, {1, 2}, b"bytes", Path("p"), object(), 1j, {object(): 1}])
def test_fingerprint_of_an_unknown_type_raises_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="canonical"):
        fingerprint({"nested": [value]})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_fingerprint_of_a_number_that_is_not_finite_raises(value: float) -> None:
    with pytest.raises(UserError, match="finite"):
        fingerprint({"nested": [value]})


@pytest.mark.parametrize(
    ("value", "path", "hint"),
    [
        ({"num_step": 3}, "pretrain.num_step", "did you mean num_steps?"),
        ({"optimizer": {"learning_rate": 3}}, "pretrain.optimizer.learning_rate", "allowed here: kind, lr"),
        (
            {"optimizer": {"lr_schedule": {"warmup_step": 3}}},
            "pretrain.optimizer.lr_schedule.warmup_step",
            "warmup_steps?",
        ),
        ({"architecture": {"n_layers": 3}}, "pretrain.architecture.n_layers", "did you mean num_layers?"),
    ],
)
def test_from_json_with_an_unknown_key_names_path_and_suggestion(value: Any, path: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        from_json(PretrainConfig, value, where="pretrain")
    assert f"unknown setting {path}" in str(error.value)
    assert hint in str(error.value)


@dataclass(frozen=True)
class _Leaf:
    size: int = 1


@dataclass(frozen=True)
class _Tree:
    leaves: tuple[_Leaf, ...] | None = None
    named: dict[str, list[_Leaf]] = field(default_factory=dict)
    speed: int = execution(1)


@pytest.mark.parametrize("value", [{"leaves": [{"siez": 2}]}, {"named": {"a": [{"siez": 2}]}}])
def test_from_json_with_an_unknown_key_deep_in_containers_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match="siez"):
        from_json(_Tree, value)


def test_another_order_of_phases_is_another_training_and_of_sources_the_same() -> None:
    rows, blocks = Phase(), Phase(block_size=4)
    one = PretrainConfig(phases={"rows": rows, "blocks": blocks}, mixture={"a": 1.0, "b": 2.0})
    other = PretrainConfig(phases={"blocks": blocks, "rows": rows}, mixture={"a": 1.0, "b": 2.0})
    assert fingerprint(identity(one)) != fingerprint(identity(other))
    assert diff(identity(one), identity(other)) == {"phases_order": (["rows", "blocks"], ["blocks", "rows"])}
    assert fingerprint(identity(from_json(PretrainConfig, to_json(one)))) == fingerprint(identity(one))
    mixed = dataclasses.replace(one, mixture={"b": 2.0, "a": 1.0})
    assert fingerprint(identity(mixed)) == fingerprint(identity(one))


def test_identity_of_configs_in_containers_leaves_execution_out() -> None:
    assert identity((_Tree(leaves=(_Leaf(2),)),)) == [{"leaves": [{"size": 2}], "named": {}}]
    assert identity({"a": _Tree(), 2: [_Tree(speed=5)]}) == {
        "a": {"leaves": None, "named": {}}, "2": [{"leaves": None, "named": {}}]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("num_steps", "abc"), ("num_steps", 1.5), ("num_steps", None), ("num_steps", True), ("num_steps", [1]),
        ("optimizer.lr", "abc"), ("optimizer.lr", True), ("optimizer.lr", "nan"), ("optimizer.lr", math.inf),
        ("optimizer.lr", None), ("optimizer", 3), ("precision", "fp16"), ("zero_stage", 4), ("track", "maybe"),
        ("track", 2), ("architecture", None),
    ],
)  # fmt: skip
def test_from_json_with_a_wrong_type_names_path_and_value(path: str, value: Any) -> None:
    nested: Any = value
    for part in reversed(path.split(".")):
        nested = {part: nested}
    with pytest.raises(UserError) as error:
        from_json(PretrainConfig, nested, where="pretrain")
    assert f"pretrain.{path} is {value!r}" in str(error.value)


@pytest.mark.parametrize("value", [[], None, 3, "text"])
def test_from_json_of_something_else_than_an_object_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match="corpus is"):
        from_json(CorpusConfig, value, where="corpus")


def test_from_json_converts_numbers_written_as_text() -> None:
    config = from_json(PretrainConfig, {"optimizer": {"lr": "1e-3"}, "num_steps": "12"})
    assert (config.optimizer.lr, config.num_steps) == (1e-3, 12)


def test_from_json_with_several_mistakes_names_all() -> None:
    with pytest.raises(UserError) as error:
        from_json(PretrainConfig, {"num_steps": "x", "short_step_min": "y", "sede": 1})
    assert all(name in str(error.value) for name in ("num_steps", "short_step_min", "sede"))


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        (CorpusConfig, "source", []), (CorpusConfig, "held_out_fraction", 0.0), (CorpusConfig, "held_out_fraction", 1),
        (CorpusConfig, "max_bad_ratio", -0.1), (CorpusConfig, "max_bad_ratio", 1.1),
        (CorpusConfig, "txt_document_chars", -1), (CorpusConfig, "shard_bytes", 0),
        (CorpusConfig, "source", ""), (CorpusConfig, "source", {"a-b": "x"}),
        (CorpusConfig, "source", {"1": "x"}), (CorpusConfig, "source", {"a" * 65: "x"}),
        (CorpusConfig, "source", {"a": {"text_field": "x"}}), (CorpusConfig, "source", {"a": []}),
        (CorpusConfig, "max_line_bytes", 0), (CorpusConfig, "max_decompression_ratio", 0.5),
        (CorpusConfig, "text_field", ""), (CorpusConfig, "filters", {"min_chars": -1}),
        (CorpusConfig, "filters", {"min_chars": 9, "max_chars": 8}), (CorpusConfig, "filters", {"quality": ["x"]}),
        (TokenizerConfig, "vocab_size", 258), (TokenizerConfig, "max_train_bytes", 0),
        (TokenizerConfig, "mask_token", ""), (TokenizerConfig, "mask_token", "[PAD]"),
        (TokenizationConfig, "batch_chars", 0),
    ],
)  # fmt: skip
def test_from_json_out_of_range_names_the_field(kind: type, path: str, value: Any) -> None:
    with pytest.raises(UserError, match=path):
        from_json(kind, {path: value}, where="it")


def test_every_config_is_frozen() -> None:
    for kind in ALL_CONFIGS:
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen, kind


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("1e-3", 1e-3), ("true", True), ("null", None),
        ('"3"', "3"), ("[1, 2]", [1, 2]), ('{"a": 1}', {"a": 1}),
        ("stdlib", "stdlib"), ("no", "no"), ("a=b", "a=b"), ("", ""), ("NaN", "NaN"), ("-Infinity", "-Infinity"),
        ("/a/*.txt", "/a/*.txt"),
    ],
)  # fmt: skip
def test_parse_value_takes_json_where_it_is_json(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["{broken", '{"a": 1', "[1, 2", '"half'])
def test_parse_value_refuses_json_that_is_broken(text: str) -> None:
    with pytest.raises(UserError, match="is no JSON"):
        parse_value(text)


@pytest.mark.parametrize("parse", [parse_json, parse_value])
def test_parse_with_a_key_twice_names_it(parse: Any) -> None:
    with pytest.raises(UserError, match="'lr' stands twice"):
        parse('{"optimizer": {"lr": 1, "lr": 2}}')


def test_apply_settings_reaches_nested_fields_and_leaves_the_rest() -> None:
    before = {"pretrain": PretrainConfig(num_steps=5), "corpus": CorpusConfig()}
    after = apply_settings(before, [("pretrain.optimizer.lr", 0.5), ("corpus.source", "a.txt")])
    assert diff(to_json(before["pretrain"]), to_json(after["pretrain"])) == {"optimizer.lr": (1e-3, 0.5)}
    assert after["corpus"] == CorpusConfig(source={"text": Source((str(Path("a.txt").absolute()),))})
    assert before["pretrain"] == PretrainConfig(num_steps=5)


def test_apply_settings_merges_objects_at_every_depth() -> None:
    config = PretrainConfig(optimizer=OptimizerConfig(weight_decay=0.7, beta1=0.5))
    settings = [("pretrain", {"num_steps": 9, "optimizer": {"lr": 0.5}}), ("pretrain.optimizer", {"beta1": 0.25})]
    after = apply_settings({"pretrain": config}, settings)["pretrain"]
    assert after == PretrainConfig(num_steps=9, optimizer=OptimizerConfig(lr=0.5, weight_decay=0.7, beta1=0.25))


SOURCES = {"corpus": CorpusConfig(source={"books": Source(("/b",), "title"), "code": Source(("/c",))})}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([("corpus.source", "/n")], {"text": Source(("/n",))}),
        ([("corpus.source", ["/n", "/m"])], {"text": Source(("/n", "/m"))}),
        ([("corpus.source", {"web": "/w"})], {"web": Source(("/w",))}),
        ([("corpus", {"source": {"web": {"paths": ["/w"]}}})], {"web": Source(("/w",))}),
        ([("corpus", {"source": "/n"})], {"text": Source(("/n",))}),
        (
            [("corpus.source.books.text_field", "body")],
            {"books": Source(("/b",), "body"), "code": Source(("/c",))},
        ),
        ([("corpus.source.books", {"text_field": "x"})], {"books": Source(("/b",), "x"), "code": Source(("/c",))}),
        ([("corpus.source", {"web": "/w"}), ("corpus.source.web.text_field", "x")], {"web": Source(("/w",), "x")}),
        ([("corpus.source", "/n"), ("corpus.source.text.text_field", "x")], {"text": Source(("/n",), "x")}),
        ([("corpus.source", "/n"), ("corpus.source.web", "/w")], {"text": Source(("/n",)), "web": Source(("/w",))}),
        (
            [("corpus.source", {"web": "/w"}), ("corpus.source.web.filters", {"min_chars": 3})],
            {"web": Source(("/w",), filters=Filters(min_chars=3))},
        ),
    ],
)  # fmt: skip
def test_apply_settings_replaces_a_free_mapping_and_reaches_into_it(settings: Any, expected: Any) -> None:
    assert apply_settings(SOURCES, settings)["corpus"] == CorpusConfig(source=expected)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("corpus.source.boks.text_field", "x", "unknown setting corpus.source.boks.text_field; did you mean books?"),
        ("corpus.source.books.text_feild", "x", "corpus.source.books.text_feild; did you mean text_field?"),
        ("corpus.source", {"a": {"paths": "/x", "text_feild": "x"}}, "a.text_feild; did you mean text_field?"),
        ("corpus.source.books", {"text_feild": "x"}, "corpus.source.books.text_feild; did you mean text_field?"),
        ("corpus.source", {"a": {"paths": "/x", "filters": {"min_char": 1}}}, "did you mean min_chars?"),
        ("corpus.source.new", {"text_field": "x"}, "corpus.source.new.paths is missing"),
        ("corpus.source.", "x", "unknown setting corpus.source."),
        ("corpus.source", 3, "corpus.source is 3"),
        ("corpus.source.books", 3, "corpus.source.books is 3"),
        ("corpus.source.books.filters.min_chars", 3, "corpus.source.books.filters is null"),
        ("corpus.source.books.filters", {"min_chars": True}, "filters.min_chars is True"),
        ("corpus.source", {"paths": "/x", "text_field": "title", "filters": 3}, "corpus.source.filters is 3"),
    ],
)
def test_apply_settings_in_a_free_mapping_names_what_is_wrong(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        apply_settings(SOURCES, [(path, value)])
    assert message in str(error.value)


def test_apply_settings_of_one_path_twice_takes_the_last() -> None:
    after = apply_settings({"p": PretrainConfig()}, [("p.num_steps", 3), ("p.num_steps", 4)])
    assert after["p"].num_steps == 4


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("pretrian.num_steps", 1, "did you mean pretrain?"),
        ("lr", 1, "unknown setting lr; allowed here: pretrain, corpus (there is pretrain.optimizer.lr)"),
        ("pretrain.num_step", 1, "did you mean num_steps?"),
        ("pretrain.optimizer.lrr", 1, "did you mean lr?"),
        ("pretrain.num_steps.deep", 1, "unknown setting pretrain.num_steps.deep"),
        (
            "pretrain.architecture.moe.top_k",
            8,
            "pretrain.architecture.moe is null, so that pretrain.architecture.moe.to",
        ),
        ("pretrain", 1, "pretrain needs a field"),
        ("pretrain", {"optimizer": {"lrr": 1}}, "pretrain.optimizer.lrr"),
        ("pretrain.", 1, "unknown setting"),
        ("", 1, "unknown setting"),
        ("pretrain.num_steps", "abc", "pretrain.num_steps is 'abc'"),
        ("pretrain.optimizer", "adamw", "is 'adamw'; wanted a JSON object with fields as pretrain.optimizer."),
        ("pretrain.num_steps", 0, "num_steps is 0"),
        ("pretrain.optimizer.lr", "NaN", "pretrain.optimizer.lr is 'NaN'"),
    ],
)
def test_apply_settings_with_a_bad_path_or_value_names_it(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        apply_settings({"pretrain": PretrainConfig(), "corpus": CorpusConfig()}, [(path, value)])
    assert message in str(error.value)


def test_diff_names_changed_added_and_removed_paths() -> None:
    old = {"a": {"b": 1, "c": 2}, "d": [1]}
    new = {"a": {"b": 1, "c": 3}, "e": "x"}
    assert diff(old, new) == {"a.c": (2, 3), "d": ([1], None), "e": (None, "x")}
    assert diff(old, old) == {}
