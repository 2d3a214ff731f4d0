"""Frozen dataclasses to and from JSON, settings by dotted path, and the canonical fingerprint.

Configuration types live beside the stage they configure; values live in recipes.  Here is only what all of
them share.
"""

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import UserError

T = TypeVar("T")

_AS_LIKELY = 0.05
"""Names that are so little less like a word than the likest one are suggested too."""
_STRICT = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)


def execution(default: Any) -> Any:
    """A field that changes how a stage runs, not what it should produce: left out of the fingerprint."""
    return dataclasses.field(default=default, metadata={"execution": True})


def ordered() -> Any:
    """A field for a mapping whose order is part of the result: it is in the fingerprint, where names are sorted."""
    return dataclasses.field(default_factory=dict[str, Any], metadata={"ordered": True})


def to_json(config: Any) -> Any:
    """Plain JSON values of a configuration: dataclasses become objects, tuples become arrays."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_json(_field_value(config, f)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_json(item) for item in config]
    if isinstance(config, Mapping):
        if unusable := [key for key in config if not isinstance(key, str | int)]:
            raise TypeError(f"a key has no canonical JSON form: {unusable[0]!r}")
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, bool | int | str) or config is None:
        return config
    if isinstance(config, float):
        if not math.isfinite(config):
            raise UserError(f"{config} cannot stand in a configuration; use a finite number")
        return config
    raise TypeError(f"a {type(config).__name__} has no canonical JSON form: {config!r}")


def _field_value(config: Any, field: dataclasses.Field[Any]) -> Any:
    return _as_declared(field.type, getattr(config, field.name))


def _as_declared(hint: Any, value: Any) -> Any:
    """A value with ``1`` as 1.0 where a float is declared, as it is after a round trip through JSON."""
    if type(value) is int:
        parts = _parts(hint)
        return float(value) if float in parts and int not in parts else value
    if isinstance(value, Mapping) and (values := _values_in(hint)) is not None:
        return {key: _as_declared(values, item) for key, item in value.items()}
    return value


def identity(config: Any) -> Any:
    """Like ``to_json``, without the fields declared by ``execution``, and with the order of ``ordered`` ones."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = [f for f in dataclasses.fields(config) if not f.metadata.get("execution")]
        values = {f.name: identity(_field_value(config, f)) for f in fields}
        orders = {f"{f.name}_order": list(values[f.name]) for f in fields if f.metadata.get("ordered")}
        return values | {name: order for name, order in orders.items() if len(order) > 1}
    if isinstance(config, tuple | list):
        return [identity(item) for item in config]
    if isinstance(config, Mapping):
        return {key: identity(config[name]) for name, key in zip(config, to_json(dict.fromkeys(config)), strict=True)}
    return to_json(config)


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value (sorted keys, no spaces); unknown types raise TypeError."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested JSON objects as {dotted path: leaf}."""
    if not isinstance(value, Mapping) or (prefix and not value):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted paths at which two JSON values differ, with both values (None where absent)."""
    a, b = flatten(old), flatten(new)
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    for nested in _dataclasses_in(kind):
        nested.__pydantic_config__ = _STRICT  # pyright: ignore[reportAttributeAccessIssue]
    return TypeAdapter(kind)


def _dataclasses_in(*hints: Any) -> list[type]:
    found: list[type] = []
    pending = list(hints)
    while pending:
        part = pending.pop()
        pending += getattr(part, "__args__", ())
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            found += [part, *_dataclasses_in(*get_type_hints(part).values())]
    return found


def suggestion(word: str, allowed: Sequence[str]) -> str:
    """What to say behind an unknown name: those that it may have been meant for, or all."""

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, word, name).ratio()

    close = difflib.get_close_matches(word, allowed, n=3, cutoff=0.5)
    close = [name for name in close if likeness(name) > likeness(close[0]) - _AS_LIKELY]
    return f"; did you mean {' or '.join(close)}?" if close else f"; allowed here: {', '.join(allowed)}"


def _parts(hint: Any) -> list[Any]:
    """A type and the types it is made of: the members of a union, the type that metadata are about."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _parts(get_args(hint)[0])
    if origin in (Union, UnionType):
        return [part for member in get_args(hint) for part in _parts(member)]
    return [hint]


def _dataclass_in(hint: Any) -> type | None:
    found = [part for part in _parts(hint) if isinstance(part, type) and dataclasses.is_dataclass(part)]
    return found[0] if found else None


def _values_in(hint: Any) -> Any:
    """The type of the values of a free mapping, dict[str, X]; None for any other type."""
    found = [get_args(part)[1] for part in _parts(hint) if get_origin(part) is dict]
    return found[0] if found else None


def _hint_of(hint: Any, key: str) -> Any:
    """The type at a key of a nested dataclass or of a free mapping; None where there is none."""
    if (values := _values_in(hint)) is not None:
        return values
    nested = _dataclass_in(hint)
    return get_type_hints(nested, include_extras=True).get(key) if nested else None


def _field_names(hint: Any) -> list[str]:
    nested = _dataclass_in(hint)
    return [f.name for f in dataclasses.fields(nested)] if nested else []


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """Build the dataclass ``kind`` from JSON values; strict about keys, types and ranges.

    Raises UserError naming the path of the field, the value found and what is allowed.
    """
    try:
        config = _adapter(kind).validate_python(value)
    except ValidationError as error:
        lines = [_explain(kind, dict(item), where) for item in error.errors()]
        raise UserError("\n".join(lines)) from None
    _refuse_bool_as_number(value, config, where)
    return config


