"""Conversions as programs of their own; each ends with a line of its peak of resident memory, in bytes.

Whatever is imported here counts, so that it is what the conversion needs.
"""

import re
import sys
from pathlib import Path

from pipeline.stage import Stage, main


def from_interchange(config: str, out: str, source: str) -> None:
    """The stage ``export``, as it runs alone: our file into another project's."""
    from pipeline.export.config import STAGE

    _run(STAGE, config, out, "--input", f"weights={source}")


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


def tell_peak() -> None:
    """Print the most memory that this process ever had resident, as the kernel keeps it."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    print(int(found[1]) << 10)
