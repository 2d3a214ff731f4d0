"""Text to measure on: the files given, or the sources of Python's standard library."""

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIXES = (".py", ".txt", ".md")
"""What is read of a folder."""


def read_text(paths: Sequence[Path], num_bytes: int) -> bytes:
    """The first ``num_bytes`` bytes of the files in sorted order; ValueError if there are fewer."""
    text = bytearray()
    for path in _files(paths):
        text += path.read_bytes()
        if len(text) >= num_bytes:
            return bytes(text[:num_bytes])
    where = " ".join(map(str, paths)) or "the standard library"
    raise ValueError(f"{where} has {len(text)} bytes of text; {num_bytes} are needed. Give more files to --text")


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    if not paths:
        root = Path(sysconfig.get_path("stdlib"))
        for path in sorted(root.rglob("*.py")):
            if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts):
                yield path
    for path in paths:
        if path.is_dir():
            yield from (p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file())
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"--text: there is no file or folder {str(path)!r}")
