"""What transformers makes of an exported tokenizer, beside tokenizer.json alone and the files as they came."""

import shutil
from pathlib import Path
from typing import Any

from pipeline.data.vocabulary import TOKENIZER_FILE
from pipeline.errors import CorruptionError, UserError
from pipeline.export.fit import DIFFUSION
from pipeline.export.tokenizer_files import SETTINGS, SPECIAL_MAP, is_code, read_settings
from pipeline.hf_config import CONFIG
from pipeline.hf_names import Family

PROBE = "The quick brown fox: naïve cafe\u0301, 3.14 + 日本語\n\tand\r\n  two  spaces 🙂"


def check_tokenizer(folder: Path, weights: Path, family: Family, carried: str, scratch: Path) -> dict[str, Any]:
    """What AutoTokenizer loads; an error unless PreTrainedTokenizerFast gives the ids of tokenizer.json.

    It is a UserError where the files are those of the checkpoint, as they came: they disagree.  Special tokens that are
    not those of the checkpoint are an error too.  AutoTokenizer goes by the model_type, and for some takes a class with
    rules of its own, whatever the files say: whether it gives the same ids is told.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (folder / TOKENIZER_FILE).is_file():
        return {}
    plain = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    plain.no_truncation()
    plain.no_padding()
    ids = plain.encode(PROBE, add_special_tokens=False).ids
    loaded = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    around: dict[str, Any] = {"add_special_tokens": False} if carried else {}
    if loaded(PROBE, **around)["input_ids"] != ids and carried:
        added = sorted(set(loaded.get_vocab()) - set(plain.get_vocab()))
        what = f", which adds {', '.join(map(repr, added[:5]))}," if added else ""
        raise UserError(
            f"the files of the checkpoint's tokenizer ({carried}) disagree: with the settings beside it{what} "
            f"{TOKENIZER_FILE} gives other ids than alone. In a copy of the checkpoint take out of the settings what "
            "changes them, import that, or give a tokenizer artifact (input tokenizer)"
        )
    if loaded(PROBE, **around)["input_ids"] != ids:
        raise CorruptionError(f"the tokenizer in {folder}, loaded as PreTrainedTokenizerFast, gives other ids")
    if loaded.decode(ids) != plain.decode(ids, skip_special_tokens=False):
        raise CorruptionError(f"the tokenizer in {folder}, loaded as PreTrainedTokenizerFast, decodes otherwise")
    if {SETTINGS, SPECIAL_MAP} & {*carried.split(", ")}:
        _check_special_tokens(folder, _as_they_came(folder, weights, carried, scratch), family)
    auto = _loaded(AutoTokenizer, folder, family)
    is_same = auto is not None and auto(PROBE, add_special_tokens=False)["input_ids"] == ids
    return {"auto_tokenizer": auto and type(auto).__name__, "auto_tokenizer_is_same": is_same}


def _loaded(kind: Any, folder: Path, family: Family) -> Any:
    """The tokenizer in a directory, or None where this version of transformers cannot load it as that."""
    trust = family in DIFFUSION  # AutoTokenizer looks for a class in config.json, whose own class is code
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    except Exception:  # noqa: BLE001 - versions fail in several ways at a class or a setting that they do not know
        return None


def _as_they_came(folder: Path, weights: Path, carried: str, scratch: Path) -> Path:
    """The directory without its weights and with the files of the checkpoint's tokenizer, untouched."""
    came = scratch / "came"
    came.mkdir()
    for path in (folder / CONFIG, *folder.glob("*.py")):
        shutil.copyfile(path, came / path.name)
    for name in carried.split(", "):
        shutil.copyfile(weights / name, came / name)
    return came


def _check_special_tokens(folder: Path, came: Path, family: Family) -> None:
    """CorruptionError unless the tokens with a meaning are those of the checkpoint's own files.

    Where these say that their class is code, it is not run: it may have had more.  A version that cannot load the files
    as they came has nothing to compare with.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = read_settings(came / SETTINGS)
    names_class = bool(settings) and not is_code(settings)
    for kind in (PreTrainedTokenizerFast, *([AutoTokenizer] if names_class else [])):
        before, after = _loaded(kind, came, family), _loaded(kind, folder, family)
        if before is None:
            continue
        if not _is_kept(before, after, exactly=not is_code(settings)):
            found = "nothing" if after is None else f"the special tokens {_special(after)}"
            raise CorruptionError(
                f"of the tokenizer in {folder} {kind.__name__} loads {found}; of the checkpoint's own files "
                f"{_special(before)}. This is a defect of the export; report it with {SETTINGS}"
            )
        if family not in DIFFUSION and after.padding_side != before.padding_side:
            raise CorruptionError(
                f"the tokenizer in {folder}, loaded as {kind.__name__}, pads on the {after.padding_side}, the "
                f"checkpoint's own on the {before.padding_side}. This is a defect of the export; report it with "
                f"{SETTINGS}"
            )


def _is_kept(before: Any, after: Any, *, exactly: bool) -> bool:
    if after is None or not set(before.all_special_tokens) <= set(after.all_special_tokens):
        return False
    (had, _), (has, _) = _special(before), _special(after)
    return had == has if exactly else had.items() <= has.items()


def _special(tokenizer: Any) -> tuple[dict[str, str], list[str]]:
    """Its tokens by kind, among which version 4 has a list of others, and all of them."""
    named = {kind: token for kind, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return named, tokenizer.all_special_tokens
