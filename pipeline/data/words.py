"""Texts into ids by the tokenizers library, which is asked once for each word that comes again and again.

Between two neighbouring safe places of a text (splitting.py) stands a word whose ids depend on nothing else.  Most
words of a corpus were met before, and to look one up costs a twentieth of what it costs to encode it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from pipeline.data.splitting import CutRule
from pipeline.data.vocabulary import Vocabulary
from pipeline.errors import UserError

_MAX_WORDS = 1 << 18
_MAX_CHARS = 1 << 22
"""Of the words remembered when a batch begins: with both, some 50 MB of English, and never more than 200 MB."""
_MAX_UNKNOWN_SHARE = 0.15
"""Where more of the words are new (numbers, a language without spaces), to take each alone costs more than it saves."""
_FREQUENT = 3
"""Of such a batch the words that come so often are remembered all the same, so that the next one has fewer new ones."""
_ID_BYTES = np.dtype(np.uint32).itemsize


def encode_whole(vocabulary: Vocabulary, text: str) -> np.ndarray:
    """What tokenizers gives for a text (uint32); TypeError for a string that is not Unicode text.

    A batch would gain nothing on one core, and would start threads.  UserError where the tokenizer's regex gives up.
    """
    try:
        (encoding,) = vocabulary.tokenizer.encode_batch_fast([text], add_special_tokens=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, no Exception, and not to be imported
            raise
        raise UserError(
            f"the tokenizer fails on the text {text[:60]!r}... of {len(text):,} characters: {error}. Leave that "
            "document out, or take a tokenizer whose regex does not backtrack"
        ) from None
    return np.array(encoding.ids, dtype=np.uint32)


class WordBackend:
    """The tokenizers library, asked once for each word."""

    name = "tokenizers"

    def __init__(self, vocabulary: Vocabulary, rule: CutRule) -> None:
        self._vocabulary, self._rule = vocabulary, rule
        self._ids_of_word: dict[str, bytes] = {}
        self._num_chars = 0

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, flat, and the number of each text's."""
        self._forget()
        words, num_words = self._words(texts)
        unknown = set(words).difference(self._ids_of_word)
        if len(unknown) > _MAX_UNKNOWN_SHARE * len(words):
            counts = Counter(words)
            self._learn(word for word in unknown if counts[word] >= _FREQUENT)
            ids = [encode_whole(self._vocabulary, text).tobytes() for text in texts]
            num_words = np.ones(len(texts), np.int64)
        else:
            self._learn(unknown)
            ids = list(map(self._ids_of_word.__getitem__, words))
        ends = np.cumsum(np.fromiter(map(len, ids), np.int64, len(ids))) // _ID_BYTES
        lengths = np.diff(np.concatenate([[0], ends])[np.cumsum(num_words)], prepend=0)
        return np.frombuffer(b"".join(ids), dtype=np.uint32), lengths

    def _words(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """All words in order, and how many each text has; an empty text has none."""
        joined = "".join(texts)
        ends = np.cumsum([len(text) for text in texts])
        is_start = self._rule.safe_places(joined)
        if not is_start.any():
            # A normalizer that changes one of the texts need not change the others.
            is_start = np.concatenate([is_start[:0], *(self._rule.safe_places(text) for text in texts)])
        is_start[ends[ends < len(joined)]] = True
        is_start[:1] = True
        starts = np.flatnonzero(is_start)
        words = [joined[a:b] for a, b in pairwise([*starts.tolist(), len(joined)])]
        return words, np.diff(np.searchsorted(starts, ends), prepend=0)

    def _learn(self, words: Iterable[str]) -> None:
        for word in words:
            self._ids_of_word[word] = encode_whole(self._vocabulary, word).tobytes()
            self._num_chars += len(word)

    def _forget(self) -> None:
        if len(self._ids_of_word) > _MAX_WORDS or self._num_chars > _MAX_CHARS:
            self._ids_of_word.clear()
            self._num_chars = 0
