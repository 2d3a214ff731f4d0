"""Whether a training and the weights that it is given are of one architecture: as far as a plan can know, and later."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlm_core.models.config import Architecture, MoE
from dlm_core.upcycling import upcycled
from pipeline.config import diff, from_json, to_json
from pipeline.errors import UserError
from pipeline.hf_config import read_config

_SHOWN = 6


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
            f"{step}.architecture is not that of the weights {name}: {'; '.join(shown[:_SHOWN])}{more}. Set "
            f"{step}.architecture to theirs (dlm inspect prints it as a setting)"
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
    made = upstream.get(path, {})
    if "architecture" in upstream.get(f"{path}.pretrain", {}):
        trained = upstream[f"{path}.pretrain"]["architecture"]
        return from_json(Architecture, trained), "that the workflow trains before"
    file = Path(made.get("path") or "", "config.json")
    if "gguf_file" not in made or not made["path"] or not file.is_file():
        return None, ""
    return read_config(json.loads(file.read_bytes())).model.architecture, f"in {made['path']}"
