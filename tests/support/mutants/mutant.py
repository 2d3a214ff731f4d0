"""One fault in one file: a span of the source and what stands there instead."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Mutant:
    """A module whose source differs in one span; the rest is byte-identical."""

    module: str
    source: str
    start: int
    end: int
    """Half-open span of the UTF-8 encoded source, as the syntax tree counts columns."""
    new: str
    name: str
    """What kind of fault it is."""

    @cached_property
    def mutated(self) -> str:
        """The whole source with the fault in it."""
        text = self.source.encode()
        return (text[: self.start] + self.new.encode() + text[self.end :]).decode()

    @property
    def old(self) -> str:
        """What stands in the span of the source."""
        return self.source.encode()[self.start : self.end].decode()

    @property
    def line(self) -> int:
        """Number of the first line of the span, from 1."""
        return self.source.encode()[: self.start].count(b"\n") + 1

    @property
    def before(self) -> str:
        """The lines that the span touches, with every run of blanks made one."""
        return self._lines(self.source, self.end)

    @property
    def after(self) -> str:
        """The same lines with the fault in them."""
        return self._lines(self.mutated, self.start + len(self.new.encode()))

    @property
    def key(self) -> tuple[str, str, str]:
        """What names the mutant wherever it moves to: module, text before, text after."""
        return self.module, self.before, self.after

    def _lines(self, source: str, end: int) -> str:
        text = source.encode()
        first = text.rfind(b"\n", 0, self.start) + 1
        last = text.find(b"\n", end)
        return " ".join(text[first : last if last >= 0 else len(text)].decode().split())


@dataclass(frozen=True)
class Planted:
    """A text that occurs exactly once in a module, and the wrong one in its place."""

    module: str
    name: str
    old: str
    new: str
