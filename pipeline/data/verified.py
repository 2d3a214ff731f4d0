"""Files that were hashed and validated, remembered by what they are, for all processes that share a directory."""

import errno
import fcntl
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MAX_AGE_S = 24 * 3600.0
"""Bytes rot without a change of size or time: whoever opens a file later than this checks it again."""
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True)
class Verified:
    """A directory with an empty file for whatever passed, named after paths, sizes, mtimes and inodes."""

    directory: Path

    def once(self, paths: Sequence[Path], expected: str, check: Callable[[], None]) -> None:
        """Call ``check`` unless it has returned within MAX_AGE_S, here or in another process, for the same files.

        A process that comes while another one checks the files waits for it, if the file system has locks.  What
        ``check`` raises is passed on and nothing is remembered.
        """
        record = self.directory / _name(paths, expected)
        if _is_fresh(record):
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with record.with_suffix(".lock").open("w") as lock:
            _wait_for(lock)
            if not _is_fresh(record):
                check()
                record.touch()


def _is_fresh(record: Path) -> bool:
    try:
        age_s = time.time() - record.stat().st_mtime
    except FileNotFoundError:
        return False
    return 0 <= age_s < MAX_AGE_S  # a record from the future would be believed for longer


def _wait_for(lock: IO[str]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _name(paths: Sequence[Path], expected: str) -> str:
    digest = hashlib.sha256(expected.encode())
    for path in paths:
        stat = path.stat()
        digest.update(f"\0{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}".encode())
    return digest.hexdigest()
