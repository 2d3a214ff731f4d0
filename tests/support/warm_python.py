"""Proofs forked from an interpreter that has imported transformers once, instead of one that starts each time.

What differs from ``pipeline.logits_proof`` are the seconds of imports: a child shares no state with the one before.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

_PRELOAD = ("transformers.modeling_utils", "transformers.modeling_gguf_pytorch_utils", "transformers.masking_utils")


Call = Callable[[list[str]], subprocess.CompletedProcess[str]]


@contextlib.contextmanager
def warm_python() -> Iterator[Call]:
    """What calls ``module:function`` with texts in a fork of the warm interpreter, while the context lasts."""
    command = [sys.executable, "-m", "tests.support.warm_python"]
    with tempfile.TemporaryDirectory() as scratch:
        own = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules", "OMP_NUM_THREADS": "1"}
        search = os.pathsep.join(path or "." for path in sys.path)
        environment = {**os.environ, "PYTHONPATH": search, **own}
        outputs = Path(scratch) / "stdout", Path(scratch) / "stderr"
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, bufsize=1) as server:
            requests, answers = server.stdin, server.stdout
            assert requests is not None
            assert answers is not None

            def call(arguments: list[str]) -> subprocess.CompletedProcess[str]:
                given = {"environment": {**os.environ, **own}, "outputs": [str(path) for path in outputs]}
                requests.write(json.dumps({"arguments": arguments, **given}) + "\n")
                answer = answers.readline()
                assert answer, f"the warm interpreter ended with {server.wait()}"
                return subprocess.CompletedProcess(arguments, int(answer), *(path.read_text() for path in outputs))

            yield call


def _serve() -> None:
    for module in _PRELOAD:
        importlib.import_module(module)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _child(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)  # noqa: T201


def _child(arguments: list[str], environment: dict[str, str], outputs: list[str]) -> None:
    from pipeline.logits_proof import _main

    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    code = 1
    try:
        os.environ.update(environment)
        _main(*arguments)
        code = 0
    except BaseException:  # noqa: BLE001 - as an interpreter does: the traceback is its last word
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
