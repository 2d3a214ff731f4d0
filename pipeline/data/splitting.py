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
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import Digits

from pipeline.data.glushkov import Automaton, Edges, UnreadableError, read_regex
from pipeline.errors import UserError

_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the pre-tokenizer ByteLevel splits by (GPT-2); it is built into tokenizers and not in its files."""
_UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
_INERT = " \t\n\r\u3001\u3002"
"""Characters that no Unicode form changes, composes with a neighbour, or moves anything across."""
_TAIL_CHARS = 64
_WINDOW_CHARS = 1 << 12
_NUM_ASCII, _NUM_CODES = 0x80, 0x110000


def _is_digit(character: str) -> bool:
    return len(Digits(individual_digits=True).pre_tokenize_str(f"a{character}a")) == 3


def _flatten(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    if spec is None:
        return []
    if spec["type"] == "Sequence":
        return [one for part in spec["pretokenizers"] for one in _flatten(part)]
    return [spec]


def _automata(spec: dict[str, Any]) -> Iterator[Automaton]:
    match spec:
        case {"type": "ByteLevel"}:
            if spec.get("use_regex", True):
                yield read_regex(_BYTE_LEVEL)
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated" | "Removed"}:
            yield read_regex(pattern)
        case {"type": "Split", "pattern": {"String": str(literal)}, "behavior": "Isolated" | "Removed"}:
            yield read_regex(re.escape(literal))
        case {"type": "Digits", "individual_digits": bool(is_single)}:
            loop: Edges = frozenset() if is_single else frozenset([(0, 0)])
            yield Automaton((_is_digit,), loop, ((frozenset([0]), frozenset()),))
        case _:
            raise UnreadableError(f"its pre-tokenizer {spec['type']} is not one whose words are known to end")


def _spec(component: Any) -> dict[str, Any] | None:
    return json.loads(component.__getstate__()) if component is not None else None


def _check_normalizer(spec: dict[str, Any] | None) -> None:
    if spec and spec["type"] == "Sequence":
        for part in spec["normalizers"]:
            _check_normalizer(part)
    elif spec and spec["type"] not in _UNICODE_FORMS:
        raise UnreadableError(f"its normalizer {spec['type']} may change text across a cut")


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _pair_numbers(codes: np.ndarray) -> np.ndarray:
    """One number for each two neighbours."""
    return codes[:-1].astype(np.int64) * _NUM_CODES + codes[1:]


@dataclass(frozen=True)
class _Kind:
    """All that the rule sees of a character but which one it is."""

    accepting: tuple[frozenset[int], ...]
    """The atoms of each automaton that match it."""
    is_space: bool
    is_unsure: bool
    """Half of a surrogate pair, or one that may match two letters of a regex that ignores case."""


class _Kinds:
    """Which characters may be parted; it learns each when it is first met, and alike characters are judged once."""

    def __init__(
        self, look: Callable[[str], _Kind], judge: Callable[[_Kind, _Kind], bool], inseparable: Iterable[str]
    ) -> None:
        self._look, self._judge = look, judge
        self._numbers: dict[_Kind, int] = {}
        self._of_code = np.full(_NUM_CODES, -1, np.int32)
        self._may_part = np.zeros((0, 0), bool)
        self._inseparable = np.sort(_pair_numbers(_codes("".join(inseparable)))[::2])
        self._leads = np.zeros(_NUM_CODES, bool)
        """Whether a character is the first of such a pair."""
        self._leads[self._inseparable // _NUM_CODES] = True

    def may_part(self, text: str) -> np.ndarray:
        """Whether each character of a text may be parted from the one before it (bool, [len(text)])."""
        codes = _codes(text)
        kinds = self._of_code[codes]
        if (kinds < 0).any():
            self._learn(np.unique(codes[kinds < 0]).tolist())
            kinds = self._of_code[codes]
        found = np.zeros(len(text), bool)
        found[1:] = self._may_part[kinds[:-1], kinds[1:]]
        if len(self._inseparable):
            doubtful = np.flatnonzero(found[1:] & self._leads[codes[:-1]])
            pairs = codes[doubtful].astype(np.int64) * _NUM_CODES + codes[doubtful + 1]
            found[doubtful[np.isin(pairs, self._inseparable)] + 1] = False
        return found

    def _learn(self, codes: list[int]) -> None:
        for code in codes:
            kind = self._look(chr(code))
            self._of_code[code] = self._numbers.setdefault(kind, len(self._numbers))
        if len(self._numbers) > len(self._may_part):
            self._may_part = np.array([[self._judge(x, y) for y in self._numbers] for x in self._numbers])


@dataclass(frozen=True)
class CutRule:
    """Where one tokenizer lets a text be cut."""

    automata: tuple[Automaton, ...] = ()
    normalizer: Normalizer | None = None
    words: tuple[str, ...] = ()
    """Added tokens, which are looked for in a text before anything else."""
    is_prefixed: bool = False
    """A space is put in front of a text that has none."""
    obstacle: str = ""
    """Why there is no safe place at all; empty if there are."""

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
            if self._ends_word(text, start + 1, place - 1):
                return False
        return bool(self._kinds.may_part(x + y)[1])

    def safe_places(self, text: str) -> np.ndarray:
        """Of each place of a text that is encoded by itself, whether it is safe to cut there too (bool, [len(text)]).

        Nowhere, if the normalizer changes the text.  If not, it changes no piece either: the Unicode forms are closed
        under substrings (Unicode Standard Annex 15, section 3).
        """
        is_changed = self.normalizer and not text.isascii() and self.normalizer.normalize_str(text) != text
        if self.obstacle or is_changed:
            return np.zeros(len(text), bool)
        return self._kinds.may_part(text)

    def last_cut(self, text: str, low: int, high: int) -> int | None:
        """The last safe place in (low, high], or None."""
        high = min(high, len(text) - 1)
        while high > low and not self.obstacle:
            start = max(low, high - _WINDOW_CHARS)
            window = text[start : high + 1]
            is_candidate = self._kinds.may_part(window)
            if self.normalizer:
                # It may make another character of one beyond ASCII, about which its pair then says nothing.
                is_candidate[1:] |= _codes(window)[:-1] >= _NUM_ASCII
            for place in (np.flatnonzero(is_candidate)[::-1] + start).tolist():
                if self.is_safe(text, place):
                    return place
            high = start
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

    @cached_property
    def _kinds(self) -> _Kinds:
        def look(character: str) -> _Kind:
            if 0xD800 <= ord(character) < 0xE000:
                return _Kind((frozenset(),) * len(self.automata), is_space=False, is_unsure=True)
            accepting = tuple(automaton.accepting(character) for automaton in self.automata)
            return _Kind(accepting, character == " ", len(character.casefold()) > 1)

        return _Kinds(look, self._judge, self._word_pairs)

    def _judge(self, x: _Kind, y: _Kind) -> bool:
        if x.is_unsure or y.is_unsure or (self.is_prefixed and not y.is_space):
            return False
        for automaton, before, after in zip(self.automata, x.accepting, y.accepting, strict=True):
            is_joined, is_covered = automaton.verdict(before, after)
            if is_joined or is_covered:
                return not is_joined
        return False


def find_cut_rule(tokenizer: Tokenizer) -> CutRule:
    """Read a tokenizer's parts; where nothing can be proven, a rule that allows no cut and says why."""
    try:
        _check_normalizer(_spec(tokenizer.normalizer))
        steps = _flatten(_spec(tokenizer.pre_tokenizer))
        if not steps:
            raise UnreadableError("it has no pre-tokenizer, so a whole text is one word")
        if any(step["type"] == "ByteLevel" for step in steps[:-1]):
            raise UnreadableError("its pre-tokenizer splits by the characters that ByteLevel makes")
        automata = tuple(automaton for step in steps for automaton in _automata(step))
        is_prefixed = any(step.get("add_prefix_space") for step in steps)
        words: list[str] = []
        for token in tokenizer.get_added_tokens_decoder().values():
            # The spelling of a special token is text, but it hides the ordinary added tokens that are found within it.
            if not token.special and (token.lstrip or token.rstrip or token.single_word):
                raise UnreadableError(f"its added token {token.content!r} looks at the characters around it")
            words.append(token.content)
            if tokenizer.normalizer:
                words.append(tokenizer.normalizer.normalize_str(token.content))
    except UnreadableError as error:
        return CutRule(obstacle=str(error))
    return CutRule(automata, tokenizer.normalizer, tuple(words), is_prefixed)


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
