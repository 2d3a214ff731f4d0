"""Colours and stylesheet of the page."""

from workflows.report import svg

_COLOURS = ("ink", "muted", "line", "card", "accent", "level", "lane", "task", "map", "gang")

_CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2330; --muted: #5d6778; --line: #e2e6ec; --lane: #b3bcc9;
  --accent: #2f6bd8; --level: #b4540a; --new: #ffe9b3; --new-ink: #4d3500; --mask: #ccd3dd;
  --task: #50607a; --map: #0b7a75; --gang: #8a3ab9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10141b; --card: #181e28; --ink: #e4e9f1; --muted: #98a4b6; --line: #2a3240; --lane: #4c5869;
    --accent: #74a5ff; --level: #f0a35e; --new: #4d3c10; --new-ink: #ffe3a1; --mask: #3a4454;
    --task: #a9b8d0; --map: #4fd0c8; --gang: #cf9af0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 0 20px 56px; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
}
main, header { max-width: 1120px; margin: 0 auto; }
header { padding: 40px 0 4px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 6px; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 22px 0 6px; }
p { margin: 4px 0 12px; max-width: 82ch; }
.lead, .note { color: var(--muted); }
.note { font-size: 13.5px; max-width: 100ch; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 20px 24px; margin-top: 18px;
}
.missing { border-left: 4px solid var(--level); }
.missing p { margin: 0; }
.verdict { font-weight: 600; margin: 14px 0 2px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 12px; margin-top: 18px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 18px; }
.tile dt { color: var(--muted); font-size: 13px; }
.tile dd { margin: 0; }
.tile .value { font-size: 25px; font-weight: 650; font-variant-numeric: tabular-nums; line-height: 1.35; }
.tile .value small { font-size: 14px; font-weight: 500; color: var(--muted); }
.tile .detail { font-size: 12.5px; color: var(--muted); }
dl { margin: 0; }
.scroll { overflow-x: auto; }
.figure { display: block; width: 100%; height: auto; margin: 12px 0 4px; }
.figure.chart { min-width: 560px; }
.narrow .figure.chart { min-width: 0; }
.narrow { display: none; }
.figure.graph { min-width: 820px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px 24px; }
.panels figure { margin: 8px 0 0; }
.panels .figure { margin: 0; }
figcaption { font-size: 13px; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin: 8px 0; }
th, td { text-align: left; padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr > :last-child { padding-right: 0; }
thead th { color: var(--muted); font-weight: 600; font-size: 12.5px; white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 600; }
td:last-child:not(.number) { min-width: 26ch; }
.number + :not(.number) { padding-left: 14px; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, .code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .92em; }
.sample + .sample { border-top: 1px solid var(--line); margin-top: 22px; }
.film { display: grid; grid-template-columns: max-content 1fr; gap: 4px 14px; margin: 8px 0 12px; }
.film dt { color: var(--muted); font-size: 12px; text-align: right; padding-top: 4px; white-space: nowrap; }
.film dd {
  margin: 0; padding: 3px 10px; border-radius: 6px; background: var(--page); min-width: 0;
  font: 12.5px/1.7 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: break-spaces; overflow-wrap: anywhere;
}
.film i {
  display: inline-block; width: .8em; height: .8em; margin: 0 1px; border-radius: 2px;
  background: var(--mask); vertical-align: -.05em;
}
.film b { font-weight: 400; color: var(--muted); opacity: .7; }
mark { background: var(--new); color: var(--new-ink); border-radius: 3px; padding: 1px 0; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; background: var(--mask); }
pre {
  margin: 8px 0 0; padding: 12px 14px; border-radius: 8px; background: var(--page); overflow-x: auto;
  font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
summary { cursor: pointer; color: var(--muted); font-size: 13.5px; }
details { margin-top: 10px; }
@media (max-width: 560px) {
  .wide { display: none; }
  .narrow { display: block; }
  body { padding: 0 12px 40px; }
  section { padding: 16px; }
  .film { grid-template-columns: 1fr; gap: 0; }
  .film dt { text-align: left; }
}
@media print { body { background: none; } section, .tile, .panels figure { break-inside: avoid; } }
"""


def page_style() -> str:
    """CSS of the page and of the drawings in it."""
    return _CSS + svg.stylesheet({name: f"var(--{name})" for name in _COLOURS})
