"""The process between this project and a program under test: isolates it, watches it, and tells what became of it.

Started anew for each program, alone in its session, with the task as JSON on standard input.  It imports nothing but
the standard library.  Its last word on standard output is a report; where there is none, nothing ran.
"""

import json
import os
import resource
import select
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.sandbox import driver, kernel, leftovers, namespaces, seccomp

KILLED = 70
"""Exit code: the first process of the namespace was killed, or this one's parent has gone."""

_ANSWER_BYTES = 4096
_OWN_UIDS = 0x70000000
"""Users of no machine; that of a program is this one plus the number of its launcher."""
_OOM_FIRST = "1000"


def main() -> None:
    """Run the task of standard input."""
    kernel.die_with_parent()
    task = json.load(sys.stdin)
    if os.getppid() != task["parent"]:
        os._exit(KILLED)
    if kernel.IS_LINUX:  # where the machine has no memory left, the program goes and not another
        Path("/proc/self/oom_score_adj").write_text(_OOM_FIRST)
    (in_namespaces if task["namespaces"] else with_rlimits_alone)(task)


def in_namespaces(task: dict[str, Any]) -> None:
    """Run the task in a process namespace, which ends with its first process."""
    source = _source(task)
    driver_text = _driver_text()
    namespaces.enter()
    first = os.fork()
    if first:
        code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        os._exit(KILLED if code < 0 else code)
    kernel.die_with_parent()
    kernel.refuse_tracers()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process is spared the signals that it does not handle
    namespaces.build_root(task["python"], task["limits"]["disk_bytes"])

    def isolate() -> None:
        namespaces.become_program()
        _restrict(task, task["limits"]["num_processes"], only_process=None)

    _report(_watch(task, source, driver_text, namespaces.WORK, isolate))


def with_rlimits_alone(task: dict[str, Any]) -> None:
    """Run the task in a folder, as another user where root starts it, and kill what it leaves behind."""
    source, folder, is_root = _source(task), task["folder"], os.geteuid() == 0
    driver_text = _driver_text()
    uid = _OWN_UIDS + os.getpid() if is_root else os.geteuid()
    kernel.adopt_orphans()
    num_processes = task["limits"]["num_processes"]
    if is_root:
        os.chown(folder, uid, uid)
    else:
        num_processes += leftovers.tasks_of_user(uid)

    def isolate() -> None:
        if is_root:
            kernel.become(uid, keeps_reading=not _is_open_to_others(task["python"]))
        _restrict(task, num_processes, only_process=os.getpid())

    try:
        report = _watch(task, source, driver_text, folder, isolate)
    finally:
        if is_root:
            leftovers.kill_user(uid)
        leftovers.kill_descendants()
    _report(report)


def _is_open_to_others(python: str) -> bool:
    """Whether any user may run the interpreter: one installed below /root may be read by root alone."""
    paths = [Path(python), Path(os.__file__).resolve()]
    folders = {folder for path in paths for folder in path.parents}
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in folders)


def _source(task: dict[str, Any]) -> int:
    """The word and the program, as a descriptor."""
    with tempfile.TemporaryFile() as file:
        file.write(task["word"].encode() + b"\n" + task["program"].encode("utf-8", "surrogatepass"))
        file.seek(0)
        return os.dup(file.fileno())


def _driver_text() -> str:
    return Path(driver.__file__).read_text(encoding="utf-8")


def _restrict(task: dict[str, Any], num_processes: int, only_process: int | None) -> None:
    limits = task["limits"]
    bounds = {
        "AS": limits["memory_bytes"], "CPU": limits["cpu_s"], "NPROC": num_processes, "FSIZE": limits["disk_bytes"],
        "NOFILE": limits["open_files"], "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0,
    }  # fmt: skip
    for name, bound in bounds.items():
        if hasattr(resource, f"RLIMIT_{name}"):
            number = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(number)[1]
            bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
            # a second of grace tells the end by SIGXCPU from others
            resource.setrlimit(number, (bound, bound + 1 if name == "CPU" and bound != hard else bound))
    kernel.refuse_privileges()
    program = seccomp.filter_program(only_process) if kernel.IS_LINUX else None
    if program is not None:
        kernel.filter_calls(program)


