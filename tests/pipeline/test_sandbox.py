"""Code under test is contained, whatever it does: in namespaces where the kernel allows them, with rlimits elsewhere.

What a program here tries must do no harm where a fault lets it: new files, a process of the test's own, 2^10 forks.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pipeline.sandbox.isolation import NAMESPACES, RLIMITS_ALONE, Isolation, choose_isolation, run_code, run_many
from pipeline.sandbox.leftovers import delete_tree
from pipeline.sandbox.limits import Limits, Outcome
from tests.pipeline.conftest import python
from tests.support.sandboxed import are_namespaces_allowed, is_alive, marked, new_marker

WALL_S = 30.0
"""Far above what any of these programs takes on a busy machine."""
GONE_S = 15.0
BUSY_S = 40.0


@pytest.fixture(params=[NAMESPACES, RLIMITS_ALONE])
def isolation(request: pytest.FixtureRequest) -> Isolation:
    if request.param == NAMESPACES and not are_namespaces_allowed():
        pytest.skip("namespaces are not allowed here")
    return Isolation(request.param, request.param)


@pytest.fixture
def of_another_user(isolation: Isolation) -> Isolation:
    """Where the program is not the user that runs the tests, or does not see what is theirs."""
    if isolation.name == RLIMITS_ALONE and os.geteuid():
        pytest.skip("with rlimits alone a program may do to this user's things what the user may")
    return isolation


def _run(program: str, isolation: Isolation, wall_s: float = WALL_S, cpu_s: int = 5, **limits: int) -> Outcome:
    return run_code(program, isolation=isolation, limits=Limits(wall_s=wall_s, cpu_s=cpu_s, **limits))


def _kind_and_detail(outcome: Outcome) -> tuple[str, str]:
    return outcome.kind, outcome.detail


def test_a_program_that_comes_to_its_end_passes_with_its_output(isolation: Isolation) -> None:
    outcome = _run("import sys\nprint('out')\nsys.stdout.flush()\nprint('err', file=sys.stderr)", isolation)
    assert (outcome.kind, outcome.detail, outcome.output) == ("passed", "", "out\nerr\n")
    assert 0 < outcome.seconds < WALL_S


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("assert 1 + 1 == 3, 'no\\nsum'", "AssertionError: no sum"),
        ("assert False", "AssertionError"),
        ("{}['key']", "KeyError: 'key'"),
        ("def f(:", "SyntaxError: invalid syntax (program.py, line 1)"),
        ("x = '\udc80'", "UnicodeEncodeError: 'utf-8' codec can't encode character '\\udc80' in position 5"),
        ("x = '\\x00'\x00", "SyntaxError: source code string cannot contain null bytes"),
        ("class E(Exception):\n  def __str__(self): raise E\nraise E", "E"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_an_exception_fails_with_its_last_line(isolation: Isolation, program: str, detail: str) -> None:
    outcome = _run(program, isolation)
    assert outcome.kind == "failed"
    # Python 3.12 has another class for null bytes than 3.11, and other words for some
    assert outcome.detail.startswith(detail) or "null bytes" in outcome.detail


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("import os; os._exit(0)", "left with exit code 0 before the end of the program"),
        ("import os; os._exit(3)", "left with exit code 3 before the end of the program"),
        ("import sys; sys.exit(0)", "SystemExit(0) before the end of the program"),
        ("exit()", "NameError: name 'exit' is not defined"),
        ("import os; os.write(4, b'passed'); os._exit(0)", "left with exit code 0 before the end of the program"),
        ("import os; os.write(4, b'0' * 32); os._exit(0)", "left with exit code 0 before the end of the program"),
        ("import os; os.execv('/bin/true', ['true'])", "left with exit code 0 before the end of the program"),
        ("import os\nif os.fork(): os._exit(0)", "left with exit code 0 before the end of the program"),
        ("import os\nif not os.fork(): os.wait()\nelse: os.wait(); os._exit(0)", "left with exit code 0 before"),
    ],
)
def test_leaving_before_the_end_has_not_passed(isolation: Isolation, program: str, detail: str) -> None:
    outcome = _run(program, isolation)
    assert (outcome.kind, outcome.detail[: len(detail)]) == ("failed", detail)


def test_the_word_is_not_told_in_arguments_environment_or_open_files(isolation: Isolation) -> None:
    program = """
import os, sys
assert sys.argv == ["program.py"] and not os.environ
assert __name__ == "__main__" and sys.modules["__main__"].__dict__ is globals()
found = []
for number in range(64):
    try:
        os.fstat(number)
        found.append(number)
    except OSError:
        pass
