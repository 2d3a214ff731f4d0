"""What one program may use, and what became of it."""

from dataclasses import dataclass, fields
from typing import Literal

OutcomeKind = Literal["passed", "failed", "timeout", "killed", "out_of_memory"]


class SandboxError(RuntimeError):
    """The sandbox itself did not work: nothing is known of the program."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one program.  Those of processor time and memory hold for each of its processes."""

    wall_s: float = 30.0
    """From its start to its end.  Far above ``cpu_s``: what is slow because the machine is busy has not failed."""
    cpu_s: int = 10
    memory_bytes: int = 1 << 30
    """Address space."""
    num_processes: int = 16
    """Processes and threads at a time."""
    disk_bytes: int = 64 << 20
    """Of a file; in namespaces of its whole folder."""
    open_files: int = 64
    output_bytes: int = 4096
    """Of its output that are kept; the rest is read and dropped."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"{field.name} is {value}; it must be above 0")


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    kind: OutcomeKind
    """``passed``: it ran to its end.  ``failed``: an exception, or it left before its end.  ``killed``: by a signal."""
    detail: str
    """In a line: the exception, the signal, the limit; empty where it passed."""
    seconds: float
    output: str
    """The beginning of what it wrote to standard output and standard error."""
