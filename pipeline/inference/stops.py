"""Where a text ends that a model wrote on."""

from collections.abc import Sequence


def before_stops(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the strings that end it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
