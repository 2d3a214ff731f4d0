"""Numbers, texts and tables as HTML strings; every text is escaped here."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ABSENT = "–"  # noqa: RUF001 - an en dash, as tables have it

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_CONTROL_PICTURES = _PICTURES | dict.fromkeys(range(128, 160), 0xFFFD)


def visible(text: str) -> str:
    """Control characters, which have no place in HTML and command a terminal, as their pictures from U+2400 on."""
    return text.translate(_CONTROL_PICTURES)


def plain(value: object) -> str:
    """A value as escaped text."""
    return escape(visible(str(value)))


@dataclass(frozen=True)
class Html:
    """A string that is HTML already."""

    markup: str


@dataclass(frozen=True)
class Number:
    """A cell aligned to the right."""

    content: str


Cell = str | Number | Html


def table(head: Sequence[Cell], rows: Sequence[Sequence[Cell]]) -> str:
    """A table that scrolls sideways on a narrow screen; the first cell of a row is its heading."""
    header = "".join(_cell("th", cell, ' scope="col"') for cell in head)
    body = "".join(
        "<tr>" + _cell("th", row[0], ' scope="row"') + "".join(_cell("td", c) for c in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(tag: str, cell: Cell, attributes: str = "") -> str:
    if isinstance(cell, Html):
        return f"<{tag}{attributes}>{cell.markup}</{tag}>"
    if isinstance(cell, Number):
        return f'<{tag}{attributes} class="number">{plain(cell.content)}</{tag}>'
    return f"<{tag}{attributes}>{plain(cell)}</{tag}>"


def section(title: str, *parts: str) -> str:
    """One card of the page."""
    return f"<section><h2>{plain(title)}</h2>{''.join(parts)}</section>"


def note(content: str) -> str:
    """A paragraph of explanation."""
    return f'<p class="note">{plain(content)}</p>'


def decimals(value: float | None, digits: int = 4) -> str:
    """A figure with a fixed number of digits after the point."""
    return ABSENT if value is None else f"{value:,.{digits}f}"


def count(value: int) -> str:
    """A whole number with thousands separated."""
    return f"{value:,}"


def scaled(value: float, unit: str = "") -> str:
    """A large number in thousands, millions or billions, as in "4.19 M"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def listed(words: Sequence[str]) -> str:
    """Words as in "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
