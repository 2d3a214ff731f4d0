"""A mask token for a tokenizer that has none: an unused row of the embedding, a token given up, or a new row."""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer

from pipeline.errors import UserError
from pipeline.tokenizer.config import MaskSource


def with_mask(
    tokenizer: Tokenizer, source: MaskSource, mask_token: str, rare_token_id: int | None, num_rows: int, name: str
) -> tuple[Tokenizer, MaskSource]:
    """The tokenizer with a special token ``mask_token``, and which of the sources it has it from.

    ``num_rows`` are those of the embedding.  Raises UserError, naming ``name``, where the source cannot give one.
    """
    token_id, next_id = tokenizer.token_to_id(mask_token), _next_id(tokenizer)
    if token_id is not None and source in ("auto", "existing"):
        return tokenizer, "existing"
    if token_id is not None:
        raise UserError(
            f"{name} has the token {mask_token!r} already, id {token_id}; set tokenizer.mask_from=existing, or "
            "tokenizer.mask_token to another spelling"
        )
    if source == "existing":
        special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())
        raise UserError(
            f"{name} has no token {mask_token!r}; its special tokens are {special[:12]}. Set tokenizer.mask_token to "
            "one of them, or tokenizer.mask_from=auto"
        )
    if source == "rare_token":
        assert rare_token_id is not None
        return _renamed(tokenizer, rare_token_id, mask_token, name), source
    if source == "unused_row" and next_id >= num_rows:
        raise UserError(
            f"{name} has tokens up to id {next_id - 1}, and the embedding has {num_rows} rows: none is unused. Set "
            "tokenizer.mask_from=new_row, or rare_token"
        )
    if source == "new_row" and next_id < num_rows:
        raise UserError(
            f"{name} has tokens up to id {next_id - 1}, and the embedding has {num_rows} rows, so the next token gets "
            "a row that is there. Set tokenizer.mask_from=unused_row"
        )
    tokenizer.add_special_tokens([AddedToken(mask_token, special=True, normalized=False)])
    found = tokenizer.token_to_id(mask_token)
    if found != next_id:
        raise UserError(
            f"{name} has ids that no token has, so a new token gets the id {found}, not {next_id}, the one after its "
            "last token. Set tokenizer.mask_from=rare_token, or tokenizer.mask_token to a special token that it has"
        )
    return tokenizer, "unused_row" if next_id < num_rows else "new_row"


def spelling(tokenizer: Tokenizer, token_id: int) -> str | None:
    """The token of an id; None where there is none, as for the -1 of some checkpoints."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    return next((token for token, known in vocab.items() if known == token_id), None)


def _next_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _renamed(tokenizer: Tokenizer, token_id: int, mask_token: str, name: str) -> Tokenizer:
    """A BPE in which an ordinary token, that no other is made of, is given up: its id gets the mask's spelling.

    Text that held it is spelled by the two tokens that it was merged from.
    """
    made = json.loads(tokenizer.to_str())
    token = spelling(tokenizer, token_id)
    what = f"tokenizer.rare_token_id is {token_id}, {token!r} in {name}"
    if token is None:
        raise UserError(f"tokenizer.rare_token_id is {token_id}; {name} has no such token")
    if token_id in tokenizer.get_added_tokens_decoder():
        raise UserError(f"{what}, a special token: set tokenizer.mask_token to it, and tokenizer.mask_from=existing")
    if made["model"]["type"] != "BPE":
        raise UserError(f"{what}; a token can be given up in a BPE only, and this is {made['model']['type']}")
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in made["model"]["merges"]
    ]
    if not any("".join(pair) == token for pair in merges):
        raise UserError(f"{what}, which no merge makes: text that holds it could not be spelled. Take another")
    if longer := [pair for pair in merges if token in pair]:
        raise UserError(
            f"{what}, which {len(longer)} longer token(s) are merged from, such as {''.join(longer[0])!r}; take one "
            "that none is"
        )
    model: dict[str, Any] = made["model"]
    model["merges"] = [list(pair) for pair in merges if "".join(pair) != token]
    del model["vocab"][token]
    model["vocab"][mask_token] = token_id
    renamed = Tokenizer.from_str(json.dumps(made))
    renamed.add_special_tokens([AddedToken(mask_token, special=True, normalized=False)])
    assert renamed.token_to_id(mask_token) == token_id
    return renamed
