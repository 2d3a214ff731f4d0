"""Whether a training and the weights that it is given are of one architecture: as far as a plan can know, and later."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlm_core.models.config import Architecture, MoE
from dlm_core.upcycling import upcycled
from pipeline.config import diff, from_json, to_json
from pipeline.errors import UserError
from pipeline.hf_config import CONFIG
from pipeline.hf_directory import read_directory

_SHOWN = 6


def architecture_setting(architecture: Architecture, step: str = "pretrain") -> str:
    """``pretrain.architecture={...}`` with every field, which replaces whatever a recipe has."""
    return f"{step}.architecture={json.dumps(to_json(architecture), separators=(',', ':'))}"


def check_same_architecture(wanted: Architecture, found: Architecture, name: str, step: str = "pretrain") -> None:
    """UserError naming every field that differs; how weights were once drawn may."""
    differing = diff(*(to_json(replace(a, head_dim=a.head_size, num_kv_heads=a.kv_heads)) for a in (found, wanted)))
    shown = [
        f"{field} is {there!r} there and {here!r} here"
        for field, (there, here) in differing.items()
        if field not in ("init", "init_std")
    ]
    if shown:
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        raise UserError(
            f"{step}.architecture is not that of the weights {name}: {'; '.join(shown[:_SHOWN])}{more}. Set it to "
            f"theirs: --set {shlex.quote(architecture_setting(found, step))}"
        )


def check_planned_architecture(wanted: Architecture, upstream: Mapping[str, Any], step: str) -> None:
    """UserError if the weights that a workflow would give are known to be of another architecture.

    They are if it trains them itself, or if their config.json is on this machine.
    """
    for path in ("init", "init.weights"):
        found, name = _planned(upstream, path)
        if found is not None:
            given = upstream["init"].get("upcycle")
            try:
                found = found if given is None else upcycled(found, from_json(MoE, given))
            except ValueError as error:
                raise UserError(f"the first weights of {step} cannot be upcycled: {error}") from None
            check_same_architecture(wanted, found, name, step)


def _planned(upstream: Mapping[str, Any], path: str) -> tuple[Architecture | None, str]:
    """The architecture that an input will have, and what it is called; None where that is not known yet."""
    made, training = upstream.get(path, {}), upstream.get(f"{path}.pretrain", {})
    if "architecture" in training:
        trained = from_json(Architecture, training["architecture"])
        rope_base = [None, *(phase["rope_base"] for phase in training["phases"].values())][-1]
        trained = trained if rope_base is None else replace(trained, rope_base=rope_base)
        return trained, "that the workflow trains before"
    directory = planned_directory(made)
    if directory is None:
        return None, ""
    return read_directory(directory).model.architecture, f"in {made['path']}"


def planned_directory(imported: Mapping[str, Any]) -> Path | None:
    """The directory that an import will read its config.json from, if it is on this machine; None for a GGUF file."""
    if "gguf_file" not in imported or imported["gguf_file"] or not imported["path"]:
        return None
    directory = Path(imported["path"])
    return directory if (directory / CONFIG).is_file() else None
