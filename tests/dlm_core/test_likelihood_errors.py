"""Estimators of the likelihood of rows: what they refuse, the least they take, and what a caller adds up."""

import math
import re

import pytest
import torch

from dlm_core.likelihood import (
    RowEstimate,
    Scoring,
    any_order_bound,
    block_bound,
    block_chain_nll,
    continuous_bound,
    discrete_bound,
    exact_count_bound,
    ordered_nll,
)
from dlm_core.schedules import ClippedSchedule, LinearSchedule
from tests.support.block_world import (
    INNER,
    LENGTH,
    MASK,
    PROMPTED,
    ROWS,
    SINGLE,
    WHOLE,
    BlockView,
    Row,
    TableDenoiser,
    V,
    scoring,
)


@pytest.fixture(scope="module")
def wrong() -> TableDenoiser:
    return TableDenoiser(num_real=V, length=LENGTH, seed=1)


def test_rows_per_token_add_and_their_squared_errors_add():
    rows = RowEstimate(torch.tensor([3.0, 5.0]), torch.tensor([0.3, 0.4]), is_bound=True)
    assert rows.per_token(4) == (pytest.approx(2.0), pytest.approx(0.125))
    assert rows.per_token(1) == (pytest.approx(8.0), pytest.approx(0.5))
    with pytest.raises(ValueError, match="num_tokens is 0;"):
        rows.per_token(0)


def _of_columns(**changed) -> Scoring:
    x0 = torch.tensor([[0, 1, 2], [2, 1, 0]])
    columns = {"x0": x0, "scored": x0 < 2, "mask_token_id": 3, "sample_ids": torch.arange(2)}
    return Scoring(**(columns | changed))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask_token_id": -1}, "mask_token_id is -1; ids begin at 0"),
        ({"scored": torch.ones(2, 3)}, r"scored is torch.float32 of the shape \(2, 3\); wanted torch.bool"),
        ({"scored": torch.ones(2, 2, dtype=torch.bool)}, r"shape \(2, 2\); wanted torch.bool of the shape \(2, 3\)"),
        ({"sample_ids": torch.arange(1)}, r"sample_ids has the shape \(1,\) for 2 rows; wanted one each"),
        ({"sample_ids": torch.zeros(2, 1, dtype=torch.int64)}, r"sample_ids has the shape \(2, 1\) for 2 rows"),
    ],
)
def test_scoring_of_columns_that_do_not_fit_raises(changed, message):
    with pytest.raises(ValueError, match=message):
        _of_columns(**changed)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_likelihood_of_logits_that_are_no_distribution_raises(value):
    def denoise(xt: torch.Tensor, select: torch.Tensor) -> torch.Tensor:
        return torch.full((len(select), 4), value)

    with pytest.raises(FloatingPointError, match="the denoiser's logits hold nan, or no id of finite logit"):
        continuous_bound(denoise, _of_columns(), LinearSchedule(), t_min=0.9, num_draws=2, num_real_tokens=3)


REAL = {"num_real_tokens": 1}
ARGUMENTS = {
    continuous_bound: {"schedule": LinearSchedule(), "t_min": 0.1, "num_draws": 1} | REAL,
    discrete_bound: {"schedule": LinearSchedule(), "num_timesteps": 1, "num_draws": 1} | REAL,
    exact_count_bound: {"num_draws": 1},
    any_order_bound: {"num_orders": 1},
    block_bound: {"block_size": 2, "num_draws": 1},
    block_chain_nll: {"block_size": 1},
}


