"""Documents into flat arrays of token ids: the ids of each whole text, however long, in bounded memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.backends import Backend, BackendName, choose_backend
from pipeline.data.shards import token_type
from pipeline.data.splitting import CutRule, cut_document, find_cut_rule
from pipeline.data.vocabulary import Vocabulary
from pipeline.data.words import WordBackend, encode_whole
from pipeline.errors import UserError


@dataclass(frozen=True)
class EncodingLimits:
    """Bounds of memory, in characters; none of them changes an id."""

    batch_chars: int = 1 << 20
    """Text gathered before a batch of ids is given out."""
    piece_chars: int = 1 << 20
    """A longer document is cut into pieces of at most this, where the tokenizer allows it."""
    max_uncut_chars: int = 1 << 22
    """The longest text that is encoded at once where there is no place to cut; tokenizers takes some 90 bytes each."""
    verify_every: int = 1000
    """One in so many pieces is encoded by tokenizers at once and compared; the first always is."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.piece_chars > self.max_uncut_chars:
            raise ValueError(
                f"piece_chars is {self.piece_chars:,} and max_uncut_chars {self.max_uncut_chars:,}; a piece cannot be "
                "longer than what is encoded at once"
            )


@dataclass(frozen=True)
class Encoder:
    """A vocabulary with what encodes its texts; it does not pickle, so each worker builds its own."""

    vocabulary: Vocabulary
    backend: Backend
    reason: str
    """Why this backend."""
    cut_rule: CutRule


@dataclass(frozen=True)
class EncodedBatch:
    """Pieces of documents, in order; where no document is long, a piece is a document."""

    ids: np.ndarray
    """Flat, of the narrowest type that holds the vocabulary; the end-of-document ids included."""
    lengths: np.ndarray
    """Ids of each piece (int64)."""
    ends_document: np.ndarray
    """Whether a piece closes its document; where not, the next piece goes on with it, maybe in the next batch."""
    first_document: int
    """Place, among the documents given, of the document of the first piece."""


def build_encoder(vocabulary: Vocabulary, backend: BackendName = "auto", sample: Iterable[str] = ()) -> Encoder:
    """Choose what encodes; ``sample`` are texts of the corpus on which a fast backend must prove itself."""
    assert vocabulary.tokenizer.encode_special_tokens, "text that spells a special token must stay text"
    rule = find_cut_rule(vocabulary.tokenizer)
    choice = choose_backend(vocabulary, rule, backend, sample)
    return Encoder(vocabulary, choice.backend, choice.reason, rule)


def encode_documents(
    encoder: Encoder, documents: Iterable[Iterable[str]], limits: EncodingLimits | None = None
) -> Iterator[EncodedBatch]:
    """Encode documents, each given in one or more parts that are cut anywhere between two characters.

    The ids of a document are those of its whole text, then the end-of-document id.  UserError if the text gives
    an id that is not for text, holds surrogates or has too long a stretch without a place to cut, or if the
    backend differs from tokenizers.
    """
    limits = limits or EncodingLimits()
    texts: list[str] = []
    ends: list[bool] = []
    num_chars = num_pieces = first = 0
    for number, parts in enumerate(documents):
        pieces = cut_document(parts, encoder.cut_rule, limits.piece_chars, limits.max_uncut_chars, f"document {number}")
        for text, is_last in pieces:
            texts.append(text)
            ends.append(is_last)
            num_chars += len(text)
            if num_chars >= limits.batch_chars:
                yield _encode(encoder, texts, np.array(ends), first, num_pieces, limits)
                num_pieces += len(texts)
                first = number + is_last
                texts, ends, num_chars = [], [], 0
    if texts:
        yield _encode(encoder, texts, np.array(ends), first, num_pieces, limits)


def _encode(
    encoder: Encoder, texts: list[str], ends: np.ndarray, first: int, num_pieces: int, limits: EncodingLimits
) -> EncodedBatch:
    numbers = first + np.cumsum(ends) - ends
    try:
        flat, text_lengths = encoder.backend.encode(texts)
    except TypeError:
        _refuse_surrogates(texts, numbers)
        raise
    starts = np.cumsum(text_lengths) - text_lengths
    for place in range(-num_pieces % limits.verify_every, len(texts), limits.verify_every):
        found = flat[starts[place] : starts[place] + text_lengths[place]]
        _verify(encoder, texts[place], found, numbers[place])
    _check_ids(encoder.vocabulary, flat, text_lengths, numbers)
    special = encoder.vocabulary.special
    lengths = text_lengths + ends
    ids = np.empty(int(lengths.sum()), dtype=token_type(special.vocab_size).to_pandas_dtype())
    is_text = np.ones(len(ids), dtype=bool)
    last = np.cumsum(lengths)[ends] - 1
    is_text[last] = False
    ids[is_text] = flat
    ids[last] = special.eos_token_id
    return EncodedBatch(ids, lengths, ends, first)


def _refuse_surrogates(texts: list[str], numbers: np.ndarray) -> None:
    for text, number in zip(texts, numbers, strict=True):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"document {number} holds {text[error.start]!r}, half of a surrogate pair, which is not text: "
                "decode its bytes strictly, or replace what is not UTF-8"
            ) from None


def _verify(encoder: Encoder, text: str, found: np.ndarray, number: int) -> None:
    expected = encode_whole(encoder.vocabulary, text)
    if np.array_equal(expected, found):
        return
    which = f"{encoder.backend.name} gives other ids than tokenizers"
    remedy = "Set the backend to 'tokenizers'"
    if isinstance(encoder.backend, WordBackend):
        which = "tokenizers gives other ids for the text in words than for the whole"
        remedy = "This is a fault in the rule of data/splitting.py for this tokenizer; please report it"
    raise UserError(
        f"document {number}: {which} ({len(found):,} and {len(expected):,}); the text begins {text[:60]!r}. {remedy}"
    )


def _check_ids(vocabulary: Vocabulary, flat: np.ndarray, lengths: np.ndarray, numbers: np.ndarray) -> None:
    special = vocabulary.special
    is_wrong = flat >= special.vocab_size
    for token_id in (special.mask_token_id, special.eos_token_id, special.pad_token_id):
        is_wrong |= flat == token_id
    if not is_wrong.any():
        return
    place = int(is_wrong.argmax())
    token_id, number = int(flat[place]), numbers[np.searchsorted(np.cumsum(lengths), place, side="right")]
    if token_id >= special.vocab_size:
        raise UserError(
            f"document {number}: the tokenizer gives the id {token_id}, and the vocabulary has {special.vocab_size}; "
            "its files do not belong together. Take the tokenizer anew"
        )
    names = {special.pad_token_id: "pad", special.eos_token_id: "eos", special.mask_token_id: "mask"}
    raise UserError(
        f"document {number}: the tokenizer gives the {names[token_id]} id {token_id} "
        f"({vocabulary.tokenizer.id_to_token(token_id)!r}) for ordinary text. Set tokenizer.{names[token_id]}_token to "
        "a token that no text can give"
    )
