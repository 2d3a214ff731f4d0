"""Text to measure on: the files given, or the sources of Python's standard library and of installed packages."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIXES = (".py", ".txt", ".md")
"""What is read of a folder."""


def read_text(paths: Sequence[Path], num_bytes: int) -> bytes:
    """The first ``num_bytes`` bytes of the files in sorted order; ValueError if there are fewer."""
    text = bytearray()
    for path in _files(paths) if paths else _standard_library():
        text += path.read_bytes()
        if len(text) >= num_bytes:
            return bytes(text[:num_bytes])
    where = " ".join(map(str, paths)) or "the standard library"
    raise ValueError(f"{where} has {len(text)} bytes of text; {num_bytes} are needed. Give more files to --text")


def read_documents(paths: Sequence[Path], num_bytes: int) -> Iterator[str]:
    """Files as documents, in a fixed mixed order, until they have ``num_bytes`` bytes; ValueError if there are fewer.

    By default the standard library and the Python sources and Markdown of the packages installed beside it.  Left out
    is what is no UTF-8, is blank or has come before.
    """
    remaining = num_bytes
    seen: set[bytes] = set()
    found = list(_files(paths)) if paths else [*_standard_library(), *_packages()]
    for path in sorted(found, key=_place):
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen or not _is_text(content):
            continue
        seen.add(digest)
        yield content.decode()
        remaining -= len(content)
        if remaining <= 0:
            return
    where = " ".join(map(str, paths)) or "the standard library with the installed packages"
    raise ValueError(
        f"{where} has {num_bytes - remaining} bytes of documents; {num_bytes} are needed. Give more files to --text"
    )


def _place(path: Path) -> bytes:
    """A place in the order that does not depend on where the folders lie."""
    return hashlib.sha256("/".join(path.parts[-3:]).encode()).digest()


def _is_text(content: bytes) -> bool:
    try:
        return bool(content.decode().strip())
    except UnicodeDecodeError:
        return False


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from (p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file())
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"--text: there is no file or folder {str(path)!r}")


def _standard_library() -> Iterator[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = set(folders) - {"site-packages", "dist-packages"}  # which may hold a hundred times as much
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    yield from sorted(found)


def _packages() -> Iterator[Path]:
    root = Path(sysconfig.get_path("purelib"))
    yield from (p for p in sorted(root.rglob("*")) if p.suffix in (".py", ".md") and p.is_file())
