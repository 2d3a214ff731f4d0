"""Inside the sandbox: runs one program, and says at its end the word that was put before it.

Run as text (``python -c``) by an interpreter that sees nothing of this project.  Descriptor 3 holds the word, a line
end and the program; descriptor 4 takes the word, or "M" (out of memory) or "F" and what went wrong.
"""

import os
import sys
from types import ModuleType

_SOURCE, _ANSWER = 3, 4
_ANSWER_BYTES = 2000


def _describe(error: BaseException) -> bytes:
    error.__traceback__ = None  # its frames may hold all the memory there is
    if isinstance(error, MemoryError):
        return b"MMemoryError"
    if isinstance(error, SystemExit):
        return f"FSystemExit({error.code!r}) before the end of the program".encode()
    name = type(error).__name__
    text = str(error).strip()
    return f"F{name}: {text}".rstrip(": ").encode(errors="backslashreplace")


def _main() -> None:
    write, leave, getpid = os.write, os._exit, os.getpid  # the program may put others in their place
    with open(_SOURCE, "rb") as source:
        word, _, program = source.read().partition(b"\n")
    here = getpid()
    os.environ.clear()
    sys.argv[:] = ["program.py"]
    module = sys.modules["__main__"] = ModuleType("__main__")
    try:
        exec(compile(program.decode("utf-8", "surrogatepass"), "program.py", "exec", dont_inherit=True), vars(module))
        answer = word
    except BaseException as error:  # noqa: BLE001 - whatever it is, the program has not passed
        try:
            answer = _describe(error)[:_ANSWER_BYTES]
        except BaseException:  # noqa: BLE001 - of the exception's own __str__, or for lack of memory
            answer = b"F" + type(error).__name__.encode(errors="backslashreplace")
    if getpid() != here:  # a fork that came back from the program
        leave(1)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - output is for information
        pass
    write(_ANSWER, answer)
    leave(0)


if __name__ == "__main__":
    _main()
