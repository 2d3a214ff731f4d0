"""Rotary parameters of a config.json <-> ours: two keys beside each other in transformers 4, one object in 5.

Details that rope.py doesn't compute are refused by name.  Formulas: transformers' modeling_rope_utils.py.
"""

import math
from collections.abc import Mapping
from typing import Any

from dlm_core.models.config import RopeScaling
from pipeline.config import from_json, to_json
from pipeline.errors import UserError
from pipeline.hf_names import Family


def read_rope(family: Family, config: Mapping[str, Any], seq_len: int) -> dict[str, Any]:
    """rope_base, rope_fraction and rope_scaling of either spelling."""
    given = {name: config[name] for name in ("rope_scaling", "rope_parameters") if config.get(name)}
    for name, value in given.items():
        if not isinstance(value, Mapping):
            raise UserError(f"config.json: {name} is {value!r}; an object is wanted")
    if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        raise UserError("config.json: rope_scaling and rope_parameters differ; leave one of them out")
    rope = dict(next(iter(given.values()), {}))
    rope = dict(rope["full_attention"]) if isinstance(rope.get("full_attention"), Mapping) else rope
    for name, value in rope.items():
        if name not in ("rope_type", "type") and not isinstance(value, int | float | None):
            raise UserError(f"config.json: the rotary parameter {name} is {value!r}; it is not known here")
    base = _either(config, rope, "rope_theta", 10_000.0)
    fraction = _either(config, rope, "partial_rotary_factor", 0.5 if family == "llada2" else 1.0)
    if family != "llada2" and fraction != 1:
        raise UserError(f'config.json: partial_rotary_factor is {fraction}; of "{family}" only 1 is computed here')
    scaling = _rope_scaling(rope, seq_len)
    return {"rope_base": base, "rope_fraction": fraction, "rope_scaling": scaling and to_json(scaling)}


def _either(config: Mapping[str, Any], rope: dict[str, Any], name: str, default: float) -> Any:
    inner, outer = rope.pop(name, None), config.get(name)
    if inner is not None and outer is not None and inner != outer:
        raise UserError(f"config.json: {name} is {outer} and, with the other rotary parameters, {inner}; correct one")
    return next((value for value in (inner, outer) if value is not None), default)


_RAMPS = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}
"""Their names of our low_factor and high_factor."""


def _rope_scaling(rope: dict[str, Any], seq_len: int) -> RopeScaling | None:
    """The stretch that a dictionary without rope_theta tells, taken apart until nothing is left that is not known."""
    kind = {rope.pop(name) for name in ("rope_type", "type") if name in rope} or {"default"}
    if len(kind) > 1 or not kind <= {"default", "linear", *_RAMPS}:
        raise UserError(
            f"config.json: the rope_type is {' and '.join(map(repr, sorted(kind)))}; default, linear, llama3 and yarn "
            "are computed here"
        )
    (name,) = kind
    values: dict[str, Any] = {}
    if name != "default":
        values["factor"] = _needed(rope, "factor", name)
    if name == "yarn":
        values |= {"low_factor": rope.pop("beta_slow", None) or 1.0, "high_factor": rope.pop("beta_fast", None) or 32.0}
        values["original_seq_len"] = rope.pop("original_max_position_embeddings", None) or seq_len
        _check_yarn(rope, values["factor"])
    if name == "llama3":
        low, high = (_needed(rope, key, name) for key in _RAMPS["llama3"])
        values |= {"low_factor": low, "high_factor": high}
        values["original_seq_len"] = _needed(rope, "original_max_position_embeddings", name)
    if left := [key for key in rope if rope[key] is not None]:
        raise UserError(f'config.json: the rotary parameter {left[0]} is {rope[left[0]]!r}; "{name}" has none here')
    if name == "default" or values["factor"] == 1:  # stretched by 1 is not stretched
        return None
    return from_json(RopeScaling, {"kind": name, **values}, where="config.json: rope_scaling")


def _needed(rope: dict[str, Any], key: str, name: str) -> Any:
    if rope.get(key) is None:
        raise UserError(f'config.json: the rotary parameter {key} is missing, which "{name}" needs')
    return rope.pop(key)


def _check_yarn(rope: dict[str, Any], factor: float) -> None:
    """UserError for details of YaRN that rope.py doesn't have."""
    wanted = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    attention = rope.pop("attention_factor", None)
    if attention is not None and not math.isclose(attention, wanted, rel_tol=1e-6):
        raise UserError(
            f"config.json: the rotary parameter attention_factor is {attention}; only 0.1 ln(factor) + 1 = "
            f"{wanted:.6g} is computed here"
        )
    if rope.pop("truncate", None) is False:
        raise UserError("config.json: the rotary parameter truncate is False; only True is computed here")


def their_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """``rope_scaling`` of a config.json in the spelling that every version reads."""
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_seq_len
        values |= zip(_RAMPS[scaling.kind], (scaling.low_factor, scaling.high_factor), strict=True)
    return values
