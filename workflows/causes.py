"""Why an attempt ended, in the same words in dlm status and on the page of a run."""

import re
from collections.abc import Mapping

_SESSION_ENDS: Mapping[str, str] = {
    "killed": "ended without a last entry: its coordinator was killed, or interrupted",
    "stopped": "stopped on request",
    "cancelled": "cancelled on request",
}
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def ended_words(outcome: str) -> str:
    """How an attempt of the run ended, or that it goes on."""
    return _SESSION_ENDS.get(outcome, outcome)


def failure_words(kind: str, message: str) -> str:
    """What a failure says; of a worker that died a line, the end of what may be a long traceback of others."""
    message = _COLOURS.sub("", message)
    if kind != "WorkerDied":
        return message
    last = message.strip().rpartition("\n")[2].partition(". ")[0]
    return f"a worker ended without a result: {last}" if last else "a worker ended without a result"
