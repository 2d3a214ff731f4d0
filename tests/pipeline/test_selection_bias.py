"""Selection biases of routers move towards an even load, alike however the work is spread."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dlm_core.models.config import ModelConfig, MoE
from dlm_core.models.moe import route
from dlm_core.models.router_losses import tokens_per_expert
from dlm_core.models.transformer import Denoiser
from pipeline.pretrain.config import STAGE
from pipeline.pretrain.objective import RouterLossConfig
from pipeline.pretrain.routers import Routers
from pipeline.training_state import MASTER, StateFiles, list_checkpoints, read_manifest
from tests.support.tiny_run import TINY, Artifacts, pretrain, run_gang, tiny

EXPERTS = replace(TINY.architecture, moe=MoE(4, 2, 16, router_score="sigmoid", selection_bias=True, first_k_dense=1))
RATE = 0.03125


def biases(trained: Path) -> list[torch.Tensor]:
    """Of the layers with experts, as the last checkpoint holds them."""
    (checkpoint,) = list_checkpoints(trained / "checkpoints")
    files = StateFiles(checkpoint, read_manifest(checkpoint))
    return [
        torch.from_numpy(files.whole(MASTER, name))
        for name in sorted(files.shapes)
        if name.endswith("e_score_correction_bias")
    ]


def routers_of(num_layers: int, rate: float) -> tuple[Denoiser, Routers]:
    """Tapped routers that have seen four tokens."""
    model = Denoiser(ModelConfig(replace(EXPERTS, num_layers=num_layers), 12, 11))
    config: Any = SimpleNamespace(
        architecture=model.config.architecture, router_loss=RouterLossConfig(bias_rate=rate), grad_accum_steps=1
    )
    routers = Routers(model, config)
    with routers.tap:
        model(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4))
    return model, routers


def test_a_bias_moves_by_its_rate_against_the_load_of_its_expert() -> None:
    model, routers = routers_of(3, 0.5)
    load = [[9.0, 1.0, 3.0, 3.0], [4.0, 4.0, 4.0, 4.0]]
    sums = torch.cat([torch.full((2, 2), 7.0), torch.tensor(load)], dim=1).double()
    routers.move_biases(sums)
    routers.move_biases(sums)
    found = [buffer.tolist() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert found == [[-1.0, 1.0, 1.0, 1.0], [0.0] * 4]


def test_biases_even_out_the_load_of_tokens_that_prefer_the_same_experts() -> None:
    _, routers = routers_of(2, 0.002)
    (name,) = routers.tap.logits
    logits = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 1.0, 0.0, -1.0])
    moe, valid, spread = routers._moe, torch.ones(4096, dtype=torch.bool), []
    for _ in range(400):
        load = tokens_per_expert(route(logits, moe, routers.tap.selection_bias(name))[1], valid, 4)
        spread.append(float(load.max() / load.double().mean()))
        routers.move_biases(torch.cat([torch.zeros(2), load]).double()[None])
    assert spread[0] > 1.6
    assert spread[-1] < 1.05


@pytest.mark.distributed
@pytest.mark.parametrize("changes", [{"ep_size": 2, "zero_stage": 2}, {"zero_stage": 3}], ids=str)
def test_biases_are_those_of_one_rank_however_experts_are_spread(
    changes: dict[str, Any], made: Artifacts, tmp_path: Path
) -> None:
    one = tiny(architecture=EXPERTS, router_loss=RouterLossConfig(bias_rate=RATE), num_steps=8)
    two = replace(one, workers=2, micro_batch_seqs=2, **changes)
    wanted, found = (biases(pretrain(config, made, tmp_path / name)) for config, name in ((one, "one"), (two, "two")))
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], wanted[0])


def test_a_refused_update_moves_no_bias(made: Artifacts, tmp_path: Path) -> None:
    config = tiny(architecture=EXPERTS, router_loss=RouterLossConfig(bias_rate=RATE), num_steps=4, max_skipped_steps=10)
    (applied,) = biases(pretrain(config, made, tmp_path / "applied"))
    fault = {"fault": "make_gradients_nan", "first": 1, "last": 3}
    (refused,) = biases(run_gang(STAGE, config, made.inputs(), tmp_path / "refused", **fault))
    assert float(applied.abs().max()) > 1.5 * RATE, "a weak test"
    assert float(refused.abs().max()) == pytest.approx(RATE)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_a_rate_that_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="bias_rate is"):
        RouterLossConfig(bias_rate=rate)


def test_a_rate_without_a_bias_is_refused() -> None:
    moe = replace(EXPERTS.moe or MoE(4, 1, 16), selection_bias=False)
    with pytest.raises(ValueError, match=r"bias_rate is 0\.03125, but the routers have no bias to move"):
        tiny(architecture=replace(EXPERTS, moe=moe), router_loss=RouterLossConfig(bias_rate=RATE))
