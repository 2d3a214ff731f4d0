"""A map over three shards."""

from pipeline.stage import Stage
from tests.support.toy_stages.trouble import ToyConfig

STAGE = Stage(
    name="toy-double",
    kind="map",
    config=ToyConfig,
    module="tests.support.toy_stages.double.run",
    inputs=("value",),
    cpus=0.5,
)
