"""The committed figures are what the code draws, and the variances in them are those of dlm_core's estimators."""

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from benchmarks import figures, figures_pipeline
from benchmarks.figures_masks import BLOCK_SIZE, DOC_LENGTHS, PARTS, SEQ_LEN, block_matrices, upper_matrices
from benchmarks.figures_moments import (
    NUM_BINS,
    Estimator,
    World,
    by_time,
    enumerate_world,
    estimators,
    median_time,
    optimal_density,
    shares_below,
    text_means,
    variance,
)
from benchmarks.figures_schedules import spread
from benchmarks.figures_variance import NUM_STRATA, T_MIN, make_joint
from dlm_core import masks
from dlm_core.corpus_bound import stratified_counts
from dlm_core.corruption import mask_exact_count, mask_tokens
from dlm_core.cross_entropy import token_cross_entropy
from dlm_core.noise import hash_uniform, stratified_uniform
from dlm_core.objectives import Corrupted, ExactCount, Nelbo, Weighting, masked_targets
from dlm_core.schedules import SCHEDULES, LinearSchedule
from dlm_core.variance import WeightedTimes, uniform_log_mask_prob
from tests.support.reference import Joint, all_masks, apply_mask
from tests.support.toy_world import ExactDenoiser
from workflows.graph import wanted_steps
from workflows.recipes.quickstart import quickstart

