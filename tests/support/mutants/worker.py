"""A process that runs the tests of one mutant after another in a private copy of the tree.

It is started by path, so that neither dlm_core nor tests is imported before the fork: a child imports both afresh,
from the copy.  What does not change from mutant to mutant is loaded once.

Reads one JSON object a line from standard input, {"path", "source", "tests", "log", "timeout_s"}; writes one a line,
{"code", "seconds"}: the exit code, negative for the signal that ended the child, and the processor time it took.
Processor time is what is limited: on a busy machine a test isn't at fault for being slow.
"""

import importlib
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

PRELOADED = (
    "einops",
    "numpy",
    "torch",
    "torch.func",
    "torch.nn.attention",
    "pytest",
    "pytest_timeout",
    "hypothesis",
    "hypothesis.strategies",
    "beartype",
    "jaxtyping",
)
WRONG_TREE = 70
"""Exit code of a child that imported the package or its tests from elsewhere than the copy."""
NOT_IMPORTED = 71
"""Exit code of a child whose tests did not import the mutated module."""
BROKEN = 72
"""Exit code of a child that failed outside pytest."""
MEMORY_BYTES = 6 << 30
"""Address space that a child may add to what it inherits: a mutant may ask for a tensor of any size."""
WAITS = 10
"""A child may take this many times its processor time by the clock, in case it waits for what never comes."""
POLL_S = 0.01
OURS = {"dlm_core", "pipeline", "workflows", "cluster", "tests"}


def main() -> None:
    """Serve until standard input ends."""
    tree = Path(sys.argv[1])
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    os.chdir(tree)
    for line in sys.stdin:
        job = json.loads(line)
        path = tree / job["path"]
        original = path.read_bytes()
        try:
            path.write_text(job["source"], encoding="utf-8")
            result = run_in_child(tree, job)
        finally:
            path.write_bytes(original)
        try:
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:  # whoever asked is gone
            os._exit(1)


def run_in_child(tree: Path, job: dict) -> dict:
    """Fork, run the tests, wait; end the child and all it started when its time is over."""
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = BROKEN
        try:
            code = run_tests(tree, job)
        except BaseException:  # noqa: BLE001 - nothing may leave the child but its exit code
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    try:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        while not ended:
            if time.monotonic() - start > job["timeout_s"] * WAITS:
                os.kill(pid, signal.SIGXCPU)
            time.sleep(POLL_S)
            ended, status, usage = os.wait4(pid, os.WNOHANG)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    return {"code": os.waitstatus_to_exitcode(status), "seconds": usage.ru_utime + usage.ru_stime}


def run_tests(tree: Path, job: dict) -> int:
    """Run pytest in this process; the exit code says what came of it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + MEMORY_BYTES, used_bytes + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(job["timeout_s"]), resource.RLIM_INFINITY))
    sys.path.insert(0, str(tree))

    import hypothesis
    import pytest

    # The same examples on every run, none remembered from one mutant to the next; being slow is no fault.
    hypothesis.settings.register_profile("mutants", database=None, derandomize=True, deadline=None)
    hypothesis.settings.load_profile("mutants")
    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(tree), "-c", str(tree / "pyproject.toml")]
    # Plugins loaded before the fork keep their plain asserts.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = int(pytest.main([*options, *job["tests"]]))
    sys.stdout.flush()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] in OURS and file and not Path(file).is_relative_to(tree):
            return WRONG_TREE
    mutated = job["path"].removesuffix(".py").replace("/", ".")
    if code == 0 and mutated not in sys.modules:
        return NOT_IMPORTED
    return code


if __name__ == "__main__":
    main()
