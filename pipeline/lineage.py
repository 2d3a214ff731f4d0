"""What happened to weights, in words: for model cards, reports and the terminal."""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.gguf_header import INSTEAD
from pipeline.hf_directory import ADD_TOKENIZER, EXPORT_AGAIN
from pipeline.weights import Origin

_NAMES = {
    "license": "licence",
    "made": "made anew",
    "copied": "tensors copied",
    "mask_token_id": "mask token",
    "export": "export of this project",
}
"""Names that say more than those of the record do."""
_HASH = re.compile(r"[0-9a-f]{64}")
_WORDS = re.compile(r"[^\W_]+")
_LAYER = re.compile(r"\bblocks\.\d+\.")


def told(origin: Origin, hash_chars: int = 64) -> list[tuple[str, str]]:
    """Names and values of what is known of an origin, on one line each and not escaped; what is empty is left out.

    What others wrote into it, as into the manifest of an export, can be neither more lines nor commands to a terminal;
    names are words.

    Args:
        hash_chars: so many characters of every SHA-256 are shown.
    """
    shown = [(name, _in_words(name, value, hash_chars)) for name, value in origin.details.items()]
    return [(_NAMES.get(name, " ".join(_WORDS.findall(name))), words) for name, words in shown if words]


def on_one_line(text: str) -> str:
    """A text without what moves a cursor, turns the direction of writing, or ends a line."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def tokenizer_remedy(details: Mapping[str, Any]) -> str:
    """What helps where weights were imported without a tokenizer, by the details of their import."""
    if "dequantised_from" in details:
        return INSTEAD
    if "export" in details:
        return EXPORT_AGAIN
    return ADD_TOKENIZER


def tokens_trained(lineage: list[Origin]) -> int:
    """Tokens that weights were trained on, as far as it is known."""
    counts = [origin.details.get("tokens") for origin in lineage if origin.kind == "trained"]
    return sum(number for number in counts if isinstance(number, int))


def _in_words(name: str, value: Any, hash_chars: int) -> str:
    if name == "made" and isinstance(value, dict):
        return _of_each_how(value)
    if name == "left_out" and isinstance(value, list):
        value = [_any_layer(str(one)) for one in value]
    if name.endswith("_id"):  # a number that counts nothing
        value = str(value)
    return _plain(value, hash_chars)


def _plain(value: Any, hash_chars: int) -> str:
    """A JSON value on one line, numbers as they are read."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case dict():
            return ", ".join(f"{on_one_line(key)} {_plain(one, hash_chars)}" for key, one in value.items())
        case list():
            return ", ".join(dict.fromkeys(_plain(one, hash_chars) for one in value))
        case _:
            text = on_one_line(str(value))
            return text[:hash_chars] if _HASH.fullmatch(text) else text


def _of_each_how(made: dict[str, Any]) -> str:
    """Tensors that were made in one way together, those of all layers under one name."""
    names: dict[str, dict[str, None]] = {}
    for tensor, how in made.items():
        names.setdefault(_any_layer(_plain(how, 64)), {})[_any_layer(on_one_line(tensor))] = None
    return "; ".join(f"{' and '.join(tensors)} ({how})" for how, tensors in names.items())


def _any_layer(text: str) -> str:
    return _LAYER.sub("blocks.*.", text)
