"""Gradients of two ranks of two micro batches are those of one process: every parameter, however it is spread."""

from typing import Any

import pytest
import torch

from tests.support.gradients import CASES, IDLE_EXPERT, WORKERS, drawn_rows, plain_gradients, run_ranks

RELATIVE = 1e-5
"""Of the largest gradient of a parameter: what sums in another order may differ by in float32."""


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[tuple[str, int], torch.Tensor]]]:
    """Of every case that was asked for, on each rank."""
    asked = {_params(item).get("case") for item in request.session.items}
    return run_ranks([case for case in CASES if case in asked], tmp_path_factory.mktemp("gradients"))


def _params(item: Any) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_gradients_over_ranks_are_those_of_one_process(case: str, found: list[Any]) -> None:
    for name, wanted in plain_gradients(CASES[case]).items():
        whole = torch.full((wanted.numel(),), torch.nan)
        for rank in found:
            for (owner, start), piece in rank[case].items():
                if owner == name:
                    whole[start : start + len(piece)] = piece
        largest = float(wanted.abs().max())
        assert largest > 0, f"{name} has no gradient: a weak test"
        off = float((whole - wanted.flatten()).abs().max())
        assert off <= RELATIVE * largest, f"{name} is off by {off / largest:.1e} of its largest gradient"


def test_ranks_have_unequal_numbers_of_tokens() -> None:
    config = CASES["dense, ZeRO 1"]
    tokens = [int((drawn_rows(config, rank).doc_ids >= 0).sum()) for rank in range(WORKERS)]
    assert abs(tokens[0] - tokens[1]) > 15
    assert min(tokens) < 0.9 * config.rank_batch_seqs * 32


def test_an_idle_expert_has_no_gradient() -> None:
    gradients = plain_gradients(CASES["an idle expert, ZeRO 1"])
    by_expert = gradients["blocks.0.feed_forward.experts.down_proj"].abs().amax(dim=(1, 2))
    assert by_expert[IDLE_EXPERT] == 0
    assert bool((by_expert[[e for e in range(4) if e != IDLE_EXPERT]] > 0).all())
