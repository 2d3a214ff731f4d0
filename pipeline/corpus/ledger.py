"""What happened to the records of one shard: counts, and the rejects with file, line and reason."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TextIO


@dataclass
class Ledger:
    """Counts of one shard; rejects are written as they come, since there may be many."""

    rejects: TextIO
    files: int = 0
    """Files whose beginning was read."""
    records: int = 0
    broken: int = 0
    lines: int = 0
    """Lines that start in the byte range of this shard, so that the next range can tell its line numbers."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> number of documents left out without being broken (empty, undecodable)."""
    replaced_by_file: Counter[str] = field(default_factory=Counter)
    """File -> documents in which undecodable bytes were replaced."""
    skipped_by_file: Counter[str] = field(default_factory=Counter)

    def reject(self, file: str, line: int, reason: str) -> None:
        """Set one broken record aside."""
        self.broken += 1
        self._note(file, line, reason, is_broken=True)

    def skip_undecodable(self, file: str, line: int, reason: str) -> None:
        """Leave out one document that is not UTF-8, as the user asked."""
        self.skipped_by_file[file] += 1
        self.dropped["undecodable"] += 1
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
