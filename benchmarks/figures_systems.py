"""Table and film strips of the four systems: ``python -m benchmarks.figures_systems [STORE ...]``.

With stores their newest finished runs of the tiny recipes are read and ``results/systems.json`` is written; the strips
are drawn from that file, a test compares them.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import RESULTS, legible, table
from benchmarks.figures_pipeline import BACKGROUND, PALETTE
from pipeline.artifact import checked, load_manifest, read_json
from workflows.copies import local_copy
from workflows.report.data import likelihood_figures
from workflows.report.svg import text
from workflows.runs import committed_outputs, frozen_plan
from workflows.store import RunPlace, Store, open_store

SYSTEMS = {
    "mdlm_tiny": "MDLM",
    "bd3lm_tiny": "BD3-LM",
    "dream_tiny": "Dream",
    "llada_moe_tiny": "LLaDA-MoE",
}
FILE = RESULTS / "systems.json"
FOLDER = Path(__file__).parent / "figures"

_MAX_CHARS, _MAX_FRAMES = 118, 6
_CHAR, _LINE, _LABEL, _MARGIN = 7.25, 24.0, 76.0, 18.0
Frame = list[str | None]


def read_system(store: Store, recipe: str, run: RunPlace) -> dict[str, Any]:
    """Figures and one sample of a finished run."""
    found = {step: local_copy(place) for step, place in committed_outputs(store, run).items()}
    results = read_json(checked(found["evaluate"], "results.json"))
    figures = likelihood_figures(results)
    training = load_manifest(found["pretrain"]).stats
    samples = checked(found["generate"], "samples.jsonl").read_text(encoding="utf-8").splitlines()
    sample = json.loads(samples[0])
    chosen = _spread(len(sample["frames"]))
    num_tokens = _fitting(sample["frames"][-1])
    return {
        "system": SYSTEMS[recipe],
        "recipe": recipe,
        "num_params": training["num_params"],
        "train_tokens": training["tokens"],
        figures.nll: results[figures.nll],
        f"{figures.nll}_mc_se": results[f"{figures.nll}_mc_se"],
        figures.bpb: results[figures.bpb],
        f"{figures.bpb}_mc_se": results[f"{figures.bpb}_mc_se"],
        "unigram_entropy": results["unigram_entropy"],
        "xz_bpb": results["xz_bpb"],
        "nfe": load_manifest(found["generate"]).stats["nfe"],
        "passes": [sample["steps"][place] for place in chosen],
        "frames": [sample["frames"][place][:num_tokens] for place in chosen],
    }


def _spread(num_frames: int) -> list[int]:
    number = min(_MAX_FRAMES, num_frames)
    return sorted({round(i * (num_frames - 1) / (number - 1)) for i in range(number)})


def _fitting(final: Frame) -> int:
    """Tokens whose pieces fit on a line."""
    used = 0
    for number, piece in enumerate(final):
        used += len(_shown(piece))
        if used > _MAX_CHARS:
            return number
    return len(final)


def _shown(piece: str | None) -> str:
    return (piece or "").replace("\n", "⏎").replace("\t", " ")


def draw_strip(system: Mapping[str, Any]) -> str:
    """One line a frame: masks as bars, what came since the line above on a coloured ground."""
    final = system["frames"][-1]
    widths = [max(1, len(_shown(piece))) * _CHAR for piece in final]
    width = _LABEL + sum(widths) + 2 * _MARGIN
    height = 30 + _LINE * len(system["frames"]) + 2 * _MARGIN
    parts = [text(0, 12, f"{system['system']} ({system['recipe']})", "name")]
    before: Frame = [None] * len(final)
    for number, (passes, frame) in enumerate(zip(system["passes"], system["frames"], strict=True)):
        y = 30 + _LINE * number
        parts.append(text(0, y + 14, f"{passes} passes", "sub"))
        x = _LABEL
        for piece, old, piece_width in zip(frame, before, widths, strict=True):
            if piece is None:
                parts.append(
                    f'<rect x="{x:.1f}" y="{y + 4:g}" width="{piece_width - 1.5:.1f}" height="12" class="mask"/>'
                )
            else:
                if old is None:
                    parts.append(f'<rect x="{x:.1f}" y="{y:g}" width="{piece_width:.1f}" height="20" class="new"/>')
                shown = _shown(piece).replace(" ", "\N{NO-BREAK SPACE}")
                length = f' textLength="{len(shown) * _CHAR:.1f}" lengthAdjust="spacingAndGlyphs"'
                parts.append(text(x, y + 14, shown, "piece").replace(' class="piece"', f' class="piece"{length}'))
            x += piece_width
        before = frame
    style = (
        f"text{{font-family:system-ui,'DejaVu Sans',sans-serif;fill:{PALETTE['ink']}}}"
        f".name{{font-size:14px;font-weight:600}}.sub{{font-size:12px;fill:{PALETTE['muted']}}}"
        ".piece{font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:12px}"
        f".mask{{fill:{PALETTE['lane']}}}.new{{fill:{PALETTE['accent']};opacity:.18}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img"><title>A sample of {system["recipe"]} emerging from masks</title>'
        f'<style>{style}</style><rect x=".5" y=".5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="12" '
        f'fill="{BACKGROUND}" stroke="{PALETTE["line"]}"/><g transform="translate({_MARGIN:g} {_MARGIN:g})">'
        f"{''.join(parts)}</g></svg>\n"
    )


def systems_table(systems: Sequence[Mapping[str, Any]]) -> str:
    """What is in the README, in its columns."""
    rows = [
        [
            s["system"],
            f"{s['num_params'] / 1e6:.2f}M",
            f"{s['train_tokens'] / 1e6:.2f}M",
            f"{s['nelbo']:.4f} ± {s['nelbo_mc_se']:.4f}",
            f"{s['bpb_bound']:.4f} ± {s['bpb_bound_mc_se']:.4f}",
            f"{s['nfe']:g}",
        ]
        for s in systems
    ]
    return table(["system", "parameters", "tokens", "bound, nats/token", "bound, bits/byte", "passes a sample"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, if stores are given; draw the strips."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures_systems", description=main.__doc__)
    parser.add_argument("stores", type=Path, nargs="*", metavar="STORE")
    stores = parser.parse_args(argv).stores
    if stores:
        found: dict[str, dict[str, Any]] = {}
        for path in stores:
            store = open_store(path)
            for run in store.runs():
                recipe = frozen_plan(run).workflow
                if recipe in SYSTEMS and recipe not in found:
                    found[recipe] = read_system(store, recipe, run)
        if missing := set(SYSTEMS) - set(found):
            raise SystemExit(f"no run of {', '.join(sorted(missing))} in {' '.join(map(str, stores))}")
        FILE.write_text(legible({"systems": [found[recipe] for recipe in SYSTEMS]}) + "\n", encoding="utf-8")
    systems = json.loads(FILE.read_text(encoding="utf-8"))["systems"]
    for system in systems:
        (FOLDER / f"film_{system['recipe']}.svg").write_text(draw_strip(system), encoding="utf-8")
    print(systems_table(systems))


if __name__ == "__main__":
    main()
