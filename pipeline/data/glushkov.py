"""A regex as its Glushkov automaton: the atoms that match one character each, and which may follow which in a match."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

Accepts = Callable[[str], bool]
Edges = frozenset[tuple[int, int]]


class UnreadableError(Exception):
    """Why no place for a cut can be proven safe."""


@dataclass(frozen=True)
class _Node:
    """Part of a regex, by the numbers of its atoms."""

    first: frozenset[int] = frozenset()
    last: frozenset[int] = frozenset()
    follow: Edges = frozenset()
    alone: frozenset[int] = frozenset()
    """Atoms that match the part with one character."""
    nullable: bool = True
    skippable: bool = True
    """Matches nothing anywhere; a look-ahead is nullable, yet can fail."""


def _either(a: _Node, b: _Node) -> _Node:
    nullable, skippable = a.nullable or b.nullable, a.skippable or b.skippable
    return _Node(a.first | b.first, a.last | b.last, a.follow | b.follow, a.alone | b.alone, nullable, skippable)


def _then(a: _Node, b: _Node) -> _Node:
    return _Node(
        first=a.first | b.first if a.nullable else a.first,
        last=a.last | b.last if b.nullable else b.last,
        follow=a.follow | b.follow | _pairs(a.last, b.first),
        alone=(a.alone if b.skippable else frozenset()) | (b.alone if a.skippable else frozenset()),
        nullable=a.nullable and b.nullable,
        skippable=a.skippable and b.skippable,
    )


def _pairs(left: frozenset[int], right: frozenset[int]) -> Edges:
    return frozenset((p, q) for p in left for q in right)


def _repeat(a: _Node, least: int, is_loop: bool) -> _Node:
    """An upper limit above one counts as none, which only adds pairs."""
    alone = a.alone if least < 2 else frozenset[int]()
    follow = a.follow | _pairs(a.last, a.first) if is_loop else a.follow
    return _Node(a.first, a.last, follow, alone, a.nullable or least == 0, a.skippable or least == 0)


_CLASS = r"\[\^?+(?:[^\[\]\\]|\\[pP]\{\^?\w+\}|\\.|\[\^?(?:[^\[\]\\]|\\.)+\])+\]"
_ATOM = re.compile(
    rf"{_CLASS}|\\[pP]\{{\^?\w+\}}|\\[sSdDwWrnt]|\\u[0-9A-Fa-f]{{4}}|\\x[0-7][0-9A-Fa-f]|\\[^\w]|[^\\\[\](){{}}|?*+^$]",
    re.DOTALL | re.ASCII,
)
_QUANTIFIER = re.compile(r"(?:([?*+])|\{(\d+)(,\d*)?\})([?+]?)")
_GROUP = re.compile(r"\((\?:|\?i:|\?!|\?=|(?!\?))")


@dataclass
class _Reader:
    """Reads one regex; ``atoms`` are patterns of one character each."""

    pattern: str
    place: int = 0
    atoms: list[str] = field(default_factory=list)
    is_possessive: bool = False

    def alternatives(self, ignore_case: bool = False) -> list[_Node]:
        found = [self._sequence(ignore_case)]
        while self.pattern.startswith("|", self.place):
            self.place += 1
            found.append(self._sequence(ignore_case))
        return found

    def _sequence(self, ignore_case: bool) -> _Node:
        node = _Node()
        while self.place < len(self.pattern) and self.pattern[self.place] not in "|)":
            node = _then(node, self._quantified(ignore_case))
        return node

    def _quantified(self, ignore_case: bool) -> _Node:
        node = self._item(ignore_case)
        while match := _QUANTIFIER.match(self.pattern, self.place):
            sign, least, upper, manner = match.groups()
            # Oniguruma reads {n}? as "n times, or not at all", and {n,m} with n > m as something else again.
            if least is not None and (
                int((upper or "")[1:] or least) < int(least) or (upper is None and manner == "?")
            ):
                raise self._unreadable()
            self.is_possessive |= manner == "+"
            node = _repeat(node, int(least) if least is not None else 0 if sign in "?*" else 1, sign != "?")
            self.place = match.end()
        return node

    def _item(self, ignore_case: bool) -> _Node:
        if match := _GROUP.match(self.pattern, self.place):
            self.place = match.end()
            kind = match.group(1)
            node = _Node(frozenset(), frozenset(), frozenset(), frozenset(), nullable=False, skippable=False)
            for alternative in self.alternatives(ignore_case or kind == "?i:"):
                node = _either(node, alternative)
            if not self.pattern.startswith(")", self.place):
                raise self._unreadable()
            self.place += 1
            if kind in ("?!", "?="):
                node = _Node(node.first, node.last, node.follow, frozenset(), nullable=True, skippable=False)
            return node
        match = _ATOM.match(self.pattern, self.place)
        # An atom beyond ASCII may match several characters of another case; one for two ASCII letters, see _judge.
        if not match or (ignore_case and not (match.group().isascii() and len(match.group()) == 1)):
            raise self._unreadable()
        self.place = match.end()
        self.atoms.append(f"(?i:{match.group()})" if ignore_case else match.group())
        own = frozenset([len(self.atoms) - 1])
        return _Node(own, own, frozenset(), own, nullable=False, skippable=False)

    def _unreadable(self) -> UnreadableError:
        return UnreadableError(
            f"its regex has {self.pattern[self.place : self.place + 12]!r}, whose reach is not known"
        )


@dataclass(frozen=True)
class Automaton:
    """What one step of a pre-tokenizer splits by."""

    accepts: tuple[Accepts, ...]
    """One test of a character for each atom."""
    follow: Edges
    alone: tuple[tuple[frozenset[int], frozenset[int]], ...]
    """For each alternative, the atoms that match it with one character, and those that must not accept it."""

    def accepting(self, character: str) -> frozenset[int]:
        """The atoms that match a character."""
        return frozenset(atom for atom, accepts in enumerate(self.accepts) if accepts(character))

    def verdict(self, before: frozenset[int], after: frozenset[int]) -> tuple[bool, bool]:
        """Whether a match may go from x on to y, and whether x is always inside a match, by their atoms."""
        is_joined = any(p in before and q in after for p, q in self.follow)
        is_covered = any(atoms & before and not rivals & before for atoms, rivals in self.alone)
        return is_joined, is_covered


def read_regex(pattern: str) -> Automaton:
    """The automaton of a regex as tokenizers takes it; UnreadableError if some part has a reach that is not known."""
    reader = _Reader(pattern)
    nodes = reader.alternatives()
    if reader.place < len(pattern) or any(node.nullable for node in nodes):
        raise UnreadableError(f"its regex {pattern!r} matches without a character, or is not well formed")
    follow = frozenset[tuple[int, int]]().union(*(node.follow for node in nodes))
    alone: list[tuple[frozenset[int], frozenset[int]]] = []
    for node in nodes:
        # A possessive part does not give back what it took, so no other atom may be able to take x first.
        members = node.first | node.last | frozenset(atom for pair in node.follow for atom in pair)
        alone += [(frozenset([a]), members - {a} if reader.is_possessive else frozenset()) for a in node.alone]
    return Automaton(tuple(map(_one_character, reader.atoms)), follow, tuple(alone))


def _one_character(atom: str) -> Accepts:
    """Ask the engine of the tokenizer itself, whose Unicode tables decide."""
    removal = Split(Regex(atom), "removed")
    return lambda character: not removal.pre_tokenize_str(character)
