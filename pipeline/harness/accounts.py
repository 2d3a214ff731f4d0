"""What the results of the harness have no place for: standard errors, passes, contexts that were cut."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


@dataclass
class Account:
    """Sums over the requests of one kind in one task."""

    num_requests: int = 0
    num_passes: int = 0
    num_cut_requests: int = 0
    num_cut_tokens: int = 0
    nats: list[float] = field(default_factory=list[float])
    variances: list[float] = field(default_factory=list[float])

    def told(self) -> dict[str, Any]:
        """As JSON values."""
        counts = {
            "num_requests": self.num_requests,
            "num_passes": self.num_passes,
            "num_cut_requests": self.num_cut_requests,
            "num_cut_tokens": self.num_cut_tokens,
        }
        if not self.variances:
            return counts
        variance = math.fsum(self.variances)
        errors = {"rms_mc_se": math.sqrt(variance / len(self.variances))}
        if self.nats:
            errors |= {"nats": math.fsum(self.nats), "nats_mc_se": math.sqrt(variance)}
        return counts | errors


class Accounts:
    """By kind of request and task, and a line for each request in a file if one is wanted."""

    def __init__(self, details: str) -> None:
        self._accounts: dict[tuple[str, str], Account] = defaultdict(Account)
        self._details = Path(details) if details else None
        self._mode = "w"
        if self._details is not None:
            try:
                self._details.open("a").close()  # emptied with the first answers: arguments may only be looked at
            except OSError as error:
                raise UserError(f"details is {details}, which cannot be written: {error.strerror}") from None

    def add(self, kind: str, instances: Sequence[Any], lines: Sequence[Mapping[str, Any]], *, adds_up: bool) -> None:
        """Figures of requests in the harness's order.

        ``adds_up``: their noise is independent and their sum means something, as that of a text's likelihood.
        """
        for instance, line in zip(instances, lines, strict=True):
            account = self._accounts[kind, str(instance.task_name or "")]
            account.num_requests += 1
            account.num_passes += line["num_passes"]
            account.num_cut_requests += line["num_cut"] > 0
            account.num_cut_tokens += line["num_cut"]
            if "mc_se" in line:
                account.variances.append(line["mc_se"] ** 2)
                if adds_up:
                    account.nats.append(line["nats"])
        if self._details is not None:
            with self._details.open(self._mode, encoding="utf-8") as handle:
                for instance, line in zip(instances, lines, strict=True):
                    place = {"kind": kind, "task": instance.task_name, "doc_id": instance.doc_id, "idx": instance.idx}
                    handle.write(json.dumps(place | dict(line), allow_nan=False) + "\n")
            self._mode = "a"

    def cut(self, kind: str) -> dict[str, tuple[int, int]]:
        """Requests of each task whose context was cut, of how many."""
        own = {task: account for (of, task), account in self._accounts.items() if of == kind}
        return {task: (a.num_cut_requests, a.num_requests) for task, a in own.items() if a.num_cut_requests}

    def told(self) -> dict[str, dict[str, Any]]:
        """All of them, by kind and task."""
        found: dict[str, dict[str, Any]] = {}
        for (kind, task), account in sorted(self._accounts.items()):
            found.setdefault(kind, {})[task] = account.told()
        return found
