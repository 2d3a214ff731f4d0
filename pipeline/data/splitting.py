"""Where a long text may be cut so that its pieces have, together, the token ids of the whole.

A tokenizer's regex divides a text into words, and the model turns each word into ids by itself.  So a cut is
exact if the words stay the same.  Read each regex as a Glushkov automaton: a set of atoms, each matching one
character, and the pairs of atoms that may follow each other in a match.  Let x | y be the characters around a
place, and let no pair accept (x, y).  Then no match, and no look-ahead, ever gets past y having read x: y does to
everything before it what the end of a text would do, and since there is no look-behind, what follows reads as the
beginning of a text does.  If, besides, some atom matches x alone, x is always inside a word, which ends there.
Nothing depends on the rest of the text, so the proof holds for a document of any length read in parts.

A regex with look-behind, anchors or back-references is not read, and such a tokenizer cuts nowhere.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import Digits, Split

from pipeline.errors import UserError

_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the pre-tokenizer ByteLevel splits by (GPT-2); it is built into tokenizers and not in its files."""
_UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
_INERT = " \t\n\r\u3001\u3002"
"""Characters that no Unicode form changes, composes with a neighbour, or moves anything across."""
_TAIL_CHARS = 64

Accepts = Callable[[str], bool]
Edges = frozenset[tuple[int, int]]


class _UnreadableError(Exception):
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
_QUANTIFIER = re.compile(r"(?:([?*+])|\{(\d+)(?:,\d*)?\})([?+]?)")
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
            sign, least, manner = match.groups()
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

    def _unreadable(self) -> _UnreadableError:
        return _UnreadableError(
            f"its regex has {self.pattern[self.place : self.place + 12]!r}, whose reach is not known"
        )


@dataclass(frozen=True)
class _Stage:
    """One step of a pre-tokenizer."""

    accepts: tuple[Accepts, ...]
    """One test of a character for each atom."""
    follow: Edges
    alone: tuple[tuple[frozenset[int], frozenset[int]], ...]
    """For each alternative, the atoms that match it with one character, and those that must not accept it."""

    def verdict(self, x: str, y: str) -> tuple[bool, bool]:
        """Whether a match may go from x on to y, and whether x is always inside a match."""
        before = {atom for atom, accepts in enumerate(self.accepts) if accepts(x)}
        after = {atom for atom, accepts in enumerate(self.accepts) if accepts(y)}
        is_joined = any(p in before and q in after for p, q in self.follow)
        is_covered = any(atoms & before and not rivals & before for atoms, rivals in self.alone)
        return is_joined, is_covered


def _regex_stage(pattern: str) -> _Stage:
    reader = _Reader(pattern)
    nodes = reader.alternatives()
    if reader.place < len(pattern) or any(node.nullable for node in nodes):
        raise _UnreadableError(f"its regex {pattern!r} matches without a character, or is not well formed")
    follow = frozenset[tuple[int, int]]().union(*(node.follow for node in nodes))
    alone: list[tuple[frozenset[int], frozenset[int]]] = []
    for node in nodes:
        # A possessive part does not give back what it took, so no other atom may be able to take x first.
        members = node.first | node.last | frozenset(atom for pair in node.follow for atom in pair)
        alone += [(frozenset([a]), members - {a} if reader.is_possessive else frozenset()) for a in node.alone]
    return _Stage(tuple(map(_one_character, reader.atoms)), follow, tuple(alone))


def _one_character(atom: str) -> Accepts:
    """Ask the engine of the tokenizer itself, whose Unicode tables decide."""
    removal = Split(Regex(atom), "removed")
    return lambda character: not removal.pre_tokenize_str(character)


def _is_digit(character: str) -> bool:
    return len(Digits(individual_digits=True).pre_tokenize_str(f"a{character}a")) == 3