def _watch(
    task: dict[str, Any], source: int, driver_text: str, folder: str, isolate: Callable[[], None]
) -> dict[str, Any]:
    """Start the program and wait for its end or its time; the report."""
    limits = task["limits"]
    reads: dict[str, int] = {}
    writes: dict[str, int] = {}
    for name in ("output", "answer", "trouble", "wake"):
        reads[name], writes[name] = os.pipe()
    os.set_blocking(writes["wake"], False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writes["wake"], warn_on_full_buffer=False)
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        _become_program(task["python"], driver_text, folder, source, writes, isolate)
    for name in ("output", "answer", "trouble"):
        os.close(writes[name])
    os.close(source)
    if trouble := os.read(reads["trouble"], 4096):
        sys.exit(trouble.decode(errors="replace"))
    said = {"output": bytearray(), "answer": bytearray()}
    kept = {"output": limits["output_bytes"], "answer": _ANSWER_BYTES}
    names = {reads[name]: name for name in ("output", "answer")}
    open_ends = set(names)
    deadline = time.monotonic() + limits["wall_s"]

    def take(timeout_s: float) -> bool:
        ready = select.select([*open_ends, reads["wake"]], [], [], timeout_s)[0]
        for descriptor in ready:
            data = os.read(descriptor, 1 << 16)
            if not data:
                open_ends.discard(descriptor)
            elif name := names.get(descriptor):
                said[name] += data[: kept[name] - len(said[name])]
        return bool(open_ends.intersection(ready))

    status, cpu_s, is_late = None, 0.0, False
    while status is None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            is_late = True
            break
        take(left_s)
        status, cpu_s = _reap(pid)
    seconds = time.monotonic() - start
    for _ in range(len(said) * 2):  # what it said last is in the pipes; what others say after its end does not count
        if not take(0):
            break
    return {
        "is_late": is_late,
        "status": status,
        "cpu_s": cpu_s,
        "seconds": seconds,
        "answer": said["answer"].decode(errors="replace"),
        "output": said["output"].decode(errors="replace"),
    }


def _reap(pid: int) -> tuple[int | None, float]:
    """Exit code (the negative of a signal) and processor time of the program if it has ended; others are buried."""
    while True:
        ended, status, usage = os.wait4(-1, os.WNOHANG)
        if ended == pid:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if not ended:
            return None, 0.0


def _become_program(
    python: str, driver_text: str, folder: str, source: int, writes: dict[str, int], isolate: Callable[[], None]
) -> None:
    """In the child: descriptors, session, folder, limits, and exec."""
    trouble = writes["trouble"]
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        os.umask(0o077)
        null = os.open("/dev/null", os.O_RDONLY)
        # first out of the way of the numbers that they are to have
        high = [os.dup(descriptor) for descriptor in (null, writes["output"], source, writes["answer"], trouble)]
        placed = [high[0], high[1], high[1], high[2], high[3], high[4]]
        while min(placed) < len(placed):
            placed = [os.dup(descriptor) for descriptor in placed]
        for number, descriptor in enumerate(placed):
            os.dup2(descriptor, number, inheritable=number < len(placed) - 1)
        trouble = len(placed) - 1
        os.chdir(folder)
        isolate()
        kernel.die_with_parent()  # a change of user has undone what was set before
        command = [python, "-s", "-P", "-S", "-B", "-X", "utf8", "-c", driver_text]
        os.execve(python, command, {"PYTHONHASHSEED": "0"})
    except BaseException as error:  # noqa: BLE001 - told to the watching process, which raises
        os.write(trouble, f"{type(error).__name__}: {error}".encode(errors="replace"))
    finally:
        os._exit(1)


def _report(report: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)
