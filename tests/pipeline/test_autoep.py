"""Experts spread over two workers by AutoEP train as in one process: the same outputs, gradients and router losses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlm_core.models.config import Architecture, MoE
from dlm_core.models.router_losses import RouterTap
from pipeline.errors import UserError
from pipeline.pretrain.expert_parallel import expert_parallel_section, route_in_float32, with_experts_apart
from tests.support.autoep import CASES, ROUTERS, WORKERS, architecture, gradients_of_cases, plain_gradients
from tests.support.ranks import run_ranks

FLOAT32 = 1e-5
"""Bar for other orders of float32 sums, relative to the largest entry; 1e-6 is found."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Any]]]:
    return run_ranks(gradients_of_cases, tmp_path_factory.mktemp("autoep"), WORKERS)


def gathered(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Our names and layout again: experts put together, gate above up; what all ranks hold must be the same."""
    whole = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if not name.endswith((".w1", ".w2", ".w3")):
            assert all(torch.equal(values[0], value) for value in values), name
            whole[name.replace("router.gate", "gate")] = values[0]
        elif name.endswith(".w2"):
            whole[name[:-2] + "down_proj"] = torch.cat(values)
        elif name.endswith(".w1"):
            up = torch.cat([part[name[:-1] + "3"] for part in parts])
            whole[name[:-2] + "gate_up_proj"] = torch.cat([torch.cat(values), up], dim=1)
    return whole


@pytest.mark.distributed
@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_workers_that_share_experts_have_the_gradients_of_one_process(ranks, case):
    wanted = plain_gradients(*case)
    found = gathered([rank[case]["moved"] for rank in ranks])
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = max(1e-3, float(gradient.abs().max()))
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=FLOAT32 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    for rank in ranks:
        assert rank[case]["difference"] < FLOAT32 * 10


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_z_loss_alone_moves_the_gates_and_no_expert_above_them(ranks):
    for rank in ranks:
        moved = rank["llada-moe", "z"]["moved"]
        for layer in (0, 2):
            assert moved[f"blocks.{layer}.feed_forward.router.gate.weight"].any()
        assert moved["blocks.0.feed_forward.experts.w2"].any()
        assert not moved["blocks.2.feed_forward.experts.w2"].any()


@pytest.mark.distributed
@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_tap_finds_the_routers_of_replaced_layers(ranks, case):
    for rank in ranks:
        assert rank[case]["routers"] == [f"blocks.{layer}.feed_forward.router.gate" for layer in (0, 2)]


def test_section_says_what_is_special_about_an_architecture():
    plain = expert_parallel_section(architecture(ROUTERS["llada-moe"]), WORKERS, on_gpu=True)
    assert plain["use_grouped_mm"] is True
    assert not any("group" in name for name in plain if name != "use_grouped_mm")
    assert not any("shared" in name for name in plain)
    section = expert_parallel_section(architecture(ROUTERS["llada2"]), WORKERS, on_gpu=False)
    assert section["use_grouped_mm"] is False
    wanted = {
        "autoep_size": 2,
        "top_k": 3,
        "score_func": "sigmoid",
        "route_norm": True,
        "routed_scaling_factor": 2.5,
        "num_expert_groups": 4,
        "num_limited_groups": 2,
        "has_shared_experts": True,
    }
    assert {name: section[name] for name in wanted} == wanted


def test_every_key_of_the_section_is_one_that_deepspeed_reads():
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig

    section = expert_parallel_section(architecture(ROUTERS["llada2"]), WORKERS, on_gpu=False)
    assert set(section) <= set(vars(AutoEPConfig()))


@pytest.mark.parametrize("ep_size", [0, -1, 3, 16])
def test_workers_that_cannot_share_the_experts_evenly_are_refused(ep_size):
    message = f"ep_size is {ep_size}, which does not divide moe.num_experts 8; take one of 1, 2, 4, 8"
    with pytest.raises(UserError, match=message):
        expert_parallel_section(architecture(MoE(8, 2, 8)), ep_size, on_gpu=False)


def test_expert_parallelism_without_experts_is_refused():
    with pytest.raises(UserError, match=r"ep_size is 2, but the architecture has no experts; set it to 1"):
        expert_parallel_section(Architecture(d_model=16, num_heads=2), 2, on_gpu=False)


def test_gates_of_replaced_layers_compute_in_float32_and_are_still_tapped():
    layer = nn.ModuleDict({"router": nn.ModuleDict({"gate": nn.Linear(16, 8, bias=False)})}).bfloat16()
    model = nn.ModuleDict({"feed_forward": layer})
    gate, x = layer["router"]["gate"], torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = x.float() @ gate.weight.float().T
    assert not torch.equal(gate(x).float(), wanted)
    route_in_float32(model)
    with torch.no_grad(), RouterTap(model) as tap:
        gate(x)
    assert torch.equal(tap.logits["feed_forward.router.gate"], wanted)


def test_gates_of_a_model_that_was_not_replaced_are_refused():
    with pytest.raises(UserError, match="no layer of the model was replaced by AutoEP"):
        route_in_float32(nn.ModuleDict({"gate": nn.Linear(2, 2)}))


def test_spread_experts_get_groups_of_their_own():
    dense, other, *experts = (nn.Parameter(torch.zeros(1)) for _ in range(4))
    dense.allreduce = True
    for expert in experts:
        expert.allreduce, expert.group_name = False, "ep_size_2"
    groups = [
        {"params": [dense, experts[0], other], "weight_decay": 0.1},
        {"params": [experts[1]], "weight_decay": 0.0},
    ]
    found = with_experts_apart(groups)
    assert [[id(p) for p in group["params"]] for group in found] == [
        [id(dense), id(other)], [id(experts[0])], [id(experts[1])],
    ]  # fmt: skip
    marked = {"moe": True, "name": "ep_size_2"}
    assert [{name: value for name, value in group.items() if name != "params"} for group in found] == [
        {"weight_decay": 0.1}, {"weight_decay": 0.1, **marked}, {"weight_decay": 0.0, **marked},
    ]  # fmt: skip
