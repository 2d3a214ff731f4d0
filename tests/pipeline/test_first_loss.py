"""What training refuses before and after its first step."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from dlm_core.models.config import ModelConfig
from pipeline.errors import NumericsError
from pipeline.pretrain.guards import check_first_loss
from tests.support.tiny_run import TINY

CONFIG = ModelConfig(TINY.architecture, vocab_size=300, mask_token_id=299)


def _sums(loss: float, num_masked: int = 400) -> torch.Tensor:
    """By bin of t: loss sums, then numbers of masked tokens."""
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    return torch.cat([shares * loss * num_masked, shares * num_masked])


@pytest.mark.parametrize("loss", [math.log(299), math.log(299) + 0.02, math.log(299) - 0.3, math.log(299) + 0.3])
def test_first_loss_of_an_untrained_model_is_let_through(loss):
    check_first_loss(CONFIG, _sums(loss))


@pytest.mark.parametrize("loss", [0.0, 4.0, 7.0, math.log(299) - 0.4, math.log(299) + 0.4])
def test_first_loss_that_no_untrained_model_has_raises(loss):
    with pytest.raises(NumericsError, match=rf"first loss is {loss:.3f} nats .* has 5\.700 to 5\.726\. The weights"):
        check_first_loss(CONFIG, _sums(loss))


@pytest.mark.parametrize(("moved_by", "is_refused"), [(0.05, False), (-0.05, False), (0.06, True), (-0.06, True)])
def test_first_loss_of_a_head_of_zeros_is_the_logarithm_but_for_rounding(moved_by, is_refused):
    config = replace(CONFIG, architecture=replace(TINY.architecture, tied_head=False, init="mdlm", init_std=None))
    with pytest.raises(NumericsError, match=r"has 5\.700 to 5\.700") if is_refused else nullcontext():
        check_first_loss(config, _sums(math.log(299) + moved_by))


def test_first_loss_of_few_tokens_may_be_further_off():
    check_first_loss(CONFIG, _sums(math.log(299) + 0.5, num_masked=10))
    with pytest.raises(NumericsError):
        check_first_loss(CONFIG, _sums(math.log(299) + 0.5, num_masked=1000))


def test_first_loss_without_a_masked_token_says_nothing():
    check_first_loss(CONFIG, _sums(0.0, 0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"time_conditioning": True, "cond_dim": 8}, "architecture.time_conditioning is true, but training"),
    ],
)
def test_pretraining_of_what_it_cannot_train_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, architecture=replace(TINY.architecture, **changed))
