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
from pipeline.repack import check_round_trip, write_ours, write_theirs
from pipeline.tensor_files import TensorFiles
from pipeline.weights import WEIGHTS_FILE


def to_interchange(family: Family, model: str, theirs: str, ours: str) -> None:
    """Another project's files into ours, and the proof that they are the same bits."""
    config, source = _model(model), TensorFiles(sorted(Path(theirs).glob("*.safetensors")))
    write_ours(family, config, source, Path(ours) / WEIGHTS_FILE)
    check_round_trip(family, config, TensorFiles([Path(ours) / WEIGHTS_FILE]), source)
    tell_peak()


def from_interchange(family: Family, model: str, ours: str, theirs: str) -> None:
    """Our file into another project's, and the proof that they are the same numbers."""
    config, source = _model(model), TensorFiles([Path(ours) / WEIGHTS_FILE])
    paths = write_theirs(family, config, source, Path(theirs), "BF16", shard_bytes=500_000_000)
    check_round_trip(family, config, source, TensorFiles(paths))
    tell_peak()


def from_training(config: str, source: str, out: str) -> None:
    """The stage, as it runs alone."""
    from pipeline.convert.config import STAGE
    from pipeline.stage import main

    file = Path(out).with_suffix(".json")
    file.write_text(config)
    sys.argv = ["convert", "--config", str(file), "--input", f"pretrain={source}", "--out", out]
    main(STAGE)
    tell_peak()


def _model(path: str) -> ModelConfig:
    return from_json(ModelConfig, json.loads(Path(path).read_text()))


def tell_peak() -> None:
    """Print the most memory that this process ever had resident, as the kernel keeps it."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    print(int(found[1]) << 10)
