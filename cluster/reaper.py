"""A process that outlives the coordinator by a moment: it ends what an embedded Ray leaves behind.

When a driver is killed, Ray's workers go with it, but some of its agents take a minute to notice.  The reaper keeps
a list of the driver's descendants and, when the driver is gone without a word, kills those that are left.
"""

import contextlib
import os
import re
import select
import subprocess
import sys
import time

import psutil

_LOOK_EVERY_S = 0.5
_SWEEPS = 3
"""A Ray that is dying may still start a process."""


def start_reaper() -> "subprocess.Popen[bytes]":
    """Start a reaper for this process; write a byte to its standard input to send it home."""
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.reaper", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def dismiss_reaper(reaper: "subprocess.Popen[bytes]") -> None:
    """Tell a reaper that everything ended well."""
    reaper.communicate(b"q")


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _of_session(driver: int) -> list[psutil.Process]:
    """Processes of the Ray that a driver started, by its session's name: it ends in the driver's process id.

    One that was started in the last moment was never seen among the descendants, and is nobody's child by now.
    """
    session = re.compile(rf"session_[\d_-]+_{driver}(?!\d)")
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if session.search(" ".join(process.cmdline())):
                found.append(process)
    return found


def main() -> None:
    """Watch the process named on the command line until standard input says or shows that it is over."""
    parent, own = int(sys.argv[1]), os.getpid()
    seen: dict[int, psutil.Process] = {}
    while True:
        seen |= {process.pid: process for process in _children(parent) if process.pid != own}
        if select.select([0], [], [], _LOOK_EVERY_S)[0]:
            break
    if os.read(0, 1):
        return
    for _ in range(_SWEEPS):
        for process in list(seen.values()):
            if process.is_running():
                seen |= {child.pid: child for child in _children(process.pid)}
        for process in [*seen.values(), *_of_session(parent)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # psutil checks that the number still belongs to the same process
        time.sleep(_LOOK_EVERY_S)


if __name__ == "__main__":
    main()
