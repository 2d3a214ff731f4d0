"""What addresses the noise of a request of the harness, and what the requests of one document share."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_BITS = 63
"""An int64 that is not negative."""


@dataclass(frozen=True)
class Address:
    """A document of a task, by what is in it: its number changes with ``samples`` and ``limit``."""

    task: str
    document: str

    def number(self, *words: int) -> int:
        """A number of 63 bits, the same wherever it is computed."""
        text = json.dumps([self.task, self.document, *words])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> (64 - _BITS)


def address_of(instance: Any) -> Address:
    """Where the noise of a request lies; choices of one question, of whatever length, have one address.

    Requests that come from no task are addressed by their context.
    """
    if instance.task_name is None or instance.doc is None:
        return Address("", str(instance.args[0]))
    return Address(str(instance.task_name), json.dumps(instance.doc, sort_keys=True, default=str))


def repetitions(instances: Sequence[Any]) -> list[int]:
    """How often each request has come before: a task that wants several answers sends the same one several times."""
    counts: dict[int, int] = {}
    found = []
    for instance in instances:
        found.append(counts.get(id(instance), 0))
        counts[id(instance)] = found[-1] + 1
    return found
