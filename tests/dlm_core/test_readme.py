"""What the README of the core shows: its code runs and does what it says, its tests lie where it says."""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dlm_core
from dlm_core.objectives import Nelbo, loss_output, masked_targets

README = (Path(dlm_core.__file__).parent / "README.md").read_text(encoding="utf-8")
TESTS = Path(__file__).parent
FLOAT32 = 1e-5  # sums of at most seven losses of order 10 in float32
MIN_ROWS = 20  # of the table of proofs; fewer means that it was not found
MIN_FORMULAS = 100

WRONG_SHAPE = """
import torch
from dlm_core.corruption import mask_tokens
x0, ids = torch.ones(2, 6, dtype=torch.int64), torch.arange(2)
mask_tokens(x0, torch.full((2,), 0.5), ids, noise_seed=0, step=0, mask_token_id=7)
"""


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """The names that the blocks leave behind, run in turn."""
    names: dict[str, Any] = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", README, re.S)):
        exec(compile(block, f"README block {number}", "exec"), names)
    return names


def _cross_entropy(shown: dict[str, Any], xt: list[int], place: int, target: int) -> float:
    """-log p of a token of one row, in loops over float64 numbers."""
    embedding, mixing = shown["embedding"].tolist(), shown["mixing"].tolist()
    width = range(len(mixing))
    mean = [sum(embedding[token][i] for token in xt) / len(xt) for i in width]
    mixed = [sum((embedding[xt[place]][i] + mean[i]) * mixing[i][j] for i in width) for j in width]
    scores = [sum(row[j] * mixed[j] for j in width) for row in embedding]
    real = [score for token, score in enumerate(scores) if token != shown["mask_token_id"]]
    top = max(real)
    return top + math.log(sum(math.exp(score - top) for score in real)) - scores[target]


# The step of training


def test_example_masks_some_text_and_no_prompt_or_padding(shown):
    x0, xt = shown["x0"].tolist(), shown["xt"].tolist()
    free = [(0, place) for place in (2, 3, 4, 5)] + [(1, place) for place in (1, 2, 3)]
    masked = [at for at in itertools.product(range(2), range(6)) if xt[at[0]][at[1]] == 7]
    assert set(masked) <= set(free)
    assert {row for row, _ in masked} == {0, 1}
    assert all(
        xt[row][place] == x0[row][place]
        for row, place in itertools.product(range(2), range(6))
        if (row, place) not in masked
    )


def test_example_loss_equals_the_naive_weighted_sum(shown):
    x0, xt, t = shown["x0"].tolist(), shown["xt"].tolist(), shown["t"].flatten().tolist()
    expected = sum(
        _cross_entropy(shown, xt[row], place, x0[row][place]) / t[row]
        for row, place in itertools.product(range(2), range(6))
        if xt[row][place] == 7
    )
    assert shown["loss"].item() == pytest.approx(expected / 7, rel=FLOAT32)
    assert shown["out"].nelbo_sum.item() == pytest.approx(expected, rel=FLOAT32)


def test_example_gradient_is_finite_and_reaches_every_parameter(shown):
    for parameter in (shown["embedding"], shown["mixing"]):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_example_without_a_bound_has_the_loss_and_no_nelbo_sum(shown):
    asked = masked_targets(shown["noised"], Nelbo(shown["schedule"]))
    out = loss_output(shown["head"], asked)
    assert out.nelbo_sum is None
    assert out.loss_sum.item() == shown["out"].loss_sum.item()


# The model


def test_example_model_has_the_size_it_says_and_its_loss_reaches_every_parameter(shown):
    config = shown["config"]
    assert sum(parameter.numel() for parameter in shown["model"].parameters()) == config.num_params()
    assert config.num_active_params() < config.num_params()
    assert shown["total"].isfinite()
    assert shown["total"] > shown["sums"].loss_sum / 7
    for name, parameter in shown["model"].named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(layer.feed_forward.gate.weight.grad.any() for layer in shown["model"].blocks)


def test_example_decoding_block_by_block_equals_the_one_pass(shown):
    torch.testing.assert_close(torch.cat(shown["decoded"], dim=1), shown["in_one_pass"], rtol=0, atol=FLOAT32)


# The scores


def test_example_denoiser_keeps_the_contract(shown):
    logits = shown["denoise"](shown["xt"], shown["asked"].select)
    assert logits.shape == (len(shown["asked"].select), 8)
    assert (logits[:, 7] == -torch.inf).all()
    assert logits[:, :7].isfinite().all()


def test_example_score_of_the_short_row_equals_the_sum_over_its_masks(shown):
    x0 = shown["x0"][1].tolist()
    expected = 0.0
    for count in (1, 2, 3):
        for chosen in itertools.combinations((1, 2, 3), count):
            xt = [7 if place in chosen else token for place, token in enumerate(x0)]
            nats = sum(_cross_entropy(shown, xt, place, x0[place]) for place in chosen)
            expected += nats / (count * math.comb(3, count))
    assert shown["estimate"].nats[1].item() == pytest.approx(expected, rel=FLOAT32)
    assert shown["estimate"].mc_se[1].item() == 0.0


def test_example_score_a_token_adds_rows_and_squares(shown):
    estimate = shown["estimate"]
    assert estimate.mc_se[0].item() > 0.0  # drawn, not enumerated
    assert shown["nats"] == pytest.approx(sum(estimate.nats.tolist()) / 7)
    assert shown["mc_se"] == pytest.approx(estimate.mc_se.norm().item() / 7)


# Shapes


def test_shape_checks_as_shown_name_parameter_found_and_expected_shape():
    (switch,) = re.findall(r"`(from jaxtyping import install_import_hook; .*?)`", README)
    code = [sys.executable, "-c", switch + WRONG_SHAPE]
    done = subprocess.run(code, capture_output=True, text=True, cwd=TESTS.parents[1], check=False)
    assert done.returncode == 1
    for part in ("parameter 'mask_prob'", "f32[2](torch)", "Float[Tensor, 'B K']"):
        assert part in done.stderr


# Text


def _path(file: str) -> Path:
    """Beside this one, unless another folder of tests is named."""
    return (TESTS.parent if "/" in file else TESTS) / file


def test_proof_table_names_the_file_of_every_test():
    rows = re.findall(r"^\| \d* ?\| [^|]+ \| (`(?:pipeline/)?test_\w+\.py`: .+) \|$", README, re.M)
    assert len(rows) >= MIN_ROWS
    for part in itertools.chain.from_iterable(row.split("; ") for row in rows):
        file, names = part.split(": ")
        defined = re.findall(r"^def (test_\w+)", _path(file.strip("`")).read_text(encoding="utf-8"), re.M)
        assert {name.strip("`") for name in names.split(", ")} <= set(defined), file


def test_formulas_hold_nothing_that_markdown_takes_away():
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    assert "$$" not in text  # display formulas are ```math blocks, which no markdown touches
    formulas = re.findall(r"\$([^$\n]*)\$", re.sub(r"\$`[^`\n]*`\$|`[^`\n]*`", "", text))  # $`..`$ is taken as it is
    assert len(formulas) >= MIN_FORMULAS
    for formula in formulas:
        assert not re.search(r"\\[^A-Za-z]", formula), f"markdown drops the backslash: {formula}"
        assert formula == formula.strip(), f"no formula to GitHub: {formula}"
