"""What tests of samplers share: a world small enough to enumerate, laws of samples, a tiny model."""

from collections import Counter
from functools import cache

import torch

from dlm_core.models.presets import PRESETS, tiny
from dlm_core.models.transformer import Denoiser
from dlm_core.samplers.loop import Rule, Sampled, sample, without_pass
from dlm_core.samplers.proposal import Proposal
from tests.support import reference
from tests.support.toy_world import ExactDenoiser

LENGTH = 3
MASK = 3
"""Of the toy world."""


@cache
def world() -> tuple[reference.Joint, ExactDenoiser]:
    """A joint distribution over 27 sequences, and its exact conditionals."""
    joint = reference.Joint(num_real=3, length=LENGTH, seed=0, sharpness=1.5)
    return joint, ExactDenoiser(joint)


def draw_rows(
    rule: Rule, num_rows: int = 200, *, proposal: Proposal | None = None, noise_seed: int = 0, **options
) -> Sampled:
    """Rows of the toy world from nothing but masks, or those of ``xt``."""
    xt = options.pop("xt", torch.full((num_rows, LENGTH), MASK))
    predict = without_pass(options.pop("denoise", world()[1]))
    return sample(predict, xt, rule, proposal or Proposal(), mask_token_id=MASK, noise_seed=noise_seed, **options)


def follows(x0: torch.Tensor, law: dict[reference.Tokens, float]) -> bool:
    """Whether the rows may have that law; a false alarm in three million."""
    counts = Counter(tuple(row) for row in x0.tolist())
    if not set(counts) <= {x for x, p in law.items() if p > 0}:
        return False
    statistic = reference.chi_square([counts[x] for x in law], [len(x0) * p for p in law.values()])
    return statistic < reference.chi_square_bound(len(law) - 1)


@cache
def tiny_model() -> Denoiser:
    """A drawn transformer in float64 whose predictions are sure enough for their order to be no matter of rounding."""
    model = Denoiser(tiny(PRESETS["llada-8b"]))
    model.init_weights(0)
    for parameter in model.parameters():
        parameter.data.mul_(1.7)
    return model.double().eval()
