"""Hostile programs are contained: in namespaces where the kernel allows them, with rlimits elsewhere.

What a program here tries must do no harm where a fault lets it: new files, a process of the test's own, 2^10 forks.
"""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.sandbox.isolation import NAMESPACES, RLIMITS_ALONE, Isolation
from pipeline.sandbox.leftovers import delete_tree
from tests.pipeline.conftest import python
from tests.support.sandboxed import (
    are_namespaces_allowed,
    is_alive,
    marked,
    new_marker,
    run_limited,
    verdict,
    wait_until,
)


@pytest.fixture
def of_another_user(isolation: Isolation) -> Isolation:
    """Where the program is not the user that runs the tests, or does not see what is theirs."""
    if isolation.name == RLIMITS_ALONE and os.geteuid():
        pytest.skip("with rlimits alone a program may do to this user's things what the user may")
    return isolation


def test_a_fork_bomb_is_bounded_and_leaves_nothing(isolation: Isolation) -> None:
    marker = new_marker()
    bomb = """
import os, time
forks = 0
while True:
    try:
        os.fork()
        forks += 1
    except OSError:
        pass
    if forks > 10:
        time.sleep(1000)
"""
    outcome = run_limited(marked(bomb, marker), isolation, wall_s=2, cpu_s=1, num_processes=12)
    assert outcome.kind in ("timeout", "killed")
    assert not is_alive(marker)


def test_the_limit_of_processes_holds(isolation: Isolation) -> None:
    """Checked with a bomb that stops by itself."""
    program = """
import os, time
count = 0
try:
    for _ in range(60):
        if not os.fork():
            time.sleep(5)
            os._exit(0)
        count += 1
except BlockingIOError:
    print(count)
"""
    outcome = run_limited(program, isolation, num_processes=10)
    assert outcome.kind == "passed"
    # where the user's other processes count too, their number may change meanwhile
    most = 9 if isolation.name == NAMESPACES or not os.geteuid() else 50
    assert 1 <= int(outcome.output) <= most


def test_a_daemon_is_gone_afterwards(isolation: Isolation) -> None:
    marker = new_marker()
    daemon = "import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: time.sleep(100)"
    program = f"""
import os
ready, begun = os.pipe()
if not os.fork():
    os.setsid()
    if os.fork():
        os._exit(0)
    {marked(daemon, marker).replace(chr(10), chr(10) + "    ")}
os.close(begun)
assert os.read(ready, 1) == b""  # the end that the daemon had was closed as it became one
"""
    assert verdict(run_limited(program, isolation)) == ("passed", "")
    assert not is_alive(marker)


def test_a_child_that_keeps_the_descriptors_open_is_not_waited_for(isolation: Isolation) -> None:
    outcome = run_limited("import os, time\nif not os.fork():\n  time.sleep(1000)\nprint('done')", isolation)
    assert (outcome.kind, outcome.output) == ("passed", "done\n")


def test_nothing_outside_of_its_folder_is_written(of_another_user: Isolation, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("mine")
    new = [str(tmp_path / "new"), *(f"{folder}/new-{new_marker()}" for folder in ("", "/usr", "/etc", "/dev", "/root"))]
    program = f"""
import os
def attempts():
    for place in {new!r}:
        yield place, lambda: open(place, "x")
        yield place, lambda: os.mkdir(place)
    for change in (lambda p: open(p, "w"), lambda p: os.chmod(p, 0o777), os.unlink, os.utime):
        yield change, lambda: change({str(target)!r})
for name, attempt in attempts():
    try:
        attempt()
    except OSError:
        continue
    print(name)
"""
    outcome = run_limited(program, of_another_user)
    assert (outcome.kind, outcome.output) == ("passed", "")
    assert target.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_of_this_machine_are_not_seen_in_namespaces(tmp_path: Path) -> None:
    if not are_namespaces_allowed():
        pytest.skip("namespaces are not allowed here")
    (tmp_path / "file").write_text("mine")
    program = f"""
import os
assert not os.path.exists({str(tmp_path / "file")!r})
assert not os.path.exists("/proc/self")
assert set(os.listdir("/etc")) <= {{"ld.so.cache", "alternatives"}}
assert os.listdir("/tmp") == [] and os.getcwd() == "/tmp"
assert os.getpid() == 2 and os.getppid() == 1
for place in ("/", "/usr", "/dev/null", os.path.dirname(os.__file__)):
    assert os.statvfs(place).f_flag & os.ST_RDONLY, place
"""
    assert verdict(run_limited(program, Isolation(NAMESPACES, ""))) == ("passed", "")


def test_no_socket_is_opened(isolation: Isolation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        program = f"""
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, getattr(socket, "AF_VSOCK", socket.AF_INET)):
    try:
        socket.socket(family)
    except PermissionError:
        print("refused")
try:
    socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=2)
except OSError:
    print("refused")
"""
        outcome = run_limited(program, isolation)
        assert (outcome.kind, outcome.output) == ("passed", "refused\n" * 5)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_network_namespace_has_no_way_out() -> None:
    """Without the filter of system calls, which stands in front of it."""
    if not are_namespaces_allowed():
        pytest.skip("namespaces are not allowed here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"""
import socket
from pipeline.sandbox import namespaces
namespaces.enter()
print([name for _, name in socket.if_nameindex()])
try:
    socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=2)
except OSError as error:
    print(type(error).__name__)
"""
        done = python("-c", code)
    assert done.stdout.splitlines()[0] == "['lo']" or done.stdout.startswith("['lo'"), done.stderr
    assert done.stdout.splitlines()[1] in ("OSError", "TimeoutError", "ConnectionRefusedError")


def test_the_environment_of_its_parents_is_not_read(
    of_another_user: Isolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_A_TEST", "not to be told")
    program = f"""
import os, pathlib
assert "SECRET_OF_A_TEST" not in os.environ
for pid in (os.getppid(), {os.getpid()}, "self"):
    try:
        text = pathlib.Path(f"/proc/{{pid}}/environ").read_bytes()
    except OSError:
        continue
    assert b"SECRET_OF_A_TEST" not in text, pid
"""
    assert verdict(run_limited(program, of_another_user)) == ("passed", "")


def test_no_other_process_is_killed(isolation: Isolation) -> None:
    command = [sys.executable, "-S", "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as victim:
        program = f"""
import os, resource, signal
for pid in (os.getppid(), {victim.pid}, -{victim.pid}):
    for attempt in (lambda: os.kill(pid, signal.SIGKILL), lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0))):
        try:
            attempt()
        except (OSError, ValueError):
            pass
