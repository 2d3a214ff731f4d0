"""Film strips and the table of the four systems: drawn from the committed figures, and what the README shows."""

import json
from pathlib import Path

import pytest

from benchmarks.figures_systems import FILE, FOLDER, SYSTEMS, draw_strip

README = Path(__file__).parents[2] / "README.md"
FOUND = json.loads(FILE.read_text(encoding="utf-8"))["systems"]


def test_all_four_systems_are_there() -> None:
    assert [system["recipe"] for system in FOUND] == list(SYSTEMS)


@pytest.mark.parametrize("system", FOUND, ids=lambda system: system["recipe"])
def test_strips_are_those_that_the_figures_draw(system: dict) -> None:
    committed = (FOLDER / f"film_{system['recipe']}.svg").read_text(encoding="utf-8")
    assert committed == draw_strip(system)


@pytest.mark.parametrize("system", FOUND, ids=lambda system: system["recipe"])
def test_the_readme_has_the_figures_of_the_runs(system: dict) -> None:
    (line,) = [
        line for line in README.read_text().splitlines() if line.startswith(f"| {system['system']}") and "±" in line
    ]
    assert f"{system['nelbo']:.4f} ± {system['nelbo_mc_se']:.4f}" in line
    assert f"{system['bpb_bound']:.4f} ± {system['bpb_bound_mc_se']:.4f}" in line
    assert f"{system['num_params'] / 1e6:.2f}M | {system['train_tokens'] / 1e6:.2f}M" in line


@pytest.mark.parametrize("system", FOUND, ids=lambda system: system["recipe"])
def test_frames_lead_from_masks_to_text(system: dict) -> None:
    first, last = system["frames"][0], system["frames"][-1]
    assert sum(piece is None for piece in first) >= len(first) - 1
    assert None not in last
    assert draw_strip(system).count('class="mask"') == sum(
        piece is None for frame in system["frames"] for piece in frame
    )
