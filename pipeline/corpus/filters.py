"""Which documents are left out, and why: by length, by a hook of the user, by one of the hooks here.

A hook is named "module:function" and maps the text of a document to the reason to leave it out, or to None.
The hooks here know no language; the limits are where ordinary prose, code and tables of a dozen languages
stay inside.

A hook is identified by the bytes of the file that names it and of the file that defines it; what these import in
turn is not looked at.  Whoever changes that changes a comment in the hook too.
"""

import importlib
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pipeline.artifact import file_sha256
from pipeline.config import identity
from pipeline.errors import UserError

Hook = Callable[[str], str | None]

_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
_MAX_CONTROL_SHARE = 0.01
_MIN_LINES = 8
_MAX_REPEATED_SHARE = 0.5
_MIN_COMPRESSIBLE_BYTES = 1024
_MIN_COMPRESSED, _MAX_COMPRESSED = 0.1, 0.75
"""Measured at 1 to 20 kB: base64 and the like 0.76 to 0.84, independent common Chinese characters 0.65 to 0.68."""


@dataclass(frozen=True)
class Filters:
    """What is left out of a source; every document is counted by reason."""

    min_chars: int = 0
    max_chars: int = 0
    """0: no limit."""
    drop_duplicates: bool = True
    """Leave out a document whose text stands earlier in the corpus, in whichever source."""
    quality: tuple[str, ...] = ()
    """Hooks "module:function", asked in this order; of a text file above 4 MB they see the first megabyte or so.
    There are pipeline.corpus.filters:compressibility, :repeated_lines and :control_characters."""

    def __post_init__(self) -> None:
        if self.min_chars < 0:
            raise ValueError(f"min_chars is {self.min_chars}; it must be 0 or more")
        if self.max_chars < 0 or 0 < self.max_chars < self.min_chars:
            raise ValueError(f"max_chars is {self.max_chars}; it must be 0 or at least min_chars ({self.min_chars})")
        for name in self.quality:
            module, _, function = name.partition(":")
            if not (module and function):
                raise ValueError(f'quality has the hook {name!r}; a hook is named "module:function"')


def compressibility(text: str) -> str | None:
    """A reason if zlib leaves less than 10 % or more than 75 % of a text of 1,024 bytes or more."""
    data = text.encode()
    if len(data) < _MIN_COMPRESSIBLE_BYTES:
        return None
    share = len(zlib.compress(data, 1)) / len(data)
    return "too repetitive" if share < _MIN_COMPRESSED else "too random" if share > _MAX_COMPRESSED else None


def repeated_lines(text: str) -> str | None:
    """A reason if more than half of the lines (of eight or more, blank ones aside) are copies of others."""
    lines = [line for line in text.splitlines() if line.strip()]
    copies = len(lines) - len(Counter(lines))
    return "repeated lines" if len(lines) >= _MIN_LINES and copies > _MAX_REPEATED_SHARE * len(lines) else None


def control_characters(text: str) -> str | None:
    """A reason if more than 1 % are control or replacement characters (tabs and ends of lines are none)."""
    return "control characters" if len(_CONTROL.findall(text)) > _MAX_CONTROL_SHARE * len(text) else None


def _load_hook(name: str, setting: str) -> Hook:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:
        kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
        raise UserError(f"{setting}.quality: the hook {name!r} cannot be imported: {kind}{error}") from error
    if not callable(found):
        raise UserError(f"{setting}.quality: {name!r} is a {type(found).__name__}, a function is needed")
    return cast(Hook, found)


def filters_identity(filters: Filters, setting: str = "corpus.filters") -> Any:
    """What identifies filters: their settings, and for each hook the SHA-256 of the file that names it and of the one
    that defines it.

    Raises UserError, which names the ``setting``, for a hook that is none or is in no file.
    """
    hooks: dict[str, list[str]] = {}
    for name in filters.quality:
        defined_in = getattr(_load_hook(name, setting), "__module__", "")
        hooks[name] = []
        for module in dict.fromkeys((name.partition(":")[0], defined_in)):
            try:
                hooks[name].append(file_sha256(Path(sys.modules[module].__file__ or "")))
            except (AttributeError, KeyError, OSError, TypeError):
                raise UserError(
                    f"{setting}.quality: {name!r} is in no file; put the hook into a module of its own"
                ) from None
    return {"settings": identity(filters), "hooks": hooks}


def build_judge(filters: Filters, setting: str = "corpus.filters") -> Callable[[int, str], str | None]:
    """A function of (number of characters, text) that gives the first reason to leave a document out."""
    hooks = [(name, _load_hook(name, setting)) for name in filters.quality]
    min_chars, max_chars = filters.min_chars, filters.max_chars or float("inf")

    def judge(num_chars: int, text: str) -> str | None:
        if num_chars < min_chars:
            return "too short"
        if num_chars > max_chars:
            return "too long"
        for name, hook in hooks:
            try:
                reason = hook(text)
            except Exception as error:
                raise UserError(f"the hook {name!r} of {setting}.quality failed: {error!r}") from error
            if reason is not None and not (isinstance(reason, str) and reason):
                raise UserError(f"the hook {name!r} gave {reason!r}; it must give the reason as text, or None")
            if reason:
                return reason
        return None

    return judge
