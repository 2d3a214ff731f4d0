"""Unconditional samples with the path from masks to text."""

from dataclasses import dataclass

from pipeline.stage import Stage


@dataclass(frozen=True)
class GenerateConfig:
    """Ancestral sampling."""

    num_samples: int = 4
    length: int = 0
    """Tokens of a sample, at most the seq_len that the model was trained on; 0 takes that."""
    num_steps: int = 96
    temperature: float = 0.9
    noise_seed: int = 0
    num_frames: int = 8
    """Points of the trajectory that are kept, the first all masks and the last the text."""

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ValueError(f"length is {self.length}; it must be 0 or more")
        for name in ("num_samples", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 2 <= self.num_frames <= self.num_steps + 1:
            raise ValueError(f"num_frames is {self.num_frames}; it must lie in [2, num_steps + 1]")


STAGE = Stage(
    name="generate",
    kind="task",
    config=GenerateConfig,
    module="pipeline.generate.run",
    inputs=("weights", "tokenizer"),
    code_version=3,
)
