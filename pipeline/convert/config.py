"""Training checkpoint to portable weights."""

from dataclasses import dataclass

from pipeline.stage import Stage


@dataclass(frozen=True)
class ConvertConfig:
    """Nothing to choose yet: float32 masters to safetensors."""


STAGE = Stage(
    name="convert",
    kind="task",
    config=ConvertConfig,
    module="pipeline.convert.run",
    inputs=("pretrain",),
)