assert found == [0, 1, 2, 4], found
assert os.read(0, 1) == b"" and os.listdir() == []
"""
    assert _kind_and_detail(_run(program, isolation)) == ("passed", "")


@pytest.mark.parametrize(
    "ignored", ["", "import signal\nfor n in {*range(1, 65)} - {9, 19, 32, 33}: signal.signal(n, signal.SIG_IGN)\n"]
)
def test_an_endless_loop_ends_with_its_processor_time(isolation: Isolation, ignored: str) -> None:
    outcome = _run(f"{ignored}while True: pass", isolation, cpu_s=1, wall_s=BUSY_S)
    assert _kind_and_detail(outcome) == ("timeout", "took more than 1 s of processor time")


def test_a_program_that_waits_ends_with_its_time(isolation: Isolation) -> None:
    outcome = _run("import time\nprint('waits', flush=True)\ntime.sleep(1000)", isolation, wall_s=2)
    assert _kind_and_detail(outcome) == ("timeout", "ran for more than 2 s")


@pytest.mark.parametrize("program", ["x = bytearray(10 << 30)", "x = []\nwhile True: x.append(bytearray(1 << 20))"])
def test_more_memory_than_allowed_is_refused(isolation: Isolation, program: str) -> None:
    assert _kind_and_detail(_run(program, isolation, memory_bytes=256 << 20)) == ("out_of_memory", "MemoryError")


def test_memory_of_no_process_is_refused(isolation: Isolation) -> None:
    assert _kind_and_detail(_run("import os\nos.memfd_create('x')", isolation)) == (
        "failed", "PermissionError: [Errno 1] Operation not permitted",
    )  # fmt: skip


def test_a_crash_names_the_signal(isolation: Isolation) -> None:
    assert _kind_and_detail(_run("import ctypes\nctypes.string_at(8)", isolation)) == ("killed", "by SIGSEGV")
    assert _kind_and_detail(_run("import os, signal\nos.kill(os.getpid(), 9)", isolation)) == ("killed", "by SIGKILL")


def test_a_huge_recursion_has_not_passed(isolation: Isolation) -> None:
    program = "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n  def __getattr__(s, n): return getattr(s, n)\nA().x"
    assert _run(program, isolation, cpu_s=2, memory_bytes=256 << 20).kind in ("killed", "timeout", "out_of_memory")


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
    outcome = _run(marked(bomb, marker), isolation, wall_s=2, cpu_s=1, num_processes=12)
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
    outcome = _run(program, isolation, num_processes=10)
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
    assert _kind_and_detail(_run(program, isolation)) == ("passed", "")
    assert not is_alive(marker)


def test_a_child_that_keeps_the_descriptors_open_is_not_waited_for(isolation: Isolation) -> None:
    outcome = _run("import os, time\nif not os.fork():\n  time.sleep(1000)\nprint('done')", isolation)
    assert (outcome.kind, outcome.output) == ("passed", "done\n")


def test_endless_output_is_cut_and_ends_with_the_time(isolation: Isolation) -> None:
    outcome = _run("while True: print('x' * 99)", isolation, cpu_s=1, wall_s=BUSY_S, output_bytes=300)
    assert outcome.kind == "timeout"
    assert outcome.output == ("x" * 99 + "\n") * 3


def test_its_folder_can_be_written_up_to_a_limit(isolation: Isolation) -> None:
    program = """
import pathlib, tempfile
pathlib.Path("file").write_text("text")
assert pathlib.Path("file").read_text() == "text"
with tempfile.TemporaryFile(dir=".") as file:
    try:
        file.write(bytes(2 << 20))
        file.flush()
    except OSError as error:
        print(error.errno)
"""
    outcome = _run(program, isolation, disk_bytes=1 << 20)
    assert outcome.kind == "passed", outcome
    assert outcome.output.strip() in ("27", "28")  # too large, or no space


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
    outcome = _run(program, of_another_user)
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
"""
    assert _kind_and_detail(_run(program, Isolation(NAMESPACES, ""))) == ("passed", "")


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
        outcome = _run(program, isolation)
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
for pid in (os.getppid(), {os.getpid()}, 1, "self"):
    try:
        text = pathlib.Path(f"/proc/{{pid}}/environ").read_bytes()
    except OSError:
        continue
    assert b"SECRET_OF_A_TEST" not in text, pid