MAX_BYTES = 60_000
EXACT = 1e-9  # float64 sums of 1 / t^2 down to t = 1e-3
GRID = 1e-5  # a trapezoid rule of 5,001 points in log t
Z = 5.1  # two-sided normal: a false alarm in 2.9 million, two in a test: 7e-7
NUM_BATCHES = 600
NUM_DRAWS = 20_000
NOISE_SEED = 7
NAMES = ("uniform t", "change of variables", "optimal density", "exact count")
MASK_ID = 3


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of figures drawn now."""
    folder = tmp_path_factory.mktemp("figures") / "new"
    figures.main([str(folder)])
    return folder


@pytest.fixture(scope="module")
def joint() -> Joint:
    """Smaller than the texts of the figure, for the sake of the table of conditionals."""
    return Joint(3, 4, seed=4, sharpness=2.0)


@pytest.fixture(scope="module")
def world(joint: Joint) -> World:
    return enumerate_world(joint)


@pytest.fixture(scope="module")
def denoise(joint: Joint) -> ExactDenoiser:
    return ExactDenoiser(joint)


@pytest.fixture(scope="module")
def strata() -> Tensor:
    """Uniform numbers of many batches, one stratum a row."""
    return torch.cat([stratified_uniform(NOISE_SEED, step, NUM_STRATA) for step in range(NUM_BATCHES)])


# Files


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figure_drawn_anew_equals_the_committed_file(drawn: Path, name: str) -> None:
    assert (drawn / f"{name}.svg").read_bytes() == (figures.FOLDER / f"{name}.svg").read_bytes()


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figure_file_is_small_static_and_on_a_ground_of_its_own(name: str) -> None:
    path = figures.FOLDER / f"{name}.svg"
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    shapes = [element for element in root if not element.tag.endswith(("title", "desc", "style"))]
    ground = shapes[0].attrib
    assert path.stat().st_size < MAX_BYTES
    assert set(tags) <= {"svg", "title", "desc", "style", "rect", "path", "text", "tspan", "g"}
    assert [float(ground[side]) + 1 for side in ("width", "height")] == [
        float(v) for v in root.attrib["viewBox"].split()[2:]
    ]
    assert re.fullmatch("#[0-9a-f]{6}", ground["fill"])


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figure_text_begins_inside_the_picture(name: str) -> None:
    root = ElementTree.fromstring((figures.FOLDER / f"{name}.svg").read_text(encoding="utf-8"))
    width, height = (float(v) for v in root.attrib["viewBox"].split()[2:])
    placed = [element.attrib for element in root.iter() if element.tag.endswith("text") and "x" in element.attrib]
    assert len(placed) > 20
    assert all(0 <= float(at["x"]) < width and 0 <= float(at["y"]) < height for at in placed)


def test_schedules_figure_names_every_published_schedule_once_a_panel_and_once_below(drawn: Path) -> None:
    root = ElementTree.fromstring((drawn / "schedules.svg").read_text(encoding="utf-8"))
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    expected = {name: 2 if name == "sigma_linear" else 3 for name in [*SCHEDULES, "clipped"]}
    assert {name: words.count(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([], []),
        ([0.0, 30.0], [0.0, 30.0]),
        ([0.0, 4.0], [-3.0, 7.0]),
        ([0.0, 10.0], [0.0, 10.0]),
        ([0.0, 1.0, 11.0], [-6.0, 4.0, 14.0]),
        ([0.0, 12.0, 13.0], [-5 / 3, 25 / 3, 55 / 3]),
    ],
)
def test_spread_of_close_labels_keeps_the_gap_and_the_middle(places: list[float], expected: list[float]) -> None:
    assert spread(places, 10.0) == pytest.approx(expected, abs=1e-12)


def test_mask_figure_parts_of_block_diffusion_have_the_entries_of_the_paper() -> None:
    entries = {name: int(block_matrices()[0].entries[colour].sum()) for name, colour in PARTS.items()}
    assert entries == {
        "M_BD": SEQ_LEN * BLOCK_SIZE,
        "M_OBC": SEQ_LEN * (SEQ_LEN - BLOCK_SIZE) // 2,
        "M_BC": SEQ_LEN * (SEQ_LEN + BLOCK_SIZE) // 2,
    }


def test_mask_figure_packed_parts_are_those_of_block_diffusion_within_documents() -> None:
    whole, packed = block_matrices()
    document = next(m for m in upper_matrices() if m.name == "same_document")
    (same,) = document.entries.values()
    for colour, entries in packed.entries.items():
        for q, k in itertools.product(range(2 * SEQ_LEN), repeat=2):
            assert entries[q, k] == (whole.entries[colour][q, k] and same[q % SEQ_LEN, k % SEQ_LEN])


def test_mask_figure_names_are_made_of_functions_of_masks() -> None:
    names = [matrix.name for matrix in upper_matrices() + block_matrices()]
    assert [
        name for name in names if not all(callable(getattr(masks, word, None)) for word in re.findall(r"\w+", name))
    ] == []
    assert names[-1] == "both(block_diffusion, on_both_halves(same_document))"


def test_mask_figure_dashes_document_ends_where_packed_and_block_ends_elsewhere() -> None:
    doc_end, halves = DOC_LENGTHS[0], range(0, 2 * SEQ_LEN, SEQ_LEN)
    cuts = {matrix.name: set(matrix.cuts) for matrix in upper_matrices() + block_matrices()}
    dashed = {name: places for name, places in cuts.items() if places}
    assert dashed == {
        "same_document": {doc_end},
        "block_causal": set(range(BLOCK_SIZE, SEQ_LEN, BLOCK_SIZE)),
        "block_diffusion": set(range(BLOCK_SIZE, 2 * SEQ_LEN, BLOCK_SIZE)),
        "both(block_diffusion, on_both_halves(same_document))": {half + doc_end for half in halves},
    }


def test_mask_figure_annealed_colours_split_at_the_diagonal() -> None:
    causal, drawn = next(m for m in upper_matrices() if m.name == "annealed").entries.values()
    places = list(itertools.product(range(SEQ_LEN), repeat=2))
    assert all(bool(causal[q, k]) == (k <= q) for q, k in places)
    assert 0 < sum(bool(drawn[q, k]) for q, k in places if k > q) == int(drawn.sum())


# Variances


def naive_moments(joint: Joint) -> list[tuple[float, list[float], list[float]]]:
    """Of every text its probability, and mean and mean square of the loss over the masks of each size."""
    moments = []
    for x, p in joint.prob.items():
        first, second = [0.0] * (joint.length + 1), [0.0] * (joint.length + 1)
        for is_masked in all_masks(joint.length):
            xt = apply_mask(x, is_masked, joint.mask_token_id)
            places = [place for place, hit in enumerate(is_masked) if hit]
            loss = math.fsum(-math.log(joint.conditional(xt, place)[x[place]]) for place in places)
            first[len(places)] += loss / math.comb(joint.length, len(places))
            second[len(places)] += loss**2 / math.comb(joint.length, len(places))
        moments.append((p, first, second))
    return moments


def integral_over_binomial(values: list[float], power: int, low: float) -> float:
    """Integral over [low, 1] of t^-power E values[Bin(L, t)] in closed form; values[0] is 0."""
    length = len(values) - 1
    total = 0.0
    for k in range(1, length + 1):
        for j in range(length - k + 1):
            n = k + j - power
            piece = -math.log(low) if n == -1 else (1 - low ** (n + 1)) / (n + 1)
            total += math.comb(length, k) * values[k] * math.comb(length - k, j) * (-1) ** j * piece
    return total


def test_variance_of_uniform_times_equals_the_closed_form() -> None:
    joint = Joint(3, 3, seed=4, sharpness=2.0)
    expected = 0.0
    for p, first, second in naive_moments(joint):
        mean = integral_over_binomial(first, 1, T_MIN) / (1 - T_MIN)
        expected += p * (integral_over_binomial(second, 2, T_MIN) / (1 - T_MIN) - mean**2)
    found = enumerate_world(joint)
    assert variance(found, estimators(found, T_MIN)[0]) == pytest.approx(expected, rel=EXACT)


def test_variance_of_exact_counts_equals_the_sum_over_all_counts() -> None:
    joint = Joint(3, 3, seed=4, sharpness=2.0)
    expected = 0.0
    for p, first, second in naive_moments(joint):
        mean = sum(3 / k * first[k] for k in (1, 2, 3)) / 3
        expected += p * (sum((3 / k) ** 2 * second[k] for k in (1, 2, 3)) / 3 - mean**2)
    found = enumerate_world(joint)
    assert variance(found, estimators(found, T_MIN)[3]) == pytest.approx(expected, rel=EXACT)


def test_moments_at_one_time_equal_those_by_enumeration() -> None:
    joint, t = Joint(3, 3, seed=4, sharpness=2.0), 0.3
    law = [math.comb(3, k) * t**k * (1 - t) ** (3 - k) for k in range(4)]
    means, variances = 0.0, 0.0
    for p, first, second in naive_moments(joint):
        mean = sum(q * a for q, a in zip(law, first, strict=True)) / t
        means += p * mean
        variances += p * (sum(q * b for q, b in zip(law, second, strict=True)) / t**2 - mean**2)
    found = by_time(enumerate_world(joint), torch.tensor([t], dtype=torch.float64))
    assert (float(found.mean), float(found.variance)) == pytest.approx((means, variances), rel=EXACT)


def test_world_of_the_figure_has_the_entropy_of_its_texts() -> None:
    joint = make_joint()
    entropy = -math.fsum(p * math.log(p) for p in joint.prob.values())
    assert f"{entropy:.4f}" in (figures.FOLDER / "variance.svg").read_text(encoding="utf-8")
    assert enumerate_world(joint).entropy == pytest.approx(entropy, rel=EXACT)


def test_mean_of_exact_counts_is_minus_the_log_probability_of_each_text(world: World) -> None:
    means = text_means(world, estimators(world, T_MIN)[3])
    torch.testing.assert_close(means, -world.probs.log(), rtol=EXACT, atol=0.0)
    assert world.entropy == pytest.approx(float(world.probs @ means), rel=EXACT)


def test_means_of_all_densities_of_time_are_equal(world: World) -> None:
    uniform, *others = (text_means(world, estimator) for estimator in estimators(world, T_MIN)[:3])
    for means in others:
        torch.testing.assert_close(means, uniform, rtol=EXACT, atol=0.0)


def test_optimal_density_has_masses_by_the_root_of_the_second_moment(world: World) -> None:
    second = (world.probs @ world.second).tolist()
    edges = [T_MIN + (1 - T_MIN) * i / NUM_BINS for i in range(NUM_BINS + 1)]
    above = [integral_over_binomial(second, 2, edge) for edge in edges]
    roots = [math.sqrt(low - high) for low, high in itertools.pairwise(above)]
    expected = [0.9 * root / sum(roots) + 0.1 / NUM_BINS for root in roots]
    assert optimal_density(world, T_MIN).mass == pytest.approx(expected, rel=EXACT)


def test_half_of_the_variance_lies_below_the_median_time(world: World) -> None:
    median = median_time(world, T_MIN)
    found = by_time(world, torch.logspace(math.log10(T_MIN), 0, 5_001, dtype=torch.float64))
    below = found.t <= median
    for values, share in zip((found.mean, found.variance), shares_below(world, median, T_MIN), strict=True):
        area = values * found.t
        part = torch.trapezoid(area[below], found.t[below].log()) / torch.trapezoid(area, found.t.log())
        assert float(part) == pytest.approx(share, abs=1e-3)  # one step of the grid
    assert shares_below(world, median, T_MIN)[1] == pytest.approx(0.5, abs=GRID)


def draw_losses(
    joint: Joint, denoise: ExactDenoiser, world: World, name: str, t_min: float, u: Tensor, num_strata: int
) -> tuple[Tensor, Tensor]:
    """What dlm_core's training code gives for rows of random texts: a loss each, and which text it was."""
    num_rows, length = len(u), joint.length
    ids = torch.arange(num_rows)
    text = torch.searchsorted(world.probs.cumsum(0), hash_uniform(NOISE_SEED, 99, ids)).clamp(max=len(world.probs) - 1)
    x0, every = torch.tensor(list(joint.sequences()))[text], torch.ones(num_rows, length, dtype=torch.bool)
    weighting: Weighting
    if name == "exact count":
        counts = 1 + torch.floor(u * length).long()
        if num_strata > 1:
            lengths = torch.full((num_strata,), length)
            batches = [stratified_counts(NOISE_SEED, step, lengths) for step in range(num_rows // num_strata)]
            counts = torch.cat(batches)
        xt = mask_exact_count(
            x0, counts[:, None], ids, noise_seed=NOISE_SEED, step=0, mask_token_id=MASK_ID, maskable=every
        )
        weighting, times = ExactCount(), WeightedTimes(torch.ones(num_rows).double(), torch.ones(num_rows).double())
    else:
        sample: dict[str, Callable[[Tensor], WeightedTimes]] = {
            "uniform t": lambda u: WeightedTimes(t_min + (1 - t_min) * u, torch.ones_like(u)),
            "change of variables": lambda u: uniform_log_mask_prob(u, LinearSchedule(), t_min),
            "optimal density": optimal_density(world, t_min).sample,
        }
        weighting, times = Nelbo(LinearSchedule()), sample[name](u)
        xt = mask_tokens(x0, times.t[:, None], ids, noise_seed=NOISE_SEED, step=0, mask_token_id=MASK_ID)
    batch = Corrupted(x0, xt, times.t[:, None].expand(-1, length), every, every, MASK_ID)
    targets = masked_targets(batch, weighting, weighting)
    nats = token_cross_entropy(denoise(xt, targets.select), targets.targets) * targets.weight
    losses = torch.zeros(num_rows, dtype=torch.float64).index_add_(0, targets.select // length, nats)
    return losses * times.importance, text


@pytest.mark.parametrize("num_strata", [1, NUM_STRATA])
# Where single losses reach 1 / t_min times a cross-entropy, a t_min that keeps their fourth moment small.
@pytest.mark.parametrize(("name", "t_min"), list(zip(NAMES, (0.05, T_MIN, 0.05, T_MIN), strict=True)))
def test_mean_and_variance_equal_those_of_drawn_losses(
    joint: Joint, denoise: ExactDenoiser, world: World, strata: Tensor, name: str, t_min: float, num_strata: int
) -> None:
    u = strata if num_strata > 1 else hash_uniform(NOISE_SEED, 98, torch.arange(NUM_DRAWS))
    estimator: Estimator = next(e for e in estimators(world, t_min) if e.name == name)
    losses, text = draw_losses(joint, denoise, world, name, t_min, u, num_strata)
    deviation = (losses - text_means(world, estimator)[text]).view(-1, num_strata).mean(dim=1)
    square = num_strata * deviation**2
    assert abs(float(deviation.mean())) < Z * float(deviation.std()) / math.sqrt(len(deviation))
    expected = variance(world, estimator, num_strata)
    assert abs(float(square.mean()) - expected) < Z * float(square.std()) / math.sqrt(len(square))


def test_picture_is_a_whole_svg_with_every_stage_and_kind():
    drawn = figures_pipeline.draw_picture(quickstart(), 4)
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for step in wanted_steps(quickstart()):
        assert step.name in words
    assert words.count("gang") == 2  # the stage, and the legend
    assert words.count("map") == 5
    assert root.find("{http://www.w3.org/2000/svg}rect") is not None
    assert "var(" not in drawn


@pytest.mark.parametrize("file", figures_pipeline.PICTURES)
def test_pictures_of_the_readme_are_those_of_the_recipes(file):
    recipe, layers_per_row = figures_pipeline.PICTURES[file]
    drawn = figures_pipeline.draw_picture(recipe(), layers_per_row)
    steps = wanted_steps(recipe())
    for step in steps:
        assert f">{step.name}<" in drawn
    assert drawn.count('class="edge"') >= len(steps) - 1
    assert (figures_pipeline.OUT / file).read_text() == drawn
