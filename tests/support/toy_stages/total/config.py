"""A gang of ranks that need each other."""

from pipeline.stage import Stage
from tests.support.toy_stages.trouble import ToyConfig

STAGE = Stage(
    name="toy-total",
    kind="gang",
    config=ToyConfig,
    module="tests.support.toy_stages.total.run",
    inputs=("value", "aside"),
    cpus=0.5,
)
