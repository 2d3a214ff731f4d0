"""The request to stop a run: a file that everybody who works on the run looks at."""

import time
from typing import Any

from pipeline.artifact import json_bytes, read_json
from pipeline.errors import CorruptionError
from pipeline.storage import Place


class CancelFile:
    """Looks at the request of a run, on an object store not too often."""

    def __init__(self, file: Place) -> None:
        self._file = file
        self._every_s = 0.0 if file.is_local else file.storage.poll_s
        self._next_s, self._since_s = 0.0, 0.0
        self._grace_s: float | None = None

    def request(self, grace_s: float | None = None) -> None:
        """Ask all stages to save and stop; those that have not after ``grace_s`` are ended."""
        self._file.write(json_bytes({"grace_s": grace_s, "time": time.time()}))
        self._next_s = 0.0

    def is_requested(self) -> bool:
        """Whether the run was asked to stop."""
        now = time.monotonic()
        if not self._since_s and now >= self._next_s:
            self._next_s = now + self._every_s
            if self._file.exists():
                self._since_s, self._grace_s = now, _grace_s(self._file)
        return self._since_s > 0

    def is_overdue(self) -> bool:
        """Whether the time is up that the request left for saving."""
        return self._grace_s is not None and time.monotonic() - self._since_s >= self._grace_s


def _grace_s(file: Place) -> float | None:
    """What a request says; one that says nothing leaves all the time that is needed."""
    try:
        value: Any = read_json(file)
    except CorruptionError:
        return None
    found = value.get("grace_s") if isinstance(value, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    return float(found) if isinstance(found, int | float) else None
