"""The paths of samples from masks to text as one HTML page that needs nothing else: a slider, and a strip to print."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from workflows.report.film import Frame, film_strip
from workflows.report.style import page_style
from workflows.report.text import note, plain, visible

_NUM_STRIP_FRAMES = 8

_CSS = """
.viewer { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 14px; margin: 10px 0; }
.viewer input { flex: 1 1 240px; min-width: 0; accent-color: var(--accent); }
.viewer button {
  font: inherit; min-width: 5em; padding: 3px 12px; color: var(--ink); background: var(--page);
  border: 1px solid var(--lane); border-radius: 6px; cursor: pointer;
}
.viewer output { min-width: 8em; color: var(--muted); font-variant-numeric: tabular-nums; }
.film.screen {
  display: block; padding: 8px 12px; border-radius: 6px; background: var(--page);
  font: 13px/1.8 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: break-spaces; overflow-wrap: anywhere;
}
.viewer[hidden], .screen[hidden] { display: none; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
"""

_SCRIPT = """
for (const film of document.querySelectorAll(".sample")) {
  const {first, changes} = JSON.parse(film.querySelector("script").textContent);
  const [slider, button, told] = ["input", "button", "output"].map(name => film.querySelector(name));
  const screen = film.querySelector(".screen");
  let timer = 0;
  function show() {
    const pieces = first.slice(), fresh = new Set();
    for (let pass = 0; pass < +slider.value; pass++)
      for (const [place, piece] of changes[pass]) {
        pieces[place] = piece;
        if (pass + 1 === +slider.value && piece !== null) fresh.add(place);
      }
    screen.replaceChildren(...pieces.map((piece, place) => {
      const node = document.createElement(piece === null ? "i" : fresh.has(place) ? "mark" : "span");
      node.textContent = piece ?? "";
      return node;
    }));
    told.textContent = `pass ${slider.value} of ${changes.length}`;
  }
  function stop() { clearInterval(timer); timer = 0; button.textContent = "Play"; }
  function step() { slider.value = +slider.value + 1; show(); if (+slider.value >= changes.length) stop(); }
  slider.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (+slider.value >= changes.length) slider.value = 0;
    button.textContent = "Pause";
    timer = setInterval(step, Math.max(40, 6000 / Math.max(1, changes.length)));
  });
  film.querySelector(".viewer").hidden = screen.hidden = false;
  show();
}
"""


@dataclass(frozen=True)
class Film:
    """A sample and its path."""

    title: str
    asked: str
    """The prompt, or the text with gaps; empty where there was none."""
    text: str
    frames: Sequence[Frame]
    """Before each pass and at the end."""


def film_page(title: str, lead: str, films: Sequence[Film]) -> str:
    """The whole page.  Without scripts it has the strips alone; nothing moves before it is asked to."""
    body = "".join(_sample(number, film) for number, film in enumerate(films, 1))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{plain(title)}</title><style>{page_style()}{_CSS}</style></head><body>"
        f'<header><h1>{plain(title)}</h1><p class="lead">{plain(lead)}</p></header>'
        f"<main><section>{body}</section></main><script>{_SCRIPT}</script></body></html>\n"
    )


def _sample(number: int, film: Film) -> str:
    last = len(film.frames) - 1
    steps = sorted({round(i * last / (_NUM_STRIP_FRAMES - 1)) for i in range(_NUM_STRIP_FRAMES)})
    name = f"film-{number}"
    return (
        f'<div class="sample"><h2>{plain(film.title)}</h2>{note(f"Asked for: {film.asked}") if film.asked else ""}'
        f'<div class="viewer" hidden><label for="{name}">Forward passes</label>'
        f'<input id="{name}" type="range" min="0" max="{last}" value="{last}"><button type="button">Play</button>'
        f'<output for="{name}"></output></div>'
        '<div class="film screen" hidden></div>'
        f"<details open><summary>Film strip</summary>{film_strip(steps, [film.frames[step] for step in steps])}"
        f"</details><details><summary>Text</summary><pre>{plain(film.text)}</pre></details>"
        f'<script type="application/json">{_data(film.frames)}</script></div>'
    )


def _data(frames: Sequence[Frame]) -> str:
    """The first frame and what each pass changes; nothing in it can end the script that holds it."""
    shown = [[None if piece is None else visible(piece) for piece in frame] for frame in frames]
    changes = [
        [[place, now] for place, (was, now) in enumerate(zip(before, after, strict=True)) if was != now]
        for before, after in pairwise(shown)
    ]
    text = json.dumps({"first": shown[0], "changes": changes}, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
