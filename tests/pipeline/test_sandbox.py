"""What is told of a program under test: in namespaces where the kernel allows them, and with rlimits alone."""

import os
import signal
import threading
from collections.abc import Callable

import pytest

from pipeline.sandbox.isolation import NAMESPACES, Isolation, choose_isolation, run_many
from pipeline.sandbox.limits import Limits, Outcome
from tests.pipeline.conftest import python
from tests.support.sandboxed import (
    WALL_S,
    ancestors,
    are_namespaces_allowed,
    is_alive,
    marked,
    new_marker,
    run_limited,
    verdict,
    wait_until,
)

BUSY_S = 40.0
"""For a program that a busy machine lets run now and then."""


def test_a_program_that_comes_to_its_end_passes_with_its_output(isolation: Isolation) -> None:
    outcome = run_limited("import sys\nprint('out')\nsys.stdout.flush()\nprint('err', file=sys.stderr)", isolation)
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
    outcome = run_limited(program, isolation)
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
    outcome = run_limited(program, isolation)
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
    assert verdict(run_limited(program, isolation)) == ("passed", "")


def test_an_endless_loop_ends_with_its_processor_time(isolation: Isolation) -> None:
    outcome = run_limited("while True: pass", isolation, cpu_s=1, wall_s=BUSY_S)
    assert verdict(outcome) == ("timeout", "took more than 1 s of processor time")


def test_an_endless_loop_that_handles_all_signals_ends_too(isolation: Isolation) -> None:
    program = """
import signal
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, lambda *_: None)
while True: pass
"""
    outcome = run_limited(program, isolation, cpu_s=1, wall_s=BUSY_S)
    assert verdict(outcome) == ("timeout", "took more than 1 s of processor time")


def test_a_program_that_waits_ends_with_its_time(isolation: Isolation) -> None:
    outcome = run_limited("import time\nprint('waits', flush=True)\ntime.sleep(1000)", isolation, wall_s=2)
    assert verdict(outcome) == ("timeout", "ran for more than 2 s")


@pytest.mark.parametrize(
    "program",
    ["x = bytearray(10 << 30)", "x = bytearray(300 << 20)", "x = []\nwhile True: x.append(bytearray(1 << 20))"],
)
def test_more_memory_than_allowed_is_refused(isolation: Isolation, program: str) -> None:
    assert verdict(run_limited(program, isolation, memory_bytes=256 << 20)) == ("out_of_memory", "MemoryError")


def test_a_crash_names_the_signal(isolation: Isolation) -> None:
    assert verdict(run_limited("import ctypes\nctypes.string_at(8)", isolation)) == ("killed", "by SIGSEGV")
    assert verdict(run_limited("import os, signal\nos.kill(os.getpid(), 9)", isolation)) == ("killed", "by SIGKILL")


def test_a_huge_recursion_has_not_passed(isolation: Isolation) -> None:
    program = "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n  def __getattr__(s, n): return getattr(s, n)\nA().x"
    assert run_limited(program, isolation, cpu_s=2, memory_bytes=256 << 20).kind in (
        "killed",
        "timeout",
        "out_of_memory",
    )


def test_endless_output_is_cut_and_ends_with_the_time(isolation: Isolation) -> None:
    outcome = run_limited("while True: print('x' * 99)", isolation, cpu_s=1, wall_s=BUSY_S, output_bytes=300)
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
    outcome = run_limited(program, isolation, disk_bytes=1 << 20)
    assert outcome.kind == "passed", outcome
    assert outcome.output.strip() in ("27", "28")  # too large, or no space


def test_all_files_of_its_folder_together_have_a_limit_in_namespaces() -> None:
    if not are_namespaces_allowed():
        pytest.skip("namespaces are not allowed here")
    program = """
try:
    for number in range(4):
        with open(str(number), "wb") as file:
            file.write(bytes(700 << 10))
except OSError as error:
    print(number, error.errno)
"""
    outcome = run_limited(program, Isolation(NAMESPACES, ""), disk_bytes=1 << 20)
    assert (outcome.kind, outcome.output) == ("passed", "1 28\n")


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
    threads = [threading.Thread(target=lambda: outcomes.append(run_limited("pass", isolation))) for _ in range(4)]
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
    assert "set allow_unsandboxed of the task to true to run the code with rlimits alone" in refusal
    assert chosen.startswith("rlimits alone: rlimits and a time limit alone")
    assert output == "2"


def test_root_that_cannot_become_another_user_is_refused_even_with_permission() -> None:
    if os.geteuid():
        pytest.skip("these tests are not run by root")
    code = """
import ctypes
from pipeline.errors import UserError
from pipeline.sandbox.isolation import choose_isolation

for capability in (6, 7):  # CAP_SETGID, CAP_SETUID: out of the set that exec gives to root
    assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0
try:
    choose_isolation(allow_unsandboxed=True)
except UserError as error:
    print(error)
"""
    refusal = python("-c", code).stdout
    assert "cannot be run, not even with rlimits alone: PermissionError" in refusal
    assert "root may not become another user here, and limits do not hold for root. Run as another user" in refusal


def _killed_while_it_waits(isolation: Isolation, whom: Callable[[int], int]) -> Outcome:
    """What is told of a program where somebody kills it, or a process that goes with it."""
    marker = new_marker()
    found: list[Outcome] = []
    program = marked("import time\ntime.sleep(1000)", marker)
    thread = threading.Thread(target=lambda: found.append(run_limited(program, isolation, wall_s=60)))
    thread.start()
    wait_until(lambda: is_alive(marker))
    (pid,) = is_alive(marker)
    os.kill(whom(pid), signal.SIGKILL)
    thread.join()
    wait_until(lambda: not is_alive(marker))
    return found[0]


def test_a_program_that_is_killed_from_outside_is_told_as_killed(isolation: Isolation) -> None:
    assert verdict(_killed_while_it_waits(isolation, lambda pid: pid)) == ("killed", "by SIGKILL")


@pytest.mark.parametrize("who", ["its parent", "the launcher"])
def test_a_program_whose_watcher_is_killed_is_told_as_killed(isolation: Isolation, who: str) -> None:
    def watcher(pid: int) -> int:
        line = ancestors(pid)
        return line[0] if who == "its parent" else line[line.index(os.getpid()) - 1]

    outcome = _killed_while_it_waits(isolation, watcher)
    assert verdict(outcome) == ("killed", "with the process that watched it: the machine may be out of memory")
