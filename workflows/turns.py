"""What the workers of a run left behind: a folder for each turn of each call, work/<attempt>/<call>/<turn>."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.storage import Place
from workflows.store import RunPlace

_NUMBERED = re.compile(r"(\w+)-(\d+)\.(json|log)")


@dataclass(frozen=True)
class Turn:
    """One time that a call was given to the executor."""

    attempt: int
    """Of the run."""
    step: str
    call: str
    """The step itself, or the part of it that was worked on, such as "double-list" or "double-0"."""
    folder: Place
    files: tuple[str, ...]

    @property
    def epoch(self) -> int:
        """Of the lease on the artifact, which each attempt of a step takes anew."""
        return int(self.folder.name.partition("-")[0])

    @property
    def is_done(self) -> bool:
        """Whether it left a result."""
        return "done.json" in self.files

    @property
    def is_over(self) -> bool:
        """Whether a worker said that it has ended; one that was killed says nothing."""
        return self.is_done or bool(self.ranks("failure"))

    def ranks(self, what: str) -> list[int]:
        """Ranks that left a "failure", "usage" or "rank" (the log)."""
        found = (_NUMBERED.fullmatch(name) for name in self.files)
        return sorted(int(match[2]) for match in found if match is not None and match[1] == what)

    def log(self, rank: int) -> Place:
        """The output of a rank."""
        return self.folder / f"rank-{rank}.log"


def find_turns(run: RunPlace, steps: Sequence[str]) -> list[Turn]:
    """All turns of a run with these steps, in the order of attempts, calls and turns."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for path in _files(run.directory / "work", depth=4):
        attempt, call, turn, name = PurePosixPath(path).parts
        if attempt.isdecimal() and turn.partition("-")[0].isdecimal():
            found.setdefault((attempt, call, turn), []).append(name)
    return [
        Turn(int(attempt), _step_of(call, steps), call, run.work_dir(int(attempt), call) / turn, tuple(names))
        for (attempt, call, turn), names in sorted(found.items())
    ]


def _files(folder: Place, depth: int) -> list[str]:
    """Paths of so many parts; of an object store with one listing."""
    if not folder.is_local:
        return [path for path in folder.sizes() if path.count("/") == depth - 1]
    if depth == 1:
        return folder.names()
    return [f"{name}/{path}" for name in folder.names() for path in _files(folder / name, depth - 1)]


def _step_of(call: str, steps: Sequence[str]) -> str:
    """A call is named by its step, and by the part of it that is worked on after a hyphen."""
    candidates = [step for step in steps if call == step or call.startswith(f"{step}-")]
    return max(candidates, key=len, default=call)
