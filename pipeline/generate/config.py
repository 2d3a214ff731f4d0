"""Samples of a model with the path from masks to text."""

from dataclasses import dataclass

from pipeline.config import execution
from pipeline.inference.sampling import SamplingConfig
from pipeline.stage import Stage


@dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    """Rows drawn from nothing but masks, or behind prompts."""

    num_samples: int = 4
    """Of each prompt, if there are prompts."""
    length: int = 0
    """Tokens that are drawn for a sample, with its prompt at most the seq_len that the model was trained on; 0 takes
    what that leaves."""
    prompts: tuple[str, ...] = ()
    """Texts that samples begin with; from their left goes what leaves no room for ``length``."""
    num_frames: int = 8
    """Points of the trajectory that are kept, the first all masks and the last the text."""
    device: str = execution("auto")
    """auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 0:
            raise ValueError(f"length is {self.length}; it must be 0 or more")
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; it must be at least 1")
        if self.num_frames < 2:
            raise ValueError(f"num_frames is {self.num_frames}; it must be at least 2")


STAGE = Stage(
    name="generate",
    kind="task",
    config=GenerateConfig,
    module="pipeline.generate.run",
    inputs=("weights", "tokenizer"),
    code_version=6,
)
