"""The files of a source: found, named, identified, and opened only if they are still what was found."""

import fnmatch
import io
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.artifact import file_sha256
from pipeline.corpus.config import HUB_PREFIX, STDLIB, Source, is_url
from pipeline.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".parquet", ".arrow")
_BUFFER_BYTES = 1 << 20
_REMOTE_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "crc32c", "Last-Modified")
"""What object stores and servers call the checksum of a file, or come closest to one with."""


@dataclass(frozen=True)
class SourceFile:
    """One input file: the name it is reported and identified by, where it is now, and what it was when listed."""

    name: str
    url: str
    """A local path, or a URL for fsspec."""
    size_bytes: int
    stamp: str
    """Times of modification and of change in nanoseconds and the inode (a copy may be given the first of them), or the
    tag of a remote file."""


def list_source(name: str, source: Source) -> list[SourceFile]:
    """All files of a source by name, whatever the order of its paths; UserError if one cannot be used."""
    found: dict[str, SourceFile] = {}
    real: dict[str, str] = {}
    for item in source.paths:
        if item.startswith(HUB_PREFIX):
            continue
        for file in _list_remote(item) if is_url(item) else _list_local(item):
            where = file.url if is_url(item) else os.path.realpath(file.url)
            if where in real:
                raise UserError(f"corpus.source.{name}: {where} is reached twice, as {real[where]} and as {file.url}")
            if file.name in found:
                raise UserError(
                    f"corpus.source.{name}: {found[file.name].url} and {file.url} would both be called {file.name}. "
                    'Give the two places names of their own: --set \'corpus.source={"a": "A/", "b": "B/"}\''
                )
            real[where], found[file.name] = file.url, file
    return [found[key] for key in sorted(found, key=lambda key: key.split("/"))]


def _list_local(item: str) -> list[SourceFile]:
    try:
        base, paths = (_stdlib(), list(_stdlib_files())) if item == STDLIB else _find(Path(item))
        files = [_local_file(path.relative_to(base).as_posix(), path) for path in sorted(paths)]
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"corpus.source: {item!r} cannot be read: {error}") from None
    return _known_only(item, files)


def _known_only(item: str, files: list[SourceFile]) -> list[SourceFile]:
    if not files:
        raise UserError(f"corpus.source: {item!r} holds no file of a known kind ({' '.join(SUFFIXES)})")
    if unknown := [file.url for file in files if not file.name.endswith(SUFFIXES)]:
        raise UserError(f"corpus.source: {unknown[0]} is of no known kind ({' '.join(SUFFIXES)})")
    return files


def _local_file(name: str, path: Path) -> SourceFile:
    stat = path.stat()
    return SourceFile(name, str(path), stat.st_size, f"{stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}")


def _find(path: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files of a path or glob."""
    if path.is_dir():
        return path, list(_walk(path))
    if path.is_file():
        return path.parent, [path]
    patterned = [number for number, part in enumerate(path.parts) if set(part) & set("*?[")]
    if not patterned:
        raise UserError(
            f"corpus.source: there is no file or folder {str(path)!r}. Give a path, a glob, {STDLIB!r}, or "
            f"{HUB_PREFIX}NAME for a dataset of the Hugging Face hub"
        )
    base = Path(*path.parts[: patterned[0]])
    found = {p for p in _matches(base, path.parts[patterned[0] :]) if p.is_file()}
    for file in found:
        _refuse_outside(base, file)
    return base, list(found)


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """What ``Path.glob`` finds, but for folders that cannot be read: it leaves them out and says nothing."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        if rest:
            yield from _matches(folder, rest)
        for inner in _entries(folder):
            if inner.is_dir() and not inner.is_symlink():
                yield from _matches(inner, parts)
        return
    if set(part) & set("*?["):
        found = [inner for inner in _entries(folder) if fnmatch.fnmatchcase(inner.name, part)]
    else:
        found = [folder / part]
    for inner in found:
        if not rest:
            yield inner
        elif inner.is_dir():
            yield from _matches(inner, rest)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        _refuse_unreadable(error)
        raise


def _refuse_unreadable(error: OSError) -> None:
    raise UserError(
        f"corpus.source: the folder {error.filename} cannot be read: {error.strerror}. Without it the corpus would be "
        "incomplete: give the right to read it, or name the folders beside it"
    ) from None


def _walk(root: Path) -> Iterator[Path]:
    """Files of a known kind below a folder; hidden ones, and stores of runs and artifacts, are left out."""
    for folder, subfolders, names in os.walk(root, onerror=_refuse_unreadable):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and not _is_store(here / name)]
        for link in [here / name for name in subfolders if (here / name).is_symlink()]:
            _refuse_outside(root, link)
            raise UserError(
                f"corpus.source: the link {link} leads to {os.path.realpath(link)}, so that its files would be read "
                "twice or for ever. Remove the link"
            )
        for path in [here / name for name in names if name.endswith(SUFFIXES) and not name.startswith(".")]:
            if path.is_symlink():
                _refuse_outside(root, path)
            if path.is_file():
                yield path


