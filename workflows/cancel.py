"""The request to stop a run: a file that everybody who works on the run looks at."""

import math
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
        self._next_s, self._overdue_at_s = 0.0, math.inf
        self._seen: dict[str, Any] | None = None
        self.is_cancel = False
        """Whether a request that was seen is for good."""

    def request(self, grace_s: float | None = None, is_cancel: bool = False) -> None:
        """Ask all stages to save and stop; those that have not after ``grace_s`` are ended.

        A run that is cancelled is not to be started again by itself, as one whose machine is wanted back may be: the
        request to cancel takes the place of another one, and no other takes its.
        """
        data = json_bytes({"grace_s": grace_s, "cancel": is_cancel, "time": time.time()})
        if is_cancel:
            self._file.write(data)
        else:
            self._file.create(data)
        self._next_s = 0.0

    def withdraw(self) -> None:
        """Take the request back."""
        self._file.remove()

    def clear(self, is_wanted_again: bool) -> None:
        """At the start of an attempt: forget what an earlier one was asked.

        A run that somebody cancelled goes on only if it is wanted again, not because a job was started anew by itself.
        """
        found = _read(self._file)
        if found is not None and (is_wanted_again or found.get("cancel") is not True):
            self.withdraw()

    def is_requested(self, at_once: bool = False) -> bool:
        """Whether the run was asked to stop; a later request may leave less time, or be for good."""
        now = time.monotonic()
        if at_once or now >= self._next_s:
            self._next_s = now + self._every_s
            found = _read(self._file)
            if found is not None and found != self._seen:
                self._seen = found
                self.is_cancel |= found.get("cancel") is True
                if isinstance(grace_s := found.get("grace_s"), int | float):
                    self._overdue_at_s = min(self._overdue_at_s, now + grace_s)
        return self._seen is not None

    def is_overdue(self) -> bool:
        """Whether the time is up that a request left for saving."""
        return time.monotonic() >= self._overdue_at_s


def _read(file: Place) -> dict[str, Any] | None:
    """What a request says, None if there is none; one that says nothing leaves all the time that is needed."""
    try:
        value = read_json(file)
    except FileNotFoundError:
        return None
    except CorruptionError:
        return {}
    return value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType]