def _refuse_bool_as_number(value: Any, result: Any, path: str) -> None:
    if isinstance(value, bool) and type(result) in (int, float):
        raise UserError(f"{path} is {value}: a number is needed")
    if isinstance(value, Mapping):
        for key, item in value.items():
            inner = result.get(key) if isinstance(result, Mapping) else getattr(result, key, None)
            _refuse_bool_as_number(item, inner, f"{path}.{key}" if path else key)


def _explain(kind: type, item: dict[str, Any], where: str) -> str:
    location = [part for part in item["loc"] if part != "function-before"]
    path = ".".join([*([where] if where else []), *map(str, location)])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        names = _field_names(_hint_at(kind, location[:-1]))
        return f"unknown setting {path}{suggestion(str(location[-1]), names)}"
    if item["type"] == "value_error":
        return f"{path or kind.__name__}: {item['ctx']['error']}"
    if item["type"] == "missing":
        return f"{path} is missing"
    if item["type"] in ("dataclass_type", "dataclass_exact_type"):
        fields = [f"{path}.{name}" if path else name for name in _field_names(_hint_at(kind, location))]
        own = f" with fields as {fields[0]}" if fields else ""
        return f"{path or kind.__name__} is {item['input']!r}; wanted a JSON object{own}"
    return f"{path} is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _hint_at(hint: Any, location: Sequence[Any]) -> Any:
    for part in location:
        hint = _hint_of(hint, part) if isinstance(part, str) else next(iter(get_args(_parts(hint)[0])), None)
    return hint


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f"the key {key!r} stands twice in one JSON object")
        found[key] = value
    return found


def parse_json(text: str) -> Any:
    """JSON as a person writes it: a key that stands twice is refused; NaN and Infinity stay words."""
    return json.loads(text, parse_constant=lambda word: word, object_pairs_hook=_unique_keys)


def parse_value(text: str) -> Any:
    """The value in ``--set path=value``: JSON where it is JSON, otherwise the text itself.

    UserError for what begins as an object, a list or a quoted text and is none: no setting is meant to begin so.
    """
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        if text.lstrip()[:1] in ("{", "[", '"'):
            raise UserError(f"{text} is no JSON: {error}; a shell takes quotes away unless they are quoted") from None
        return text


def apply_settings(configs: Mapping[str, Any], settings: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the named configurations with ``path = value`` applied, e.g. ("pretrain.num_steps", 10).

    Raises UserError as ``merge_settings``, and for values that the configurations refuse.
    """
    values = merge_settings(configs, settings)
    return {name: from_json(type(config), values[name], where=name) for name, config in configs.items()}


def merge_settings(configs: Mapping[str, Any], settings: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The named configurations as JSON with ``path = value`` applied, whether they are valid or not.

    The first part of a path names the configuration; an object given for a nested one is merged into it.
    Raises UserError for a path that leads nowhere, with a suggestion.
    """
    values = {name: to_json(config) for name, config in configs.items()}
    for path, value in settings:
        name, *rest = path.split(".")
        if name not in configs:
            raise UserError(f"unknown setting {path}{suggestion(name, list(configs))}{_elsewhere(path, values)}")
        if not rest and not isinstance(value, Mapping):
            raise UserError(f"{path} needs a field, as in {path}.FIELD=VALUE, or a JSON object")
        try:
            values[name] = _merged(values[name], rest, value, path, type(configs[name]))
        except UserError as error:
            raise UserError(f"{error}{_elsewhere(path, values)}") from None
    return values


def _elsewhere(path: str, values: Mapping[str, Any]) -> str:
    """Settings of other configurations that end like a path, for one that was looked for in the wrong place."""
    name, last = path.partition(".")[0], "." + path.rpartition(".")[2]
    found = [other for other in flatten(values) if other.endswith(last) and other.partition(".")[0] != name]
    return f" (there is {' and '.join(found[:3])})" if found else ""


def _merged(current: Any, rest: Sequence[str], value: Any, path: str, hint: Any) -> Any:
    """``current``, which is JSON for the type ``hint``, with ``value`` at the path ``rest`` below it."""
    if not rest:
        if isinstance(current, Mapping) and isinstance(value, Mapping) and _values_in(hint) is None:
            inner = {k: _merged(current.get(k), [], v, path, _hint_of(hint, k)) for k, v in value.items()}
            return {**current, **inner}
        return value
    if current is None:
        owner = path.removesuffix("." + ".".join(rest))
        raise UserError(f"{owner} is null, so that {path} leads nowhere; give the whole object: {owner}={{...}}")
    current = _written_out(current, hint)
    is_free = _values_in(hint) is not None
    names = list(current) if isinstance(current, Mapping) and is_free else _field_names(hint)
    may_be_new = is_free and len(rest) == 1 and rest[0]
    if not isinstance(current, Mapping) or not (rest[0] in names or may_be_new):
        raise UserError(f"unknown setting {path}{suggestion(rest[0], names)}")
    return {**current, rest[0]: _merged(current.get(rest[0]), rest[1:], value, path, _hint_of(hint, rest[0]))}


def _written_out(value: Any, hint: Any) -> Any:
    """A free mapping that an earlier setting gave in short, as the objects it stands for; itself if it is not valid."""
    if _values_in(hint) is None:
        return value
    try:
        return to_json(_adapter(hint).validate_python(value))
    except ValidationError:
        return value
