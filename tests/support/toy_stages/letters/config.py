"""A task that makes one file for each letter."""

from dataclasses import dataclass

from pipeline.stage import Stage
from tests.support.toy_stages.trouble import ToyConfig


@dataclass(frozen=True)
class LettersConfig(ToyConfig):
    """What to write."""

    text: str = "abc"


STAGE = Stage(
    name="toy-letters", kind="task", config=LettersConfig, module="tests.support.toy_stages.letters.run", cpus=0.5
)