"""
    assert _kind_and_detail(_run(program, of_another_user)) == ("passed", "")


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
        outcome = _run(program, isolation)
        assert victim.poll() is None
        victim.kill()
    assert _kind_and_detail(outcome) == ("passed", "")


def test_privileges_are_not_had(isolation: Isolation) -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x10000000) == -1  # a new namespace of users
assert libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == -1
assert libc.ptrace(16, os.getppid(), 0, 0) == -1
for attempt in (lambda: os.setuid(0), lambda: os.chroot("/tmp")):
    try:
        attempt()
    except PermissionError:
        continue
    raise AssertionError("could be done")
"""
    assert _kind_and_detail(_run(program, isolation)) == ("passed", "")


def test_a_program_ends_with_the_process_that_runs_it(isolation: Isolation) -> None:
    marker = new_marker()
    program = marked("import time\ntime.sleep(1000)", marker)
    code = (
        "from pipeline.sandbox.isolation import Isolation, run_code\n"
        f"run_code({program!r}, isolation=Isolation({isolation.name!r}, ''))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2]) as runner:
        _wait_until(lambda: is_alive(marker))
        runner.kill()
    _wait_until(lambda: not is_alive(marker))


def _wait_until(condition, timeout_s: float = GONE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
        assert _kind_and_detail(_run(program, isolation)) == ("passed", "")
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


def test_outcomes_have_the_order_of_their_programs(isolation: Isolation) -> None:
    programs = [f"import time\ntime.sleep({s})\nprint({s})" for s in (0.6, 0.0, 0.3, 0.0)]
    together = run_many(programs, isolation=isolation, workers=3)
    assert [outcome.output for outcome in together] == ["0.6\n", "0.0\n", "0.3\n", "0.0\n"]
    assert {outcome.kind for outcome in together} == {"passed"}


def test_a_program_does_the_same_each_time(isolation: Isolation) -> None:
    program = "print(hash('text'), list({'one', 'two', 'three'}))"
    outputs = {outcome.output for outcome in run_many([program] * 3, isolation=isolation, workers=3)}
    assert len(outputs) == 1


def test_without_workers_nothing_runs(isolation: Isolation) -> None:
    with pytest.raises(ValueError, match="workers is 0; it must be at least 1"):
        run_many(["pass"], isolation=isolation, workers=0)


@pytest.mark.parametrize("name", ["wall_s", "cpu_s", "memory_bytes", "num_processes", "output_bytes"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be above 0"):
        Limits(**{name: 0})


def test_many_threads_may_run_programs_at_once(isolation: Isolation) -> None:
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda: outcomes.append(_run("pass", isolation))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.kind for outcome in outcomes] == ["passed"] * 4


def test_namespaces_are_taken_where_they_are_allowed() -> None:
    if not are_namespaces_allowed():
        pytest.skip("namespaces are not allowed here")
    assert choose_isolation(allow_unsandboxed=False) == choose_isolation(allow_unsandboxed=True)
    isolation = choose_isolation(allow_unsandboxed=False)
    assert isolation.name == "namespaces"
    assert "network" in isolation.words


def test_where_namespaces_are_not_allowed_nothing_runs_without_permission() -> None:
    code = """
from pipeline.errors import UserError
from pipeline.sandbox import kernel, seccomp
from pipeline.sandbox.isolation import choose_isolation, run_code

kernel.refuse_privileges()
kernel.filter_calls(seccomp.filter_program())  # unshare is not permitted from here on, as in many containers
try:
    choose_isolation(allow_unsandboxed=False)
except UserError as error:
    print(error)
isolation = choose_isolation(allow_unsandboxed=True)
print(isolation.name, isolation.words, sep=": ")
print(run_code("print(1 + 1)", isolation=isolation).output)
"""
    done = python("-c", code)
    refusal, chosen, output = done.stdout.split("\n")[:3]
    assert "user and network namespaces are not allowed here (" in refusal, done.stderr
    assert "pass --allow-unsandboxed to run the code with rlimits alone" in refusal
    assert chosen.startswith("rlimits alone: rlimits and a time limit alone")
    assert output == "2"


def test_a_launcher_that_is_killed_is_no_verdict_on_the_programs_checks(isolation: Isolation) -> None:
    marker = new_marker()
    found: list[Outcome] = []
    program = marked("import time\ntime.sleep(1000)", marker)
    thread = threading.Thread(target=lambda: found.append(_run(program, isolation, wall_s=60)))
    thread.start()
    _wait_until(lambda: is_alive(marker))
    (pid,) = is_alive(marker)
    os.kill(pid, signal.SIGKILL)
    thread.join()
    assert _kind_and_detail(found[0]) == ("killed", "by SIGKILL")
