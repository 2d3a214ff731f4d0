"""Conversions as programs of their own; each ends with a line of its peak of resident memory, in bytes.

Whatever is imported here counts, so that it is what the conversion needs.
"""

import json
import re
import sys
from pathlib import Path

from dlm_core.models.config import ModelConfig
from pipeline.config import from_json
from pipeline.hf_names import Family
from pipeline.repack import check_round_trip, write_theirs
from pipeline.stage import Stage, main
from pipeline.tensor_files import TensorFiles
from pipeline.weights import WEIGHTS_FILE


def from_interchange(family: Family, model: str, ours: str, theirs: str) -> None:
    """Our file into another project's, and the proof that they are the same numbers."""
    config, source = _model(model), TensorFiles([Path(ours) / WEIGHTS_FILE])
    paths = write_theirs(family, config, source, Path(theirs), "BF16", shard_bytes=500_000_000)
    check_round_trip(family, config, source, TensorFiles(paths))
    tell_peak()


def to_interchange(config: str, out: str) -> None:
    """The stage ``import_checkpoint``, as it runs alone: another project's files into ours."""
    from pipeline.import_checkpoint.config import STAGE

    _run(STAGE, config, out)


def from_training(config: str, out: str, source: str) -> None:
    """The stage ``convert``, as it runs alone."""
    from pipeline.convert.config import STAGE

    _run(STAGE, config, out, "--input", f"pretrain={source}")


def _run(stage: Stage, config: str, out: str, *options: str) -> None:
    file = Path(out).with_suffix(".json")
    file.write_text(config)
    sys.argv = [stage.name, "--config", str(file), *options, "--out", out]
    main(stage)
    tell_peak()


def _model(path: str) -> ModelConfig:
    return from_json(ModelConfig, json.loads(Path(path).read_text()))


def tell_peak() -> None:
    """Print the most memory that this process ever had resident, as the kernel keeps it."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    print(int(found[1]) << 10)
