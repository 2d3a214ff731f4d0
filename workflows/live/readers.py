"""What of a run is read again and again while it goes on: each reader remembers what cannot change any more."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workflows.cost import Cost, cost_of_turn, total_of, usages_of
from workflows.live.history import Costs
from workflows.report.data import Metrics
from workflows.store import RunPlace
from workflows.turns import Turn, find_turns

_MOST_LINES = 4000
"""Of a training's metrics that are kept, whatever its length: a chart is 1070 pixels wide."""
_FIRST_BYTES = 200


class CostReader:
    """What the processes of a run used, from the records that they leave in its work folder."""

    def __init__(self, run: RunPlace, steps: Sequence[str]) -> None:
        self._run, self._steps = run, steps
        self._over: dict[str, tuple[Cost, float]] = {}

    def read(self, most: int) -> Costs:
        """Costs by attempt and step; of calls that are not known to be over, at most ``most`` are looked at."""
        of: dict[tuple[int, str], list[Cost]] = {}
        signs: dict[tuple[int, str, int], float] = {}
        num_looked_at = num_unread = 0
        turns = find_turns(self._run, self._steps)
        for turn in turns:
            if turn.folder.key not in self._over:
                if num_looked_at >= most:
                    num_unread += 1
                    continue
                num_looked_at += 1
            cost, elapsed_s = self._turn(turn, turn.attempt < turns[-1].attempt)
            key = turn.attempt, turn.step
            of.setdefault(key, []).append(cost)
            signs[*key, turn.epoch] = max(elapsed_s, signs.get((*key, turn.epoch), 0.0))
        sums = {(attempt, step): total_of(costs, step, attempt) for (attempt, step), costs in of.items()}
        return Costs(sums, signs, num_unread)

    def _turn(self, turn: Turn, is_past: bool) -> tuple[Cost, float]:
        """What a turn used, and how long its longest process was there."""
        if (found := self._over.get(turn.folder.key)) is not None:
            return found
        used = usages_of(turn)
        cost = cost_of_turn(turn, used)
        elapsed_s = max((one.elapsed_s for one in used), default=0.0)
        if is_past or turn.is_done:
            self._over[turn.folder.key] = cost, elapsed_s
        return cost, elapsed_s


class MetricsReader:
    """The metrics of a training while they are written: only what is new is read, and few lines are kept.

    Each time there are too many, every second one goes; those stay that have a figure which the others lack, such as
    a validation.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._position, self._first, self._inode = 0, b"", 0
        self._lines: list[dict[str, Any]] = []
        self._usual: set[str] = set()
        self._every, self._count, self._not_finite = 1, 0, 0

    def read(self) -> Metrics:
        """What there is; nothing of a file that is not there."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return Metrics()
        with file:
            inode = self._path.stat().st_ino
            if inode != self._inode or file.read(len(self._first)) != self._first:
                self._begin()  # rewound to a checkpoint by a training that goes on, which puts another file here
            self._inode = inode
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # it is being written
                self._position += len(line)
                self._first = self._first or line[:_FIRST_BYTES]
                self._take(line)
        return Metrics(tuple(self._lines), self._count, self._not_finite, self._every)

    def _take(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            step = values["step"]
        except (ValueError, KeyError, TypeError):
            return  # cut by a kill; the training leaves such lines out as well
        self._count += 1
        self._not_finite += values.get("loss") is None
        self._usual = self._usual & values.keys() if self._usual else set(values)
        if step % self._every == 0 or self._is_rare(values):
            self._lines.append(values)
        if len(self._lines) > _MOST_LINES:
            self._every *= 2
            kept = [one for one in self._lines if one["step"] % self._every == 0 or self._is_rare(one)]
            # With a rare figure in most lines there is no telling them apart.
            self._lines = kept if len(kept) <= _MOST_LINES * 3 // 4 else kept[::2]

    def _is_rare(self, values: Mapping[str, Any]) -> bool:
        return not self._usual.issuperset(values)
