"""Files that were hashed and validated, remembered by what they are, for all processes that share a directory."""

import fcntl
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Verified:
    """A directory with an empty file for whatever passed, named after paths, sizes, mtimes and inodes."""

    directory: Path

    def once(self, paths: Sequence[Path], expected: str, check: Callable[[], None]) -> None:
        """Call ``check`` unless it has returned before, here or in another process, for the same files and expectation.

        A process that comes while another one checks the files waits for it.  What ``check`` raises is passed on and
        nothing is remembered.
        """
        record = self.directory / _name(paths, expected)
        if record.exists():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with record.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not record.exists():
                check()
                record.touch()


def _name(paths: Sequence[Path], expected: str) -> str:
    digest = hashlib.sha256(expected.encode())
    for path in paths:
        stat = path.stat()
        digest.update(f"\0{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}".encode())
    return digest.hexdigest()
