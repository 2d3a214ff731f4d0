"""The code that a run was submitted with."""

import zipfile
from pathlib import Path

from workflows.store import RunPlace, Store

PACKAGES = ("dlm_core", "pipeline", "workflows", "cluster")


def code_archive(store: Store, run: RunPlace, folder: Path) -> Path:
    """An archive of the packages in a folder of this machine."""
    root = Path(__file__).parents[1]
    target = folder / "code.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for package in PACKAGES:
            for path in sorted((root / package).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    archive.write(path, path.relative_to(root).as_posix())
    return target
