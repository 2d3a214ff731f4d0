"""Where no namespace takes everything with it: processes and files that a program leaves behind."""

import contextlib
import os
import secrets
import signal
import stat
import time
from pathlib import Path

_SWEEP_S = 10.0


def tasks_of_user(uid: int) -> int:
    """Processes and threads that a user has now."""
    count = 0
    for process in _processes():
        try:
            if os.stat(f"/proc/{process}").st_uid == uid:
                count += len(os.listdir(f"/proc/{process}/task"))
        except OSError:  # it has ended
            continue
    return count


def kill_user(uid: int) -> None:
    """Kill all processes of a user at once, as root."""
    child = os.fork()
    if not child:
        try:
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def kill_descendants() -> None:
    """Kill all descendants of this process, which adopts orphans, and wait for them.

    All are stopped before one is killed: what is stopped forks no more and still counts as a process.
    """
    deadline = time.monotonic() + _SWEEP_S
    stopped: set[int] = set()
    while time.monotonic() < deadline:
        found = _descendants(os.getpid()) - stopped
        if not found:
            break
        for pid in found:
            _signal(pid, signal.SIGSTOP)
        stopped |= found
    while time.monotonic() < deadline:
        for pid in _descendants(os.getpid()):
            _signal(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()] if os.path.isdir("/proc/self") else []


def _descendants(ancestor: int) -> set[int]:
    parents: dict[int, int] = {}
    for process in _processes():
        try:
            fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:  # it has ended
            continue
        if fields[0] != b"Z":
            parents[int(process)] = int(fields[1])
    found: set[int] = set()
    grown = {ancestor}
    while grown:
        grown = {pid for pid, parent in parents.items() if parent in grown}
        found |= grown
    return found


def delete_tree(folder: Path) -> None:
    """Delete a folder whatever is in it: neither its depth nor the length of a path matters, nor missing rights.

    What lies in a subfolder is moved up until there are no subfolders.
    """
    mark = secrets.token_hex(8)
    number = 0
    _open_up(folder)
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            _open_up(entry.path)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    _open_up(inner.path)
                os.rename(inner.path, folder / f"{mark}{number}")
                number += 1
            os.rmdir(entry.path)
    os.rmdir(folder)


def _open_up(folder: Path | str) -> None:
    os.chmod(folder, stat.S_IRWXU)
