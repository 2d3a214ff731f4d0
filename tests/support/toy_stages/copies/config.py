"""A map over letters, whose shards depend on their own letter alone."""

from pipeline.stage import Stage
from tests.support.toy_stages.trouble import ToyConfig

STAGE = Stage(
    name="toy-copies",
    kind="map",
    config=ToyConfig,
    module="tests.support.toy_stages.copies.run",
    inputs=("letters",),
    cpus=0.5,
)
