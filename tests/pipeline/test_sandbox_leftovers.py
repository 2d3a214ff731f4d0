"""After every hostile program nothing is left of it: no process, no file, no memory, nothing held by who ran it."""

import gc
import os
import tempfile
from pathlib import Path

import pytest

from pipeline.sandbox.isolation import NAMESPACES, Isolation
from tests.support.sandboxed import ancestors, is_alive, marked, new_marker, run_limited, verdict

OPEN_TO_ALL = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run/lock", "/run/user")
_SCATTER = f"""
import os, sys
for folder in (".", "/", *{OPEN_TO_ALL!r}):
    try:
        open(os.path.join(folder, sys.argv[1]), "w").write("left")
        os.mkdir(os.path.join(folder, sys.argv[1] + "-folder"))
    except OSError:
        pass
"""
_LEAVES_ALL = """
import os, signal, time
for _ in range(4):
    if not os.fork():
        os.setsid()
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        if not os.fork():
            time.sleep(1000)
        os._exit(0)
"""
HOSTILE = {
    "fork bomb": "import os, time\nfor _ in range(60):\n  try: os.fork()\n  except OSError: time.sleep(1000)",
    "endless loop": "while True: pass",
    "10 GB": "x = bytearray(10 << 30)",
    "daemons that ignore signals": _LEAVES_ALL,
    "daemons and an early end": _LEAVES_ALL + "\nos._exit(0)",
    "daemons and a crash": _LEAVES_ALL + "\nos.kill(os.getpid(), signal.SIGSEGV)",
    "files in every folder": _SCATTER,
    "shared memory": _SCATTER
    + "from multiprocessing.shared_memory import SharedMemory\n"
    "SharedMemory(sys.argv[1] + '-shm', create=True, size=1 << 20)\nos._exit(0)",
    "a pipe that is full": "import os\nif not os.fork():\n  while True: os.write(1, bytes(1 << 16))",
    "killing whom it may": "import os\nfor pid in (os.getppid(), 1, -1, 0):\n"
    "  try: os.kill(pid, 9)\n  except OSError: pass",
}  # fmt: skip


def _held() -> tuple[set[str], set[int], str]:
    """What this process holds of a run: descriptors, children, and the mounts that it sees."""
    gc.collect()  # files that earlier tests left to the collector would be closed in between
    children = {int(name) for name in filter(str.isdigit, os.listdir("/proc")) if os.getpid() in ancestors(int(name))}
    return set(os.listdir("/proc/self/fd")), children, Path("/proc/self/mounts").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_left_of_a_hostile_program(
    isolation: Isolation, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    marker, before = new_marker(), _held()
    run_limited(marked(HOSTILE[name], marker), isolation, wall_s=2, cpu_s=1, memory_bytes=256 << 20, num_processes=12)
    assert is_alive(marker) == []
    assert os.listdir(tmp_path) == []
    assert _held() == before
    left = [path for folder in OPEN_TO_ALL if os.path.isdir(folder) for path in Path(folder).glob(f"*{marker}*")]
    try:
        # with rlimits alone a program writes where everybody may, and what it wrote there stays
        assert left == [] or isolation.name != NAMESPACES
    finally:
        for path in left:
            path.rmdir() if path.is_dir() else path.unlink()


def test_the_program_that_scatters_files_can_write_some(isolation: Isolation) -> None:
    program = _SCATTER.replace("sys.argv[1]", "'name'") + "assert sorted(os.listdir()) == ['name', 'name-folder']"
    if isolation.name != NAMESPACES:
        program = program.replace(repr(OPEN_TO_ALL), "()")
    assert verdict(run_limited(program, isolation)) == ("passed", "")


def test_memory_that_belongs_to_no_process_is_refused(isolation: Isolation) -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for call in (lambda: libc.shmget(0, 4096, 0o1666), lambda: libc.semget(0, 1, 0o1666), lambda: libc.msgget(0, 0o1666),
             lambda: libc.memfd_create(b"x", 0)):
    assert call() == -1 and ctypes.get_errno() == 1, ctypes.get_errno()
"""
    assert verdict(run_limited(program, isolation)) == ("passed", "")