"""
        outcome = run_limited(program, isolation)
        assert victim.poll() is None
        victim.kill()
    assert verdict(outcome) == ("passed", "")


def test_without_namespaces_signals_and_limits_are_for_the_program_itself() -> None:
    code = """
import os, resource, subprocess, sys
from pipeline.sandbox import kernel, seccomp

victim = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
kernel.refuse_privileges()
kernel.filter_calls(seccomp.filter_program(os.getpid()))
for pid in (victim.pid, -victim.pid, os.getppid()):
    for attempt in (lambda: os.kill(pid, 0), lambda: resource.prlimit(pid, resource.RLIMIT_CORE)):
        try:
            attempt()
        except PermissionError:
            print("refused")
os.kill(os.getpid(), 0)
os.kill(0, 0)
resource.prlimit(0, resource.RLIMIT_CORE, (0, 0))
print("allowed")
victim.stdin.close()
"""
    assert python("-c", code).stdout.split() == [*["refused"] * 6, "allowed"]


def test_descendants_are_killed_wherever_they_went() -> None:
    code = """
import os, time
from pipeline.sandbox import kernel, leftovers

kernel.adopt_orphans()
ready, begun = os.pipe()
if not os.fork():
    for _ in range(4):
        os.fork()
        os.setpgid(0, 0)
    if os.fork():
        os._exit(0)
    os.setsid()
    os.write(begun, b".")
    time.sleep(1000)
for _ in range(16):
    os.read(ready, 1)
leftovers.kill_descendants()
os.close(begun)
print(os.read(ready, 1))
"""
    assert python("-c", code).stdout == "b''\n"


def test_privileges_are_not_had(isolation: Isolation) -> None:
    program = """
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
assert libc.unshare(0x10000000) == -1  # a new namespace of users
for number, arguments in ((clone, (0x10000011, 0, 0, 0, 0)), (435, (0, 0))):
    made = libc.syscall(number, *arguments)
    if made == 0:
        os._exit(0)
    assert made == -1
assert libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == -1
assert libc.ptrace(16, os.getppid(), 0, 0) == -1
for attempt in (lambda: os.setuid(0), lambda: os.chroot("/tmp")):
    try:
        attempt()
    except PermissionError:
        continue
    raise AssertionError("could be done")
"""
    assert verdict(run_limited(program, isolation)) == ("passed", "")


def test_a_program_ends_with_the_process_that_runs_it(isolation: Isolation, tmp_path: Path) -> None:
    marker = new_marker()
    program = marked("import time\ntime.sleep(1000)", marker)
    code = (
        "from pipeline.sandbox.isolation import Isolation, run_code\n"
        f"run_code({program!r}, isolation=Isolation({isolation.name!r}, ''))"
    )
    own = os.environ | {"TMPDIR": str(tmp_path)}  # its folder stays: nobody is left to delete it
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=own) as runner:
        wait_until(lambda: is_alive(marker))
        runner.kill()
    wait_until(lambda: not is_alive(marker))


def test_a_deep_tree_of_folders_is_deleted(isolation: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        monkeypatch.setattr(tempfile, "tempdir", scratch)
        program = """
import os
for _ in range(1500):
    os.mkdir("a" * 20)
    os.chdir("a" * 20)
os.symlink("/", "link")
os.chmod(".", 0)
"""
        assert verdict(run_limited(program, isolation)) == ("passed", "")
        assert os.listdir(scratch) == []


def test_a_tree_is_deleted_and_what_its_links_lead_to_is_not(tmp_path: Path) -> None:
    kept = tmp_path / "kept" / "file"
    kept.parent.mkdir()
    kept.write_text("kept")
    folder = tmp_path / "folder"
    (folder / "a" / "a" / "a").mkdir(parents=True)
    (folder / "a" / "b").write_text("text")
    (folder / "b" / "a").mkdir(parents=True)
    (folder / "a" / "link").symlink_to(kept.parent)
    (folder / "link").symlink_to(kept.parent)
    (folder / "a" / "a").chmod(0)
    delete_tree(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "kept"


def test_a_tree_is_deleted_in_which_everything_is_forbidden() -> None:
    """As another user than root, to whom nothing is."""
    code = """
import os, tempfile
from pathlib import Path
from pipeline.sandbox import kernel
from pipeline.sandbox.leftovers import delete_tree

scratch = tempfile.mkdtemp()
os.chmod(scratch, 0o777)
if not os.geteuid():
    kernel.become(4321, keeps_reading=False)
inner = Path(scratch, "folder", "a", "b", "c")
inner.mkdir(parents=True)
inner.joinpath("file").touch()
for folder in (inner, *inner.parents[:3]):
    folder.chmod(0)
delete_tree(inner.parents[2])
print(os.listdir(scratch))
"""
    done = python("-c", code)
    assert done.stdout == "[]\n", done.stderr