def _flatten(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    if spec is None:
        return []
    if spec["type"] == "Sequence":
        return [one for part in spec["pretokenizers"] for one in _flatten(part)]
    return [spec]


def _stages(spec: dict[str, Any]) -> Iterator[_Stage]:
    match spec:
        case {"type": "ByteLevel"}:
            if spec.get("use_regex", True):
                yield _regex_stage(_BYTE_LEVEL)
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated" | "Removed"}:
            yield _regex_stage(pattern)
        case {"type": "Split", "pattern": {"String": str(literal)}, "behavior": "Isolated" | "Removed"}:
            yield _regex_stage(re.escape(literal))
        case {"type": "Digits", "individual_digits": bool(is_single)}:
            loop: Edges = frozenset() if is_single else frozenset([(0, 0)])
            yield _Stage((_is_digit,), loop, ((frozenset([0]), frozenset()),))
        case _:
            raise _UnreadableError(f"its pre-tokenizer {spec['type']} is not one whose words are known to end")


def _spec(component: Any) -> dict[str, Any] | None:
    return json.loads(component.__getstate__()) if component is not None else None


def _check_normalizer(spec: dict[str, Any] | None) -> None:
    if spec and spec["type"] == "Sequence":
        for part in spec["normalizers"]:
            _check_normalizer(part)
    elif spec and spec["type"] not in _UNICODE_FORMS:
        raise _UnreadableError(f"its normalizer {spec['type']} may change text across a cut")


@dataclass(frozen=True)
class CutRule:
    """Where one tokenizer lets a text be cut."""

    stages: tuple[_Stage, ...] = ()
    normalizer: Normalizer | None = None
    words: tuple[str, ...] = ()
    """Added tokens, which are looked for in a text before anything else."""
    is_prefixed: bool = False
    """A space is put in front of a text that has none."""
    obstacle: str = ""
    """Why there is no safe place at all; empty if there are."""
    _known: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    def is_safe(self, text: str, place: int) -> bool:
        """Whether text[:place] and text[place:] have the ids of text, whatever comes before and after text."""
        if not 0 < place < len(text) or self.obstacle:
            return False
        x, y = text[place - 1], text[place]
        if self.normalizer and not self._is_inert(text, place):
            return False
        if self.normalizer and not x.isascii():
            start = max(text.rfind(mark, max(0, place - _TAIL_CHARS), place) for mark in _INERT)
            if start < 0:
                return False
            if x + y in self._word_pairs:
                return False
            x = self.normalizer.normalize_str(text[start:place])[-1]
            # After a word the text is normalized by itself, so that x would be another character than here.
            return self._may_part(x, y) and not self._ends_word(text, start + 1, place - 1)
        return self._may_part(x, y)

    def last_cut(self, text: str, low: int, high: int) -> int | None:
        """The last safe place in (low, high], or None."""
        if self.obstacle:
            return None
        known = self._known
        for place in range(min(high, len(text) - 1), low, -1):
            if known.get(text[place - 1 : place + 1], True) and self.is_safe(text, place):
                return place
        return None

    def _is_inert(self, text: str, place: int) -> bool:
        """Whether the normalizer treats both sides alone as it treats them together, and leaves text[place]."""
        if text[place] in _INERT:
            return True
        return place + 1 < len(text) and text[place : place + 2].isascii()

    def _ends_word(self, text: str, low: int, high: int) -> bool:
        """Whether the last character of a word lies in text[low:high]."""
        return any(text.find(word, max(0, low + 1 - len(word)), high) >= 0 for word in self.words)

    @cached_property
    def _word_pairs(self) -> frozenset[str]:
        """All that stands side by side in a word: no cut there."""
        return frozenset(x + y for word in self.words for x, y in pairwise(word))

    def _may_part(self, x: str, y: str) -> bool:
        known = self._known.get(x + y)
        if known is None:
            known = self._known[x + y] = self._judge(x, y)
        return known

    def _judge(self, x: str, y: str) -> bool:
        if self.is_prefixed and y != " ":
            return False
        # Such a character may match two letters of a regex that ignores case.
        if len(x.casefold()) > 1 or len(y.casefold()) > 1 or x + y in self._word_pairs:
            return False
        for stage in self.stages:
            is_joined, is_covered = stage.verdict(x, y)
            if is_joined or is_covered:
                return not is_joined
        return False


def find_cut_rule(tokenizer: Tokenizer) -> CutRule:
    """Read a tokenizer's parts; where nothing can be proven, a rule that allows no cut and says why."""
    try:
        _check_normalizer(_spec(tokenizer.normalizer))
        steps = _flatten(_spec(tokenizer.pre_tokenizer))
        if not steps:
            raise _UnreadableError("it has no pre-tokenizer, so a whole text is one word")
        if any(step["type"] == "ByteLevel" for step in steps[:-1]):
            raise _UnreadableError("its pre-tokenizer splits by the characters that ByteLevel makes")
        stages = tuple(stage for step in steps for stage in _stages(step))
        is_prefixed = any(step.get("add_prefix_space") for step in steps)
        words: list[str] = []
        for token in tokenizer.get_added_tokens_decoder().values():
            # The spelling of a special token is text, but it hides the ordinary added tokens that are found within it.
            if not token.special and (token.lstrip or token.rstrip or token.single_word):
                raise _UnreadableError(f"its added token {token.content!r} looks at the characters around it")
            words.append(token.content)
            if tokenizer.normalizer:
                words.append(tokenizer.normalizer.normalize_str(token.content))
    except _UnreadableError as error:
        return CutRule(obstacle=str(error))
    return CutRule(stages, tokenizer.normalizer, tuple(words), is_prefixed)


def cut_document(
    parts: Iterable[str], rule: CutRule, piece_chars: int, max_chars: int, name: str
) -> Iterator[tuple[str, bool]]:
    """Pieces of a document, and of each whether it is the last; a document up to ``piece_chars`` is one piece.

    A stretch without a safe place is kept whole up to ``max_chars`` characters; UserError beyond.
    """
    pending, searched = "", 0
    for part in parts:
        pending = pending + part if pending else part
        start = 0
        while len(pending) - start > piece_chars:
            low = start + searched
            high = max(start + piece_chars, low)
            cut = None
            while cut is None and low < len(pending) - 1 and high - start <= max_chars + piece_chars:
                cut = rule.last_cut(pending, low, high)
                low, high = high, high + piece_chars
            end = len(pending) if cut is None else cut
            if end - start > max_chars:
                why = rule.obstacle or "in these there is no such place"
                raise UserError(
                    f"{name}: {end - start:,} characters or more would have to be encoded at once, and the limit is "
                    f"{max_chars:,}. A long text is cut where the tokenizer divides it into words for certain, but "
                    f"{why}. Leave the document out or divide it, or take a byte-level tokenizer"
                )
            if cut is None:
                # The last two places depend on what comes next.
                searched = max(0, len(pending) - 2 - start)
                break
            yield pending[start:cut], False
            start, searched = cut, 0
        pending = pending[start:]
    yield pending, True