@pytest.mark.parametrize(
    ("estimator", "change", "message"),
    [
        (continuous_bound, {"num_draws": 0}, "num_draws is 0"),
        (continuous_bound, {"t_min": -0.5}, r"t_min is -0\.5; it must lie"),
        (continuous_bound, {"t_min": 1.0}, r"t_min is 1\.0; it must lie"),
        (continuous_bound, {"t_min": math.nan}, "t_min is nan; it must lie"),
        (continuous_bound, {"t_min": 0.0}, r"t_min is 0\.0, where LinearSchedule.* masks nothing"),
        (continuous_bound, {"num_real_tokens": 0}, "num_real_tokens is 0"),
        (discrete_bound, {"num_draws": 0}, "num_draws is 0"),
        (discrete_bound, {"num_timesteps": 0}, "num_timesteps is 0"),
        (discrete_bound, {"num_real_tokens": 0}, "num_real_tokens is 0"),
        (exact_count_bound, {"num_draws": 0}, "num_draws is 0"),
        (any_order_bound, {"num_orders": 0}, "num_orders is 0"),
        (block_bound, {"num_draws": 0}, "num_draws is 0"),
        (block_bound, {"block_size": 3}, "block_size is 3"),
        (block_chain_nll, {"block_size": 3}, "block_size is 3"),
        (block_chain_nll, {"block_size": 0}, "block_size is 0"),
    ],
)
def test_estimator_of_bad_argument_raises_and_names_it(wrong, estimator, change, message):
    with pytest.raises(ValueError, match=message):
        estimator(wrong, scoring(ROWS), **ARGUMENTS[estimator] | change)


@pytest.mark.parametrize("estimator", ARGUMENTS)
def test_estimator_of_least_arguments_is_finite(wrong, estimator):
    takes_x0 = estimator in (block_bound, block_chain_nll)
    denoise = BlockView(wrong, ARGUMENTS[estimator]["block_size"], MASK) if takes_x0 else wrong
    estimate = estimator(denoise, scoring([WHOLE, PROMPTED]), **ARGUMENTS[estimator])
    assert estimate.nats.isfinite().all()
    assert estimate.is_bound == (estimator is not block_chain_nll)
    if estimator is block_chain_nll:
        assert (estimate.mc_se == 0).all()
    else:
        assert estimate.mc_se.isnan().all()  # one draw tells nothing of its error


def test_continuous_bound_from_time_zero_is_finite_where_something_is_masked_then(wrong):
    arguments = ARGUMENTS[continuous_bound] | {"t_min": 0.0, "schedule": ClippedSchedule(0.1, 0.9)}
    assert continuous_bound(wrong, scoring(ROWS), **arguments).nats.isfinite().all()


@pytest.mark.parametrize("ranks", [[1, 2, 3, 4], [0, 0, 1, 2], [0, 1, 3, 4], [-1, 0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 9]])
def test_ordered_nll_of_ranks_that_are_no_order_raises(wrong, ranks):
    message = re.escape(f"the ranks of row 1's scored tokens are {ranks}; they must be 0, 1, ..., n - 1, each once")
    with pytest.raises(ValueError, match=message):
        ordered_nll(wrong, scoring([WHOLE, WHOLE, WHOLE]), torch.tensor([[3, 2, 1, 0], ranks, ranks[::-1]]))


def test_ordered_nll_reads_the_ranks_of_scored_tokens_alone(wrong):
    with pytest.raises(ValueError, match=r"the ranks of row 0's scored tokens are \[1, 2\];"):
        ordered_nll(wrong, scoring([INNER]), torch.tensor([[0, 1, 2, 3]]))
    read = ordered_nll(wrong, scoring([INNER]), torch.tensor([[0, 1, 0, 1]]))
    same = ordered_nll(wrong, scoring([INNER]), torch.tensor([[-7, 1, 0, 50]]))
    assert torch.equal(read.nats, same.nats)


def test_scoring_of_no_rows_raises():
    with pytest.raises(ValueError, match="x0 has no row"):
        Scoring(*(torch.zeros(0, 4, dtype=dtype) for dtype in (torch.int64, torch.bool)), MASK, torch.arange(0))


def test_scoring_of_a_mask_token_raises():
    with pytest.raises(ValueError, match=f"scored token is the mask token {MASK}"):
        scoring([WHOLE, Row((MASK, 0, 0, 0), (True, False, False, False))])


@pytest.mark.parametrize("batch_rows", [0, -1])
def test_scoring_of_less_than_one_row_a_batch_raises(batch_rows):
    assert scoring([SINGLE], batch_rows=1).batch_rows == 1
    with pytest.raises(ValueError, match=f"batch_rows is {batch_rows};"):
        scoring([SINGLE], batch_rows=batch_rows)
