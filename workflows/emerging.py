"""Text that emerges from masks, in the terminal: redrawn in place, or frame after frame where there is no terminal."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.text import Text

from workflows.report.text import visible

MASK = "░"
State = Literal["masked", "new", "old"]
_STYLES: dict[State, str] = {"masked": "dim", "new": "bold black on yellow", "old": ""}


def runs(ids: Sequence[int], before: Sequence[int], mask_token_id: int) -> Iterator[tuple[State, list[int]]]:
    """Neighbouring tokens that are masked, new since the row was ``before``, or old."""

    def state(pair: tuple[int, int]) -> State:
        now, was = pair
        return "masked" if now == mask_token_id else "old" if now == was else "new"

    for kind, run in groupby(zip(ids, before, strict=True), key=state):
        yield kind, [now for now, _ in run]


class Emerging:
    """Shows one row after another while they are filled."""

    def __init__(self, console: Console, decode: Callable[[list[int]], str], mask_token_id: int) -> None:
        self._console, self._decode, self._mask = console, decode, mask_token_id
        self._live: Live | None = None
        self._title = ""
        self._before: Sequence[int] = ()

    def __enter__(self) -> "Emerging":
        return self

    def __exit__(self, *details: Any) -> None:
        self._end()

    def look(self, title: str, num_passes: int, first: Sequence[int], ids: Sequence[int]) -> None:
        """The row called ``title``, which was ``first`` before its first pass, after so many passes."""
        if title != self._title:
            self._begin(title, first)
        self._show(num_passes, ids)

    def _begin(self, title: str, first: Sequence[int]) -> None:
        self._end()
        self._title, self._before = title, first
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.__enter__()
        self._show(0, first)

    def _show(self, num_passes: int, ids: Sequence[int]) -> None:
        frame = Text.assemble((f"-- {self._title}: pass {num_passes}\n", "dim"), self._frame(ids))
        self._before = ids
        if self._live is not None:
            self._live.update(frame, refresh=True)
        else:
            self._console.print(frame, highlight=False, markup=False, soft_wrap=True)

    def _frame(self, ids: Sequence[int]) -> Text:
        text = Text()
        for state, run in runs(ids, self._before, self._mask):
            words = MASK * len(run) if state == "masked" else visible(self._decode(run))
            text.append(words, style=_STYLES[state])
        return text

    def _end(self) -> None:
        """The last frame stays."""
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None