def _refuse_outside(root: Path, path: Path) -> None:
    """A link in a folder may not bring in what the folder does not hold."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"corpus.source: the link {path} leads nowhere: {error}. Remove it") from None
    if not real.is_relative_to(root.resolve()):
        raise UserError(
            f"corpus.source: the link {path} leads to {real}, outside {root}. Name that place in corpus.source "
            "itself, or remove the link"
        )


def _is_store(folder: Path) -> bool:
    return (folder / "artifacts").is_dir() and (folder / "runs").is_dir()


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> Iterator[Path]:
    for folder, subfolders, names in os.walk(_stdlib(), onerror=_refuse_unreadable):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages", "__pycache__")]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


# Remote files


def _open_file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"corpus.source: {url} cannot be opened: {error}") from None


def _list_remote(url: str) -> list[SourceFile]:
    try:
        fs, path = _open_file_system(url)
        if set(path) & set("*?["):
            parts = path.split("/")
            base = "/".join(parts[: next(i for i, part in enumerate(parts) if set(part) & set("*?["))])
            found = fs.glob(path, detail=True)
        elif fs.isdir(path):
            base, found = path, fs.find(path, detail=True)
            found = {key: info for key, info in found.items() if _is_shown(key.removeprefix(base))}
        else:
            base, found = path.rpartition("/")[0], {path: fs.info(path)}
        files = [
            _remote_file(key.removeprefix(base).lstrip("/"), fs.unstrip_protocol(key), fs, key, info)
            for key, info in found.items()
            if info["type"] == "file"
        ]
    except UserError:
        raise
    except FileNotFoundError as error:
        why = f" ({error.__cause__})" if error.__cause__ else ""
        raise UserError(
            f"corpus.source: there is no file or folder {url!r}{why}. Check the URL and who may read it"
        ) from None
    except Exception as error:  # noqa: BLE001 - the errors of the many file systems have no class in common
        raise UserError(
            f"corpus.source: {url!r} cannot be read: {type(error).__name__}: {error}. Check the URL, the network and "
            "who may read it"
        ) from None
    return _known_only(url, files)


def _remote_file(name: str, url: str, fs: Any, path: str, info: Mapping[str, Any]) -> SourceFile:
    if info["size"] is None:
        raise UserError(
            f"corpus.source: {url} has no known size, so that it could not be seen whether it is whole. "
            "Download it and name the file"
        )
    return SourceFile(name, url, info["size"], _tag(fs, path, info))


def _is_shown(relative: str) -> bool:
    hidden = any(part.startswith(".") for part in relative.split("/"))
    return not hidden and relative.endswith(SUFFIXES)


def _tag(fs: Any, path: str, info: Mapping[str, Any]) -> str:
    for name in _REMOTE_TAGS:
        if info.get(name):
            return f"{name}={info[name]}"
    return f"ukey={fs.ukey(path)}"


# Both


def content_of(file: SourceFile) -> str:
    """What identifies the bytes of a file: SHA-256 of a local one, size and tag of a remote one."""
    if is_url(file.url):
        return f"{file.size_bytes} {file.stamp}"
    try:
        return file_sha256(Path(file.url))
    except OSError as error:
        raise UserError(f"corpus.source: {file.url} cannot be read: {error.strerror}") from None


def refuse_changed(file: SourceFile) -> None:
    """UserError if a file is no longer what it was when it was listed; ConnectionError if its host does not answer."""
    try:
        now = _remote_now(file) if is_url(file.url) else _local_file(file.name, Path(file.url))
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{file.url} cannot be read any more: {error}") from None
    if now != file:
        raise UserError(
            f"{file.url} has changed since the run was planned ({file.size_bytes} bytes then, {now.size_bytes} now). "
            "Start a new run once it is complete"
        )


def _remote_now(file: SourceFile) -> SourceFile:
    with _passing(file):
        fs, path = _open_file_system(file.url)
        fs.invalidate_cache(path)
        return _remote_file(file.name, file.url, fs, path, fs.info(path))


@contextmanager
def _passing(file: SourceFile) -> Iterator[None]:
    """Turns what a remote file system raises into ConnectionError, which may pass: the file was there when the run was
    planned.  A file that is gone or closed stays FileNotFoundError or PermissionError.
    """
    try:
        yield
    except FileNotFoundError as error:
        if error.__cause__ is None or 400 <= getattr(error.__cause__, "status", 0) < 500:
            raise
        raise _no_answer(file, error.__cause__) from error
    except (UserError, PermissionError):
        raise
    except Exception as error:
        raise _no_answer(file, error) from error


def _no_answer(file: SourceFile, error: BaseException) -> ConnectionError:
    return ConnectionError(f"{file.url} cannot be reached: {type(error).__name__}: {error}")


def open_source(file: SourceFile) -> BinaryIO:
    """The bytes of a file that is unchanged; buffered."""
    refuse_changed(file)
    if not is_url(file.url):
        return Path(file.url).open("rb", buffering=_BUFFER_BYTES)
    with _passing(file):
        fs, path = _open_file_system(file.url)
        return io.BufferedReader(fs.open(path, "rb"), _BUFFER_BYTES)
