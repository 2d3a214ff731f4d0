"""A tokenizer with the three special ids that diffusion training needs, loaded and checked in one place."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from pipeline.artifact import checked
from pipeline.data.special_tokens import SPECIAL_FILE, SpecialTokens, load_special_tokens
from pipeline.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
_IN_FILE = f'in its {TOKENIZER_FILE} ("added_tokens", "special": true); of a checkpoint, before its import'
_MAX_SPREAD = 2
"""Ids up to the highest, for each token there is; published vocabularies have holes, but few."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer that takes text literally, and its special ids."""

    tokenizer: Tokenizer
    special: SpecialTokens

    def decode(self, ids: list[int]) -> str:
        """Text of ids, the special ones left out."""
        hidden = {self.special.eos_token_id, self.special.pad_token_id, self.special.mask_token_id}
        return self.tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False)


def take_literally(tokenizer: Tokenizer) -> Tokenizer:
    """Make encoding treat the spelling of a special token as text, and cut or pad nothing."""
    tokenizer.encode_special_tokens = True  # not stored in the file
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def find_special_tokens(tokenizer: Tokenizer, mask: str, eos: str, pad: str, name: str) -> SpecialTokens:
    """Look up the ids of the special tokens; UserError for what would make ids ambiguous, or text unsafe."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    if not vocab:
        raise UserError(f"{name} has an empty vocabulary")
    _check_ids(vocab, name)
    if getattr(tokenizer.model, "dropout", None):
        raise UserError(
            f"{name} drops merges by chance (model.dropout is {tokenizer.model.dropout}), so a text has no ids of its "
            "own; set model.dropout to null in its file"
        )
    ids = {
        kind: special_token_id(tokenizer, kind, token, name)
        for kind, token in (("mask", mask), ("eos", eos), ("pad", pad))
    }
    if len(set(ids.values())) < 3 and ids["mask"] in (ids["eos"], ids["pad"]):
        raise UserError(f"{name}: the mask token must differ from the eos and the pad token; found {ids}")
    return SpecialTokens(ids["mask"], ids["eos"], ids["pad"], max(vocab.values()) + 1)


def special_token_id(tokenizer: Tokenizer, kind: str, token: str, name: str) -> int:
    """The id of a special token; UserError unless the tokenizer called ``name`` has it and marks it as one."""
    token_id, added = tokenizer.token_to_id(token), tokenizer.get_added_tokens_decoder()
    if token_id is None:
        special = sorted(one.content for one in added.values() if one.special)
        if not special:
            raise UserError(f"{name} has no {kind} token {token!r}; it has no special tokens. Mark one {_IN_FILE}")
        raise UserError(
            f"{name} has no {kind} token {token!r}; its special tokens are {special[:12]}. Set tokenizer.{kind}_token "
            "to one of them"
        )
    if token_id not in added or not added[token_id].special:
        raise UserError(
            f"{name}: text that spells a special token would get its id, as the {kind} token {token!r} is not marked "
            f"as special. Mark it {_IN_FILE}. Or set tokenizer.{kind}_token to one that is"
        )
    return token_id


def _check_ids(vocab: dict[str, int], name: str) -> None:
    if len(set(vocab.values())) < len(vocab):
        tokens: dict[int, list[str]] = {}
        for token, token_id in vocab.items():
            tokens.setdefault(token_id, []).append(token)
        token_id, same = next((i, found) for i, found in tokens.items() if len(found) > 1)
        raise UserError(f"{name} gives one id to several tokens: {token_id} to {sorted(same)}; each needs its own")
    last = max(vocab, key=vocab.__getitem__)
    if vocab[last] + 1 > _MAX_SPREAD * len(vocab):
        raise UserError(
            f"{name} gives its token {last!r} the id {vocab[last]:,} and has {len(vocab):,} tokens; an embedding would "
            f"need {vocab[last] + 1:,} rows, and at most {_MAX_SPREAD} for each token are allowed. Number the "
            "tokens in its file without such a gap"
        )


def save_vocabulary(tokenizer: Tokenizer, special: SpecialTokens, directory: Path) -> None:
    """Write tokenizer.json and the special ids beside it."""
    tokenizer.save(str(directory / TOKENIZER_FILE))
    (directory / SPECIAL_FILE).write_text(json.dumps(asdict(special), indent=1) + "\n")


def load_vocabulary(artifact: Path) -> Vocabulary:
    """The vocabulary in a committed artifact, its files verified first."""
    special = load_special_tokens(artifact)
    tokenizer = Tokenizer.from_file(str(checked(artifact, TOKENIZER_FILE)))
    return Vocabulary(take_literally(tokenizer), special)
