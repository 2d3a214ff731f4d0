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
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import UserError

T = TypeVar("T")

_STRICT = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)


def execution(default: Any) -> Any:
    """A field that changes how a stage runs, not what it should produce: left out of the fingerprint."""
    return dataclasses.field(default=default, metadata={"execution": True})


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
    """Value of a field; ``1`` in a float field is 1.0, as it is after a round trip through JSON."""
    value = getattr(config, field.name)
    return float(value) if field.type is float and type(value) is int else value


def identity(config: Any) -> Any:
    """Like ``to_json``, without the fields declared by ``execution``."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            f.name: identity(_field_value(config, f))
            for f in dataclasses.fields(config)
            if not f.metadata.get("execution")
        }
    if isinstance(config, tuple | list):
        return [identity(item) for item in config]
    return to_json(config)


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value (sorted keys, no spaces); unknown types raise TypeError."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested JSON objects as {dotted path: leaf}."""
    if not isinstance(value, Mapping):
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
def _adapter(kind: type) -> TypeAdapter[Any]:
    for nested in [kind, *_nested_dataclasses(kind)]:
        nested.__pydantic_config__ = _STRICT  # pyright: ignore[reportAttributeAccessIssue]
    return TypeAdapter(kind)


def _nested_dataclasses(kind: type) -> list[type]:
    found: list[type] = []
    pending = list(get_type_hints(kind).values())
    while pending:
        part = pending.pop()
        pending += getattr(part, "__args__", ())
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            found += [part, *_nested_dataclasses(part)]
    return found


def _suggestion(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; allowed here: {', '.join(allowed)}"


def _field_names(kind: type, path: Sequence[Any]) -> list[str]:
    """Names of the fields of the dataclass that ``path`` leads to, from ``kind`` down."""
    for part in path:
        if not isinstance(part, str):
            continue
        hint = get_type_hints(kind).get(part)
        candidates = (hint, *getattr(hint, "__args__", ()))
        nested = [c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)]
        if nested:
            kind = nested[0]
    return [f.name for f in dataclasses.fields(kind)]


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
    if isinstance(value, Mapping) and dataclasses.is_dataclass(result):
        for key, item in value.items():
            _refuse_bool_as_number(item, getattr(result, key), f"{path}.{key}" if path else key)


def _explain(kind: type, item: dict[str, Any], where: str) -> str:
    location = [part for part in item["loc"] if part != "function-before"]
    path = ".".join([*([where] if where else []), *map(str, location)])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        names = _field_names(kind, location[:-1])
        return f"unknown setting {path}{_suggestion(str(location[-1]), names)}"
    if item["type"] == "value_error":
        return f"{path or kind.__name__}: {item['ctx']['error']}"
    if item["type"] == "missing":
        return f"{path} is missing"
    return f"{path} is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


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
    """The value in ``--set path=value``: JSON where it is JSON, otherwise the text itself."""
    try:
        return parse_json(text)
    except json.JSONDecodeError:
        return text


def apply_settings(configs: Mapping[str, Any], settings: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the named configurations with ``path = value`` applied, e.g. ("pretrain.num_steps", 10).

    The first part of a path names the configuration; an object given for a nested one is merged into it.
    Raises UserError for a path that leads nowhere, with a suggestion.
    """
    values = {name: to_json(config) for name, config in configs.items()}
    for path, value in settings:
        name, *rest = path.split(".")
        if name not in configs:
            raise UserError(f"unknown setting {path}{_suggestion(name, list(configs))}")
        if not rest and not isinstance(value, Mapping):
            raise UserError(f"{path} needs a field, as in {path}.FIELD=VALUE, or a JSON object")
        values[name] = _merged(values[name], rest, value, path, type(configs[name]))
    return {name: from_json(type(config), values[name], where=name) for name, config in configs.items()}


def _merged(current: Any, rest: Sequence[str], value: Any, path: str, kind: type) -> Any:
    if not rest:
        if isinstance(current, Mapping) and isinstance(value, Mapping):
            return {**current, **{k: _merged(current.get(k), [], v, path, kind) for k, v in value.items()}}
        return value
    if current is None:
        owner = path.removesuffix("." + ".".join(rest))
        raise UserError(f"{owner} is null, so that {path} leads nowhere; give the whole object: {owner}={{...}}")
    if not isinstance(current, Mapping) or rest[0] not in current:
        names = list(current) if isinstance(current, Mapping) else _field_names(kind, [])
        raise UserError(f"unknown setting {path}{_suggestion(rest[0], names)}")
    return {**current, rest[0]: _merged(current[rest[0]], rest[1:], value, path, kind)}
