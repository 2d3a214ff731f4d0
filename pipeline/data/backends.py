"""What turns texts into ids: the tokenizers library, or gigatoken where it was found to give the same ids."""

import importlib
import json
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from pipeline.data.splitting import CutRule
from pipeline.data.vocabulary import Vocabulary
from pipeline.data.words import WordBackend, encode_whole
from pipeline.errors import UserError

BackendName = Literal["auto", "tokenizers", "fast"]

PROBES = (
    "",
    " ",
    "\n",
    "\x00",
    " \n\n\t  x",
    "tabs\t\tand\r\nold\rline ends\n\n\n   and spaces   ",
    "It's we'LL I'd 'tis o''clock '",
    "1 12 123 1234567 3.14 \u0967\u0968 \u00bd \u2167",
    "e\u0301 \u00e9 \u212b \ufb01 \u202e right \u200b\u200d joined \u0300",
    "\u65e5\u672c\u8a9e\u306e\u6587\u3002\u4e2d\u6587\uff0c\ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22 \u05e2\u05d1",
    "\U0001f469\u200d\U0001f52c \U0001f1fa\U0001f1f3 \U00010348 \U000e0001",
    "\ufeff\ufffd\uffff\x85a\xa0b\u2028c\u3000d",
    "'\u017f \u0130 \u1e9e def f(x):\n        return x[1:-1]  # ...\n\n\n",
)
"""Texts on which tokenizers tend to differ."""
_RENEW_CHARS = 1 << 26


class Backend(Protocol):
    """Ids of texts that need no cut; texts that spell a special token are ordinary."""

    @property
    def name(self) -> str:
        """The package behind it."""
        ...

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, flat (uint32), and the number of each text's (int64); TypeError for what is not Unicode."""
        ...


class FastBackend:
    """gigatoken, in the thread that calls."""

    name = "gigatoken"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokenizer_type: Any = importlib.import_module("gigatoken").Tokenizer
        content = json.loads(vocabulary.tokenizer.to_str())
        # gigatoken knows no setting to take special tokens literally; those it does not know, it cannot find.
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
        self._content = json.dumps(content)
        self._renew()

    def _renew(self) -> None:
        self._tokenizer = self._tokenizer_type.from_json(self._content)
        self._num_chars = 0

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, flat, and the number of each text's."""
        self._num_chars += sum(map(len, texts))
        if self._num_chars > _RENEW_CHARS:
            # It remembers every word for good, some ten bytes for a character of text without repetitions.
            self._renew()
        # Its encode_batch returns awkward arrays, for which that package would be imported; the speed is the same.
        ids = [self._tokenizer.encode(text) for text in texts]
        return np.concatenate([np.zeros(0, np.uint32), *ids]), np.array([len(one) for one in ids], dtype=np.int64)


@dataclass(frozen=True)
class Choice:
    """A backend and, for the record, why it was taken."""

    backend: Backend
    reason: str


def choose_backend(vocabulary: Vocabulary, rule: CutRule, setting: BackendName, sample: Iterable[str]) -> Choice:
    """The backend for a setting; gigatoken only if it gives the ids of tokenizers on the sample and on PROBES.

    ``auto`` falls back to tokenizers and gives the reason; ``fast`` raises UserError with it.
    """
    standard = WordBackend(vocabulary, rule)
    if setting == "tokenizers":
        return Choice(standard, "asked for")
    texts = [*PROBES, *_own_probes(vocabulary), *sample]
    try:
        fast = FastBackend(vocabulary)
        found = [fast.encode([text])[0] for text in texts]
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed (pip install 'dlm[fast]')"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of Rust is no Exception, and none of its errors matters
        told = traceback.format_exception_only(error)[0].strip().splitlines()[0]
        reason = f"gigatoken cannot load or use this tokenizer: {told}"
    else:
        pairs = zip(texts, found, strict=True)
        differing = next((t for t, ids in pairs if not np.array_equal(ids, encode_whole(vocabulary, t))), None)
        if differing is None:
            return Choice(fast, f"gave the ids of tokenizers on {len(texts)} texts")
        reason = f"gigatoken gives other ids than tokenizers for {differing[:60]!r}"
    if setting == "fast":
        raise UserError(f"the backend 'fast' cannot be used: {reason}. Set it to 'auto' or 'tokenizers'")
    return Choice(standard, reason)


def _own_probes(vocabulary: Vocabulary) -> list[str]:
    """Texts that spell the tokens with a treatment of their own."""
    spellings = [token.content for token in vocabulary.tokenizer.get_added_tokens_decoder().values()]
    return [text for spelling in spellings for text in (spelling, f"a{spelling}b {spelling}{spelling}\n")]
