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
        self.is_cancel = False
        """Whether the request that was seen is for good."""

    def request(self, grace_s: float | None = None, is_cancel: bool = False) -> None:
        """Ask all stages to save and stop; those that have not after ``grace_s`` are ended.

        A run that is cancelled is not to be started again by itself, as one whose machine is wanted back may be.
        """
        self._file.write(json_bytes({"grace_s": grace_s, "cancel": is_cancel, "time": time.time()}))
        self._next_s = 0.0

    def withdraw(self) -> None:
        """Take the request back."""
        self._file.remove()

    def clear(self, is_wanted_again: bool) -> None:
        """At the start of an attempt: forget what an earlier one was asked.

        A run that somebody cancelled goes on only if it is wanted again, not because a job was started anew by itself.
        """
        if self._file.exists() and (is_wanted_again or _read(self._file).get("cancel") is not True):
            self.withdraw()

    def is_requested(self) -> bool:
        """Whether the run was asked to stop."""
        now = time.monotonic()
        if not self._since_s and now >= self._next_s:
            self._next_s = now + self._every_s
            if self._file.exists():
                value = _read(self._file)
                grace_s = value.get("grace_s")
                self._grace_s = float(grace_s) if isinstance(grace_s, int | float) else None
                self._since_s, self.is_cancel = now, value.get("cancel") is True
        return self._since_s > 0

    def is_overdue(self) -> bool:
        """Whether the time is up that the request left for saving."""
        return self._grace_s is not None and time.monotonic() - self._since_s >= self._grace_s


def _read(file: Place) -> dict[str, Any]:
    """What a request says; one that says nothing leaves all the time that is needed."""
    try:
        value = read_json(file)
    except CorruptionError:
        return {}
    return value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType]
