"""Regenerate the golden losses, after a change that is meant to change them:  python -m tests.support.golden.

The difference belongs in the review of that change, with the reason.
"""

import tempfile
from pathlib import Path

from pipeline.artifact import write_json
from tests.support.tiny_run import losses, make_artifacts, pretrain, tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "pretrain_tiny.json"


def main() -> None:
    """Train the tiny model and write its losses."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        found = losses(pretrain(tiny(), make_artifacts(root), root / "pretrain"))
    write_json(GOLDEN, {"losses": found})
    print(f"{GOLDEN}: {len(found)} losses, from {found[0]:.4f} to {found[-1]:.4f}")  # noqa: T201


if __name__ == "__main__":
    main()
