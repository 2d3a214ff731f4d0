"""What of a run is read again and again while it goes on: each reader remembers what cannot change any more."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact import read_json
from pipeline.storage import Place
from workflows.live.history import Cost, Costs
from workflows.report.data import Metrics
from workflows.store import RunPlace

_MOST_LINES = 4000
"""Of a training's metrics that are kept, whatever its length: a chart is 1070 pixels wide."""
_FIRST_BYTES = 200


class EventReader:
    """The events of a run; each is read once, as none ever changes."""

    def __init__(self, run: RunPlace) -> None:
        self._folder = run.directory / "events"
        self._known: dict[str, dict[str, Any]] = {}

    def read(self) -> list[dict[str, Any]]:
        """All of them, in their order."""
        for name in self._folder.names():
            if name not in self._known:
                self._known[name] = read_json(self._folder / name)
        return [self._known[name] for name in sorted(self._known)]


class CostReader:
    """What the processes of a run used, from the records that they leave in its work folder."""

    def __init__(self, run: RunPlace, steps: Iterable[str]) -> None:
        self._work = run.directory / "work"
        self._steps = sorted(steps, key=len, reverse=True)
        self._over: dict[tuple[str, str], tuple[Cost, dict[int, float]]] = {}

    def read(self, most: int) -> Costs:
        """Costs by attempt and step; of calls that are not known to be over, at most ``most`` are looked at."""
        of: dict[tuple[int, str], Cost] = {}
        signs: dict[tuple[int, str, int], float] = {}
        num_looked_at = num_unread = 0
        attempts = self._work.names()
        for attempt in attempts:
            for call in (self._work / attempt).names():
                step = self._step_of(call)
                if step is None:
                    continue
                if (attempt, call) not in self._over:
                    if num_looked_at >= most:
                        num_unread += 1
                        continue
                    num_looked_at += 1
                cost, elapsed_s = self._call(attempt, call, attempt != attempts[-1])
                key = int(attempt), step
                of[key] = of.get(key, Cost()) + cost
                for epoch, seconds in elapsed_s.items():
                    signs[*key, epoch] = max(seconds, signs.get((*key, epoch), 0.0))
        return Costs(of, signs, num_unread)

    def _step_of(self, call: str) -> str | None:
        """Calls are named after their step, and after a shard or a part of it."""
        return next((step for step in self._steps if call == step or call.startswith(f"{step}-")), None)

    def _call(self, attempt: str, call: str, is_past: bool) -> tuple[Cost, dict[int, float]]:
        if (found := self._over.get((attempt, call))) is not None:
            return found
        cost, elapsed_s, is_done = Cost(), dict[int, float](), False
        folder = self._work / attempt / call
        for turn in folder.names():
            epoch = int(turn.partition("-")[0])
            names = (folder / turn).names()
            is_done = is_done or "done.json" in names
            for name in names:
                if name.startswith("usage-"):
                    used = read_json(folder / turn / name)
                    cost += Cost(used["cpu_s"], used["gpus"] * used["elapsed_s"], 1)
                    elapsed_s[epoch] = max(used["elapsed_s"], elapsed_s.get(epoch, 0.0))
        if is_past or is_done:
            self._over[attempt, call] = cost, elapsed_s
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


def latest_progress(work: Place, attempt: int, calls: Iterable[str]) -> dict[str, Any]:
    """The last report of a step that runs as a whole, empty if there is none."""
    for call in calls:
        folder = work / f"{attempt:03d}" / call
        for turn in reversed(folder.names()):
            try:
                return read_json(folder / turn / "progress.json")
            except FileNotFoundError:
                continue
    return {}
