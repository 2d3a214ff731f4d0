"""What ``dlm generate`` is asked for: a prompt, text with gaps, or a file of either."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config import from_json
from pipeline.errors import UserError
from pipeline.json_lines import json_objects

Kind = Literal["nothing", "prompt", "infill"]
_GAP = re.compile(r"(\\?)\[MASK(?::([^\]]*))?\]")
_HOW = "[MASK] is a gap of one token and [MASK:12] of twelve; \\[MASK] is the text itself"


@dataclass(frozen=True)
class Request:
    """One text to be written or filled."""

    id: str
    """Empty where there is but one."""
    kind: Kind
    text: str
    length: int = 0
    """Tokens to be drawn behind a prompt; 0: what it leaves of a row."""


@dataclass(frozen=True)
class _Line:
    """A record of a file."""

    id: str | None = None
    prompt: str | None = None
    infill: str | None = None
    length: int = 0


def one_request(prompt: str | None, infill: str | None, length: int) -> Request:
    """That of a command without a file; UserError for a pattern without a gap."""
    if infill is None:
        return Request("", "nothing" if prompt is None else "prompt", prompt or "", length)
    if length:
        raise UserError(f"--length is {length}, but the gaps of --infill say how many tokens are drawn; leave it out")
    parse_pattern(infill, "--infill")
    return Request("", "infill", infill)


def parse_pattern(pattern: str, name: str) -> list[str | int]:
    """Pieces of text, and the sizes of the gaps between them; UserError for a pattern without a gap, or a bad one."""
    parts: list[str | int] = [""]

    def add(text: str) -> None:
        if isinstance(parts[-1], str):
            parts[-1] += text
        else:
            parts.append(text)

    end = 0
    for found in _GAP.finditer(pattern):
        add(pattern[end : found.start()])
        end = found.end()
        if found[1]:
            add(found[0][1:])
            continue
        size = 1 if found[2] is None else int(found[2]) if re.fullmatch(r"[0-9]{1,9}", found[2]) else 0
        if size < 1:
            raise UserError(f"{name} has {found[0]}: its number must be a whole one from 1 on. {_HOW}")
        parts.append(size)
    add(pattern[end:])
    if not any(isinstance(part, int) for part in parts):
        raise UserError(f"{name} has no gap to fill: {_HOW}")
    return [part for part in parts if part != ""]


def read_requests(path: Path, length: int) -> list[Request]:
    """Those of a .jsonl file, or of a .txt file with a prompt a line; ``length`` is that of records without one.

    UserError, with the line, for what is no request, and for an id that stands twice.
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(f"--prompts {path} is neither a .jsonl nor a .txt file")
    found: dict[str, Request] = {}
    lines_of: dict[str, int] = {}
    for number, request in _of_lines(path, length) if path.suffix == ".jsonl" else _of_text(path, length):
        if request.id in found:
            where = f"{path.name}, line {number}"
            raise UserError(f"{where}: the id {request.id!r} is that of line {lines_of[request.id]} too; ids differ")
        found[request.id], lines_of[request.id] = request, number
    if not found:
        raise UserError(f"--prompts {path} has no prompt")
    return list(found.values())


def _of_text(path: Path, length: int) -> Iterator[tuple[int, Request]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path} is not UTF-8: {error.reason} at byte {error.start}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, Request(str(number), "prompt", line, length)


def _of_lines(path: Path, length: int) -> Iterator[tuple[int, Request]]:
    for number, value in json_objects(path, f"--prompts {path}"):
        yield number, _request(value, number, f"{path.name}, line {number}", length)


def _request(value: Mapping[str, Any], number: int, where: str, length: int) -> Request:
    record = from_json(_Line, value, where)
    if (record.prompt is None) == (record.infill is None):
        raise UserError(f"{where} has {'neither' if record.prompt is None else 'both'} prompt and infill; give one")
    if record.length < 0 or (record.length and record.infill is not None):
        reason = "it must be 0 or more" if record.length < 0 else "the gaps of infill say how many tokens are drawn"
        raise UserError(f"{where}: length is {record.length}; {reason}")
    own = str(number) if record.id is None else record.id
    if record.infill is not None:
        parse_pattern(record.infill, where)
        return Request(own, "infill", record.infill)
    return Request(own, "prompt", record.prompt or "", record.length or length)
