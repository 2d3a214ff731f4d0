"""Write each letter of a text to a file of its own."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.stage import StageContext
from tests.support.toy_stages.letters.config import LettersConfig


def run(config: LettersConfig, inputs: Mapping[str, Path], context: StageContext) -> None:
    """Numbered files."""
    for place, letter in enumerate(config.text):
        (context.out / f"{place:03d}.txt").write_text(letter)
