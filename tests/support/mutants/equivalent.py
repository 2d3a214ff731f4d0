"""Mutants that no test can catch, each with the reason why nothing computed differs."""

EQUIVALENT: dict[tuple[str, str, str], str] = {}
"""(module, text of the line before, text after) -> the reason."""
