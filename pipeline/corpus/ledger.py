"""What happened to the records of one shard: counts, and the rejects with file, line and reason."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

OTHERS = "(others)"
"""Where a table counts what it does not list."""
_LISTED = 100


def tally(table: Counter[str], key: str, number: int = 1) -> None:
    """Count under a key; a table lists the first 100 by name, whatever the order they come in, and the rest as one."""
    table[key] += number
    if len(table) - (OTHERS in table) > _LISTED:
        last = max(table.keys() - {OTHERS})
        table[OTHERS] += table.pop(last)


@dataclass
class Ledger:
    """Counts of one shard; rejects are written as they come, since there may be many."""

    rejects: TextIO
    go_on: Callable[[], None] = lambda: None
    """Called for every record and every part of a giant one; raises Stopped once the run was asked to stop."""
    files: int = 0
    """Files whose beginning was read."""
    records: int = 0
    broken: int = 0
    lines: int = 0
    """Lines that start in the byte range of this shard, so that the next range can tell its line numbers."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> number of documents left out without being broken (empty, undecodable); as all tables, of 100 at most
    and "(others)": a hook may give a reason for each document."""
    replaced_by_file: Counter[str] = field(default_factory=Counter)
    """File -> documents in which undecodable bytes were replaced."""
    skipped_by_file: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str) -> None:
        """Leave out one document that is not broken."""
        tally(self.dropped, reason)

    def replace_undecodable(self, file: str) -> None:
        """Keep one document with its bad bytes replaced."""
        tally(self.replaced_by_file, file)

    def reject(self, file: str, line: int, reason: str) -> None:
        """Set one broken record aside."""
        self.broken += 1
        self._note(file, line, reason, is_broken=True)

    def skip_undecodable(self, file: str, line: int, reason: str) -> None:
        """Leave out one document that is not UTF-8, as the user asked."""
        tally(self.skipped_by_file, file)
        self.drop("undecodable")
        self._note(file, line, reason, is_broken=False)

    def _note(self, file: str, line: int, reason: str, *, is_broken: bool) -> None:
        reject = {"file": file, "line": line, "reason": reason, "broken": is_broken}
        self.rejects.write(json.dumps(reject) + "\n")

    def counts(self) -> dict[str, Any]:
        """All counts as JSON values."""
        return {
            "files": self.files,
            "records": self.records,
            "broken": self.broken,
            "lines": self.lines,
            "dropped": dict(self.dropped),
            "replaced_by_file": dict(self.replaced_by_file),
            "skipped_by_file": dict(self.skipped_by_file),
        }
