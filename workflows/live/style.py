"""Stylesheet and script of the page of a run, beside what it has in common with the report of the stage."""

LIGHT = {"good": "#1a6b33", "bad": "#b3261e", "busy": "#2455ae", "wait": "#8a4208", "idle": "#566072"}
DARK = {"good": "#6fd68a", "bad": "#ff9a91", "busy": "#8fb7ff", "wait": "#f0a35e", "idle": "#98a4b6"}
"""Colours of what a status means, each readable as text on the page and on its cards."""
_MEANING = {
    "good": ("committed", "cached", "succeeded"),
    "bad": ("failed", "damaged", "killed"),
    "busy": ("running",),
    "wait": ("queued", "waiting", "blocked", "stopped", "cancelled", "interrupted", "tried-again", "partial"),
}

_CSS = """
h1 { overflow-wrap: anywhere; }
h1 .badge { vertical-align: 4px; margin-left: 6px; }
.badge {
  display: inline-block; padding: 0 9px; border-radius: 9px; font-size: 12.5px; line-height: 20px; font-weight: 600;
  white-space: nowrap; color: var(--idle); border: 1px solid currentColor;
}
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 14px; font-size: 13.5px; margin-top: 8px; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.alert { padding: 12px 18px; border-left: 4px solid var(--wait); }
.alert.bad { border-left-color: var(--bad); }
.alert p { margin: 0; max-width: none; }
.alert code { overflow-wrap: anywhere; }
.message { white-space: pre-wrap; overflow-wrap: anywhere; }
.detail { color: var(--muted); font-size: 13.5px; overflow-wrap: anywhere; max-width: none; }
.now + .now { border-top: 1px solid var(--line); margin-top: 14px; }
.now h3 { margin: 10px 0 4px; }
.now .detail { margin: 2px 0 4px; }
progress { width: 100%; height: 10px; accent-color: var(--busy); }
.trouble + .trouble { border-top: 1px solid var(--line); margin-top: 14px; }
.trouble h3 { color: var(--bad); margin: 12px 0 2px; overflow-wrap: anywhere; }
.trouble p { margin: 2px 0 6px; max-width: none; }
button {
  font: inherit; font-size: 13px; color: var(--ink); background: var(--card); border: 1px solid var(--muted);
  border-radius: 8px; padding: 2px 10px; cursor: pointer;
}
summary:focus-visible, button:focus-visible, .scroll:focus-visible {
  outline: 2px solid var(--busy); outline-offset: 2px;
}
.figure.steps { min-width: 700px; }
.flow td:last-child:not(.number) { min-width: 20ch; }
.on-phone { display: none; }
svg.figure { overflow: visible; }
.wide { padding: 2px; }
svg .row { font-size: 13px; }
svg .box { stroke: var(--lane); }
svg .span { fill: var(--idle); stroke: var(--idle); }
svg .span.killed, svg .span.tried-again { fill-opacity: .25; stroke-dasharray: 4 3; }
@media (max-width: 560px) {
  h1 { font-size: 22px; }
  .on-phone { display: inline; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 8px; }
  .tile { padding: 10px 12px; }
  .tile .value { font-size: 20px; }
  .panels svg { overflow: visible; }
  .panels svg text { font-size: 15px; }
  .flow, .flow tbody, .flow tr, .flow th, .flow td { display: block; border: 0; padding: 0; text-align: left; }
  .flow thead { display: none; }
  .flow tr { border-bottom: 1px solid var(--line); padding: 9px 0; }
  .flow th, .flow td { display: inline-block; margin-right: 10px; }
  .flow td:empty { display: none; }
  .flow .number + :not(.number) { padding-left: 0; }
  .flow td:last-child:not(.number) { display: block; margin: 0; padding: 0; min-width: 0; }
  .flow td:last-child:not(.number) { color: var(--muted); font-size: 13.5px; }
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: 6px; }
}
"""

SCRIPT = """
"use strict";
const made = Number(document.body.dataset.made), every = Number(document.body.dataset.every);
const age = document.getElementById("age"), stale = document.getElementById("stale");
const hold = document.getElementById("hold");
const all = name => [...document.querySelectorAll(name)];
const before = history.state || {};
history.scrollRestoration = "manual";
all("details").forEach((one, i) => { one.open = Boolean((before.open || [])[i]); });
all(".scroll").forEach((one, i) => { one.scrollLeft = (before.across || [])[i] || 0; });
window.scrollTo(0, before.down || 0);
let held = Boolean(before.held);
function show() {
  hold.hidden = false;
  hold.setAttribute("aria-pressed", String(held));
  hold.textContent = held ? "Go on" : "Hold still";
  const old = Math.max(0, Math.round(Date.now() / 1000 - made));
  age.textContent = ", " + old + " s ago";
  stale.hidden = old < 60 + 3 * every;
  if (!stale.hidden && !stale.firstChild.textContent) stale.firstChild.textContent =
    "This page has not been written for a while by this device's clock: the run's coordinator may be gone. " +
    "dlm report brings the page up to date, dlm status tells who works on it.";
}
function remember() {
  history.replaceState({
    open: all("details").map(one => one.open), across: all(".scroll").map(one => one.scrollLeft),
    down: window.scrollY, held: held,
  }, "");
}
hold.addEventListener("click", () => { held = !held; remember(); show(); });
show();
setInterval(show, 1000);
setInterval(() => {
  if (held || document.hidden || String(getSelection())) return;
  remember();
  location.reload();
}, 1000 * every);
"""


def run_style() -> str:
    """CSS of the page of a run."""
    light, dark = (" ".join(f"--{name}: {value};" for name, value in c.items()) for c in (LIGHT, DARK))
    parts = [f":root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}", _CSS]
    for meaning, statuses in _MEANING.items():
        pills, boxes, spans = (
            ", ".join(f"{kind}.{s}" for s in statuses) for kind in (".badge", "svg .box", "svg .span")
        )
        parts.append(
            f"{pills} {{ color: var(--{meaning}); }} {boxes} {{ stroke: var(--{meaning}); stroke-width: 2; }} "
            f"{spans} {{ fill: var(--{meaning}); stroke: var(--{meaning}); }}"
        )
    return "\n".join(parts)
