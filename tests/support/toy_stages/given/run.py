"""Copy files."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline.artifact import MANIFEST
from pipeline.stage import StageContext
from tests.support.toy_stages.given.config import GivenConfig


def run(config: GivenConfig, inputs: Mapping[str, Path], context: StageContext) -> None:
    """All of a directory but its manifest."""
    shutil.copytree(config.path, context.out, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
