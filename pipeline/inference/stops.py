"""Where a text ends that a model wrote on."""

from collections.abc import Sequence


def before_end(ids: Sequence[int], eos_token_id: int) -> list[int]:
    """Drawn tokens up to the first that ends the text: what is drawn behind it, or filled in, is no part of it."""
    return list(ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids)


def before_stops(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the strings that end it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
