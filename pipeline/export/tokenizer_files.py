"""The tokenizer of an export, as transformers 4 and 5 read it: that of an artifact, or what an import brought along.

That of an artifact puts nothing around a text, as all encoding here: a beginning-of-text token in front would be one
that the training never saw.  That of a checkpoint is left as it is.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import checked, load_manifest, read_json, write_json
from pipeline.data.vocabulary import TOKENIZER_FILE
from pipeline.errors import CorruptionError, UserError
from pipeline.hf_config import SpecialIds
from pipeline.weights import ModelRecord, check_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SETTINGS, SPECIAL_MAP = "tokenizer_config.json", "special_tokens_map.json"
_KINDS = ("bos", "eos", "pad", "mask")
_ONLY_IN_5 = ("TokenizersBackend",)
"""What transformers 5 calls PreTrainedTokenizerFast in files, which 4 does not find under this name."""
_PLAIN = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
_OF_ANY_CLASS = (
    "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens",
    "chat_template", "model_max_length", "padding_side", "truncation_side", "split_special_tokens",
    "clean_up_tokenization_spaces",
)  # fmt: skip
_TAKEN = {"model_input_names": ["input_ids", "attention_mask"]}
"""What the models of all families take: version 4 gives token_type_ids besides where nothing is said."""


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer is taken from."""

    special: SpecialIds
    directory: Path | None = None
    """Artifact with the tokenizer; None: there is none."""
    carried: tuple[str, ...] = ()
    """Files of the checkpoint that an import carried along; none of a tokenizer artifact."""


def find_tokenizer(record: ModelRecord, inputs: Mapping[str, Path], *, may_be_absent: bool) -> TokenizerSource:
    """The tokenizer that goes with the weights; UserError if there is none, or if it is another model's."""
    weights = inputs["weights"]
    manifest = load_manifest(weights)
    ids = manifest.stats.get("special_ids", {})  # of an import
    ends = ids.get("eos_token_ids", [])
    if "tokenizer" in inputs:
        if may_be_absent:
            raise UserError("export.without_tokenizer is true, but there is the input tokenizer; leave one of them out")
        return _of_artifact(record, weights, inputs["tokenizer"], ends)
    carried = tuple(record.path for record in manifest.files if _is_of_tokenizer(record.path))
    special = SpecialIds(ids.get("bos"), ids.get("eos"), ids.get("pad"), record.model.mask_token_id, ends)
    if TOKENIZER_FILE in carried:
        return TokenizerSource(special, weights, carried)
    if not may_be_absent:
        raise UserError(
            f"{weights} brings no tokenizer; give the one that its ids belong to (input tokenizer, dlm convert "
            "--tokenizer DIR), or set export.without_tokenizer=true"
        )
    return TokenizerSource(special)


def _is_of_tokenizer(name: str) -> bool:
    return name in (TOKENIZER_FILE, SETTINGS, SPECIAL_MAP) or name.startswith("chat_template")


def _of_artifact(record: ModelRecord, weights: Path, tokenizer: Path, ends: list[int]) -> TokenizerSource:
    special = check_tokenizer(record, weights, tokenizer)
    if special.vocab_size > record.model.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer} has a mask, id {special.mask_token_id}, that the model in {weights} has no row "
            "for; initialise it first (pipeline.ar_init), or leave the tokenizer out to take that of the checkpoint"
        )
    ids = SpecialIds(None, special.eos_token_id, special.pad_token_id, record.model.mask_token_id, ends)
    return TokenizerSource(ids, tokenizer)


def write_tokenizer(source: TokenizerSource, seq_len: int, out: Path, *, pads_left: bool) -> None:
    """tokenizer.json, and settings that load it without any code; nothing where there is no tokenizer.

    Args:
        pads_left: whether a shorter text of a batch gets its padding in front, behind which a model generates, whatever
            a checkpoint says; a tokenizer that is none of a checkpoint does it anyhow.
    """
    from tokenizers import Tokenizer

    if source.directory is None:
        return
    for name in source.carried:
        shutil.copyfile(checked(source.directory, name), out / name)
    tokenizer = Tokenizer.from_file(str(checked(source.directory, TOKENIZER_FILE)))
    if not source.carried:
        tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.save(str(out / TOKENIZER_FILE))
    found = read_settings(out / SETTINGS)
    plain = {**_PLAIN, "model_max_length": seq_len}
    if is_code(found):  # whose class may know tokens that its settings do not name
        settings = plain | _special_tokens(tokenizer, source.special) | _kept(found)
    elif found.get("tokenizer_class") in _ONLY_IN_5:
        settings = plain | _kept(found)
    elif SETTINGS in source.carried:
        settings = found
    else:
        settings = plain | ({} if SPECIAL_MAP in source.carried else _special_tokens(tokenizer, source.special))
    in_front = pads_left or not source.carried
    settings = _as_4_spells(settings) | _TAKEN | ({"padding_side": "left"} if in_front else {})
    if settings != found:
        write_json(out / SETTINGS, settings)


def _special_tokens(tokenizer: "Tokenizer", special: SpecialIds) -> dict[str, str]:
    ids = {kind: getattr(special, f"{kind}_token_id") for kind in _KINDS}
    tokens = {
        f"{kind}_token": tokenizer.id_to_token(token_id) for kind, token_id in ids.items() if token_id is not None
    }
    return {name: token for name, token in tokens.items() if token is not None}


def read_settings(path: Path) -> dict[str, Any]:
    """What a tokenizer_config.json says, nothing where there is none; CorruptionError if it holds no object."""
    settings = read_json(path) if path.exists() else {}
    if not isinstance(settings, dict):
        raise CorruptionError(f"{path.name} of the checkpoint holds no JSON object")
    return settings


def is_code(settings: Mapping[str, Any]) -> bool:
    """Whether the class that these settings name is code beside them, which is never run."""
    return "auto_map" in settings


def _kept(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that hold for any class: which tokens are special, how texts are cut, filled up and written."""
    kept = {name: settings[name] for name in _OF_ANY_CLASS if settings.get(name) is not None}
    for name, value in settings.items():
        if name.endswith("_token") and not isinstance(value, bool):  # as add_bos_token is; null: that there is none
            kept[name] = value
    return kept


def _as_4_spells(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A list of special tokens under the name that both versions read: the one of 5 holds a table by name in 4."""
    if not isinstance(extra := settings.get("extra_special_tokens"), list):
        return dict(settings)
    listed = settings.get("additional_special_tokens") or []
    rest = {name: value for name, value in settings.items() if name != "extra_special_tokens"}
    return {**rest, "additional_special_tokens": [*listed, *(token for token in extra if token not in listed)]}
