"""What the figures share: their colours, the card they stand on, and a pair of axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from workflows.report.svg import text

Points = Sequence[tuple[float, float]]

WIDTH = 900.0

INK, MUTED, LINE, CARD, PAGE = "#1c2330", "#566072", "#d5dbe4", "#ffffff", "#f4f6f9"
BLUE, TEAL, AMBER, PURPLE = "#2f6bd8", "#0b7a75", "#b4540a", "#8a3ab9"

_STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif}"
    f"text{{fill:{INK};font-size:12px}}.sub,.tick{{fill:{MUTED}}}.tick{{font-size:11px}}"
    ".name{font-size:13.5px;font-weight:600}.num{font-variant-numeric:tabular-nums}"
    ".on-line,.at-end{font-size:11.5px;font-weight:600}"
    f".on-line{{stroke:{CARD};stroke-width:4px;stroke-linejoin:round;paint-order:stroke}}"
    f".grid{{stroke:{LINE};stroke-width:1}}.curve{{fill:none;stroke-width:2;stroke-linejoin:round}}"
)


def number(value: float) -> str:
    """A coordinate to a tenth of a pixel."""
    # Off the ties, which another processor's last bit could round the other way.
    return f"{value + 1e-6:.1f}".removesuffix(".0")


def card(title: str, description: str, height: float, body: str) -> str:
    """A whole SVG file on a ground of its own, readable on a white and on a black page."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}" width="{WIDTH:g}" '
        f'height="{height:g}" role="img"><title>{escape(title)}</title><desc>{escape(description)}</desc>'
        f"<style>{_STYLE}</style>"
        f'<rect x=".5" y=".5" width="{WIDTH - 1:g}" height="{height - 1:g}" rx="14" fill="{PAGE}" stroke="{LINE}"/>'
        f"{body}</svg>\n"
    )


def coloured(x: float, y: float, content: str, colour: str, css_class: str, anchor: str = "start") -> str:
    """One line of text in a colour of its own."""
    return (
        f'<text x="{number(x)}" y="{number(y)}" class="{css_class}" text-anchor="{anchor}" '
        f'style="fill:{colour}">{escape(content)}</text>'
    )


@dataclass(frozen=True)
class Axes:
    """A frame in pixels and the ranges it shows; x is linear."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool = False

    @property
    def bottom(self) -> float:
        """Lower edge."""
        return self.top + self.height

    @property
    def right(self) -> float:
        """Right edge."""
        return self.left + self.width

    def to_x(self, x: float) -> float:
        """Pixel of an x."""
        low, high = self.x_range
        return self.left + (x - low) / (high - low) * self.width

    def to_y(self, y: float) -> float:
        """Pixel of a y."""
        low, high = self.y_range
        share = math.log(y / low) / math.log(high / low) if self.log_y else (y - low) / (high - low)
        return self.bottom - share * self.height

    def frame(
        self,
        title: str,
        x_ticks: Sequence[tuple[float, str]],
        y_ticks: Sequence[tuple[float, str]],
        x_label: str = "",
    ) -> str:
        """Ground, grid, ticks with their labels, the title above and what x is below."""
        parts = [
            text(self.left, self.top - 14, title, "name"),
            f'<rect x="{self.left:g}" y="{self.top:g}" width="{self.width:g}" height="{self.height:g}" '
            f'fill="{CARD}" stroke="{LINE}"/>',
        ]
        for value, label in y_ticks:
            y = number(self.to_y(value))
            parts.append(f'<path d="M{self.left:g} {y}H{self.right:g}" class="grid"/>')
            parts.append(text(self.left - 7, round(self.to_y(value) + 4, 1), label, "tick", "end"))
        for value, label in x_ticks:
            x = number(self.to_x(value))
            parts.append(f'<path d="M{x} {self.bottom:g}v4" class="grid"/>')
            parts.append(text(float(x), self.bottom + 17, label, "tick", "middle"))
        parts.append(text(self.left + self.width / 2, self.bottom + 35, x_label, "sub", "middle") if x_label else "")
        return "".join(parts)

    def curve(self, points: Points, colour: str, dash: str = "") -> str:
        """A line through the points, cut off at the frame."""
        at = [f"{number(self.to_x(x))} {number(self.to_y(y))}" for x, y in points]
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        # A nested <svg> cuts off without an id; a margin of its own keeps lines along the frame whole.
        left, top, width, height = self.left - 2, self.top - 2, self.width + 4, self.height + 4
        return (
            f'<svg x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" '
            f'viewBox="{left:g} {top:g} {width:g} {height:g}" overflow="hidden">'
            f'<path d="M{"L".join(at)}" class="curve" stroke="{colour}"{dashed}/></svg>'
        )
