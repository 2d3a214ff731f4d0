"""Routing and experts: against loops over lists, the grouped products against the plain loop, and invariances."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm_core.models.config import Architecture, MoE
from dlm_core.models.feed_forward import FeedForward
from dlm_core.models.moe import (
    Experts,
    Router,
    SparseFeedForward,
    experts_grouped,
    experts_loop,
    route,
    why_not_grouped,
)
from tests.support import moe as naive

EXACT = 1e-10  # float64, sums in another order
FLOAT32 = 1e-5  # relative to the largest entry: sums of at most a thousand products in another order
BFLOAT16 = 3e-2  # relative to the largest entry: a few roundings to 8 bits

ROUTERS = {
    "llada-moe": MoE(12, 3, 4, renormalise=False),
    "qwen3": MoE(12, 3, 4),
    "scaled": MoE(12, 1, 4, renormalise=False, routed_scale=2.5),
    "sigmoid": MoE(12, 4, 4, router_score="sigmoid", renormalise=False),
    "biased": MoE(12, 2, 4, selection_bias=True, routed_scale=0.5),
    "groups": MoE(12, 3, 4, num_groups=4, top_groups=2),
    "llada2": MoE(12, 4, 4, router_score="sigmoid", routed_scale=2.5, num_groups=3, top_groups=2, selection_bias=True),
    "one group": MoE(12, 2, 4, router_score="sigmoid", num_groups=6, top_groups=1, selection_bias=True),
    "all": MoE(5, 5, 4, renormalise=False),
}


def drawn(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def bias_of(moe: MoE) -> Tensor | None:
    """So far below 0 that an expert left out with a score of 0 would win."""
    return drawn(moe.num_experts, seed=9, scale=0.3) - 2.0 if moe.selection_bias else None


def architecture(moe: MoE | None, d_model: int = 8) -> Architecture:
    if moe is None:
        return Architecture(d_model=d_model, num_heads=2)
    return Architecture(d_model=d_model, num_heads=2, d_ff=None, moe=moe)


def sparse(moe: MoE, d_model: int = 8, dtype: torch.dtype = torch.float64) -> SparseFeedForward:
    layer = SparseFeedForward(architecture(moe, d_model)).to(dtype)
    with torch.no_grad():
        for index, tensor in enumerate(layer.state_dict().values()):
            tensor.copy_(drawn(*tensor.shape, seed=index + 20, scale=0.6))
    return layer


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    wanted = wanted.detach()
    scale = float(wanted.abs().max()) if wanted.any() else 1.0
    torch.testing.assert_close(found.detach().to(wanted.dtype), wanted, rtol=0, atol=tolerance * scale)


# --- routing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTERS)
def test_route_equals_the_definition(name):
    moe = ROUTERS[name]
    logits, bias = drawn(60, moe.num_experts, scale=1.5), bias_of(moe)
    weights, ids = route(logits, moe, bias)
    assert weights.dtype == torch.float64
    assert ids.dtype == torch.int64
    for row, found_ids, found in zip(logits.tolist(), ids.tolist(), weights.tolist(), strict=True):
        wanted = naive.routed(row, moe, None if bias is None else bias.tolist())
        assert dict(zip(found_ids, found, strict=True)) == pytest.approx(wanted, abs=EXACT)


@pytest.mark.parametrize("name", ["llada-moe", "qwen3", "llada2"])
def test_weights_of_a_route_have_the_gradient_of_their_definition(name):
    moe = ROUTERS[name]
    logits = drawn(6, moe.num_experts, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: route(z, moe, bias_of(moe))[0], logits)


def test_weights_sum_to_the_scale_if_renormalised_and_to_less_than_one_if_not():
    logits = drawn(50, 12)
    one = torch.ones(50, dtype=torch.float64)
    torch.testing.assert_close(route(logits, ROUTERS["qwen3"])[0].sum(1), one, rtol=0, atol=EXACT)
    llada2 = ROUTERS["llada2"]
    torch.testing.assert_close(route(logits, llada2, bias_of(llada2))[0].sum(1), 2.5 * one, rtol=0, atol=EXACT)
    sums = route(logits, ROUTERS["llada-moe"])[0].sum(1)
    assert (sums < 1).all()
    assert (sums > 3 / 12).all()


@pytest.mark.parametrize("name", ["qwen3", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_narrow_logits_are_float32(name, dtype):
    logits = drawn(20, 12).to(dtype)
    weights, ids = route(logits, ROUTERS[name])
    wanted, wanted_ids = route(logits.float(), ROUTERS[name])
    assert weights.dtype == torch.float32
    assert torch.equal(weights, wanted)
    assert torch.equal(ids, wanted_ids)


def test_route_of_vanishing_sigmoids_is_finite():
    moe = MoE(3, 2, 4, router_score="sigmoid")
    at_the_guard = -math.log(1e20)
    logits = torch.full((3, 3), -1e3, dtype=torch.float64)
    logits[:, 0] = torch.tensor([-2e3, at_the_guard, at_the_guard + 40], dtype=logits.dtype)
    weights = route(logits, moe)[0]
    assert weights.sum(dim=1).tolist() == pytest.approx([0.0, 0.5, 1.0], abs=1e-9)


def test_route_to_the_only_expert_has_its_score():
    weights, ids = route(drawn(5, 1), MoE(1, 1, 4, router_score="sigmoid", renormalise=False))
    assert ids.tolist() == [[0]] * 5
    assert_close(weights, drawn(5, 1).sigmoid(), EXACT)


def test_router_computes_in_float32_whatever_surrounds_it():
    moe = MoE(6, 2, 4)
    router = Router(8, moe)
    x = drawn(5, 8, dtype=torch.float32)
    plain = x @ router.weight.T
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(router(x), plain, 1e-6)
    narrow = Router(8, moe).to(torch.bfloat16)
    with torch.no_grad():
        found = narrow(x.to(torch.bfloat16))
        assert found.dtype == torch.float32
        assert_close(found, x.to(torch.bfloat16).float() @ narrow.weight.float().T, 1e-6)
    wide = router.double()
    assert_close(wide(x.double()), x.double() @ wide.weight.T, EXACT)
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(x.double()).dtype == torch.float64


def test_router_has_a_bias_for_the_choice_only_if_asked():
    assert list(Router(8, MoE(6, 2, 4)).state_dict()) == ["weight"]
    assert Router(8, MoE(6, 2, 4)).e_score_correction_bias is None
    router = Router(8, MoE(6, 2, 4, selection_bias=True))
    assert list(router.state_dict()) == ["weight", "e_score_correction_bias"]
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert router.e_score_correction_bias.dtype == torch.float32
    assert router.e_score_correction_bias.tolist() == [0.0] * 6


def test_bias_of_a_router_is_not_rounded_when_the_model_is_cast():
    layer = SparseFeedForward(Architecture(d_model=8, num_heads=2, d_ff=None, moe=MoE(6, 2, 4, selection_bias=True)))
    bias = torch.tensor([1.0, 1.001, 1.002, -0.3, 0.0, 1e-3])
    layer.gate.e_score_correction_bias.copy_(bias)
    for cast in (layer.bfloat16, layer.double, layer.half, layer.float):
        assert cast().gate.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(layer.gate.e_score_correction_bias, bias)
    assert layer.bfloat16().to("meta").gate.e_score_correction_bias.is_meta
    assert layer.half().gate.e_score_correction_bias.dtype == torch.float32
    assert layer.to_empty(device="cpu").gate.e_score_correction_bias.dtype == torch.float32


# --- experts --------------------------------------------------------------------------------------------------------

# (tokens, experts, top_k, d_model, d_ff_expert): an expert without a token, one token, all to one, none at all
CASES = [(37, 5, 2, 8, 12), (37, 6, 3, 12, 4), (1, 4, 2, 4, 8), (9, 3, 1, 8, 4), (0, 3, 2, 4, 4), (300, 4, 4, 16, 16)]
WHERE = {(9, 3, 1, 8, 4): [2], (37, 5, 2, 8, 12): [0, 1, 2, 4]}


def experts_case(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts, top_k, d_model, d_ff = case
    allowed = torch.tensor(WHERE.get(case, list(range(num_experts))))
    ids = allowed[drawn(num_tokens, len(allowed), seed=1).topk(top_k, dim=1).indices]
    weights = drawn(num_tokens, top_k, seed=2).sigmoid().to(torch.promote_types(dtype, torch.float32))
    x = drawn(num_tokens, d_model, seed=3, dtype=dtype)
    gate_up = drawn(num_experts, 2 * d_ff, d_model, seed=4, scale=d_model**-0.5, dtype=dtype)
    down = drawn(num_experts, d_model, d_ff, seed=5, scale=d_ff**-0.5, dtype=dtype)
    return x, ids, weights, gate_up, down


def with_gradients(function, x, ids, weights, gate_up, down) -> list[Tensor]:
    """Output and the gradients of x, weights, gate_up and down for a drawn gradient of the output."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weights, gate_up, down)]
    y = function(leaves[0], ids, *leaves[1:])
    grads = torch.autograd.grad(y, leaves, drawn(*y.shape, seed=6, dtype=y.dtype))
    for leaf, grad in zip(leaves, grads, strict=True):
        assert grad.dtype == leaf.dtype
    return [y.detach(), *grads]


@pytest.mark.parametrize("case", CASES[:-1])
def test_loop_over_experts_equals_the_definition(case):
    x, ids, weights, gate_up, down = experts_case(case, torch.float64)
    y = experts_loop(x, ids, weights, gate_up, down)
    matrices = gate_up.tolist(), down.tolist()
    for token, found in enumerate(y.tolist()):
        chosen = dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
        assert found == pytest.approx(naive.mixture(x[token].tolist(), chosen, *matrices), abs=EXACT)


def test_gradients_of_the_loop_are_those_of_its_output():
    x, ids, weights, gate_up, down = (tensor.clone() for tensor in experts_case((5, 3, 2, 4, 3), torch.float64))
    leaves = [tensor.requires_grad_() for tensor in (x, weights, gate_up, down)]
    assert torch.autograd.gradcheck(lambda x, w, a, b: experts_loop(x, ids, w, a, b), leaves)


@pytest.mark.parametrize("case", CASES)
def test_grouped_experts_equal_the_loop_with_all_gradients(case):
    given = experts_case(case, torch.float32)
    found, wanted = with_gradients(experts_grouped, *given), with_gradients(experts_loop, *given)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, FLOAT32)
    used = given[1].unique().tolist()
    for expert in set(range(case[1])) - set(used):
        assert not found[3][expert].any()
        assert not found[4][expert].any()


@pytest.mark.parametrize("function", [experts_grouped, experts_loop])
def test_experts_in_bfloat16_are_near_those_in_float64(function):
    case = (300, 4, 2, 16, 16)
    exact = experts_case(case, torch.bfloat16)
    wanted = with_gradients(experts_loop, *(t.double() if t.is_floating_point() else t for t in exact))
    found = with_gradients(function, *exact)
    assert found[0].dtype == torch.bfloat16
    assert found[2].dtype == torch.float32
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, BFLOAT16)


def test_grouped_experts_refuse_a_second_derivative():
    x, ids, weights, gate_up, down = experts_case((5, 3, 2, 4, 4), torch.float32)
    y = experts_grouped(x.requires_grad_(), ids, weights, gate_up, down)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "d_model", "d_ff", "message"),
    [
        (torch.float64, 8, 8, r"torch has no grouped product in torch.float64; use \"loop\""),
        (torch.float32, 6, 8, "d_model 6 is no multiple of 4, as"),
        (torch.float32, 8, 10, "d_ff_expert 10 is no multiple of 4, as"),
        (torch.bfloat16, 16, 12, "d_ff_expert 12 is no multiple of 8, as"),
        (torch.float16, 4, 8, "d_model 4 is no multiple of 8, as"),
    ],
)
def test_grouped_experts_refuse_what_torch_cannot_do(dtype, d_model, d_ff, message):
    given = experts_case((7, 3, 2, d_model, d_ff), dtype)
    with pytest.raises(ValueError, match=message):
        experts_grouped(*given)
    experts_loop(*given)


def test_grouped_experts_refuse_a_device_without_the_product(unchecked):
    elsewhere = SimpleNamespace(dtype=torch.float32, shape=(3, 8), device=SimpleNamespace(type="xla"))
    assert why_not_grouped(elsewhere, 8) == 'torch has no grouped product on "xla"'
    assert why_not_grouped(torch.empty(3, 8), 8) is None
    assert why_not_grouped(torch.empty(3, 8, device="meta"), 8) is None


def is_grouped(y: Tensor) -> bool:
    return "GroupedExperts" in type(y.grad_fn).__name__


@pytest.mark.parametrize(
    ("implementation", "d_model", "dtype", "wanted"),
    [
        ("auto", 8, torch.float32, True),
        ("auto", 8, torch.bfloat16, True),
        ("grouped", 8, torch.float32, True),
        ("loop", 8, torch.float32, False),
        ("auto", 6, torch.float32, False),
        ("auto", 8, torch.float64, False),
    ],
)
def test_experts_are_grouped_where_that_is_possible(implementation, d_model, dtype, wanted):
    experts = Experts(d_model, MoE(4, 2, 8), implementation).to(dtype)
    ids = torch.tensor([[0, 1], [3, 2], [1, 3]])
    x, weights = drawn(3, d_model, dtype=dtype), drawn(3, 2, seed=1).to(torch.promote_types(dtype, torch.float32))
    y = experts(x, ids, weights)
    assert is_grouped(y) == wanted
    assert y.dtype == dtype
    assert_close(y, experts_loop(x, ids, weights, experts.gate_up_proj, experts.down_proj), BFLOAT16)
    parent = SparseFeedForward(architecture(MoE(4, 2, 8), 8), implementation).experts
    assert parent.implementation == implementation


def test_grouped_experts_that_are_asked_for_are_not_replaced_by_the_loop():
    experts = Experts(6, MoE(4, 2, 8), "grouped")
    with pytest.raises(ValueError, match='experts can\'t be "grouped": d_model 6'):
        experts(drawn(3, 6, dtype=torch.float32), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))


@pytest.mark.parametrize("implementation", ["grouped", "loop"])
def test_experts_under_autocast_multiply_in_its_dtype_and_return_that_of_x(implementation):
    experts = Experts(8, MoE(4, 2, 8), implementation)
    ids = drawn(30, 4).topk(2, dim=1).indices
    x, weights = drawn(30, 8, dtype=torch.float32).requires_grad_(), drawn(30, 2, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, ids, weights)
    assert y.dtype == torch.float32
    narrow = (x.bfloat16(), ids, weights, experts.gate_up_proj.bfloat16(), experts.down_proj.bfloat16())
    function = experts_grouped if implementation == "grouped" else experts_loop
    assert torch.equal(y, function(*narrow).float())
    y.sum().backward()
    assert x.grad.dtype == experts.gate_up_proj.grad.dtype == torch.float32
    assert experts.gate_up_proj.grad.abs().sum() > 0


def test_experts_of_float64_stay_so_under_autocast():
    experts = Experts(8, MoE(4, 2, 8)).double()
    ids, x, weights = drawn(30, 4).topk(2, dim=1).indices, drawn(30, 8), drawn(30, 2, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, ids, weights)
    assert torch.equal(y, experts(x, ids, weights))


def test_experts_are_drawn_uniformly_as_linear_layers_are():
    torch.manual_seed(0)
    experts = Experts(16, MoE(8, 2, 64))
    for parameter, fan_in in ((experts.gate_up_proj, 16), (experts.down_proj, 64)):
        largest = float(parameter.detach().abs().max()) * math.sqrt(fan_in)
        assert 0.99 < largest <= 1.0
        linear = nn.Linear(fan_in, 4096, bias=False)
        assert float(parameter.detach().std()) == pytest.approx(float(linear.weight.detach().std()), rel=0.05)


@pytest.mark.parametrize("implementation", ["group", "", "Loop"])
def test_unknown_implementation_is_refused(implementation, unchecked):
    with pytest.raises(ValueError, match=f'implementation is "{implementation}"; it must be "auto", "grouped" or'):
        Experts(8, MoE(4, 2, 8), implementation)


# --- the layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("name", ["llada-moe", "llada2"])
def test_layer_equals_the_definition(name, shared):
    base = ROUTERS[name]
    moe = MoE(**{**base.__dict__, "num_shared_experts": shared})
    layer = sparse(moe)
    x = drawn(2, 5, 8, seed=7)
    y = layer(x)
    assert y.shape == x.shape
    bias = layer.gate.e_score_correction_bias
    matrices = layer.experts.gate_up_proj.tolist(), layer.experts.down_proj.tolist()
    for row, found_row in zip(x.tolist(), y.tolist(), strict=True):
        for token, found in zip(row, found_row, strict=True):
            logits = naive.times(layer.gate.weight.tolist(), token)
            weights = naive.routed(logits, moe, None if bias is None else bias.tolist())
            wanted = naive.mixture(token, weights, *matrices)
            if shared:
                dense = layer.shared_experts
                more = naive.swiglu(token, dense.gate_up.weight.tolist(), dense.down.weight.tolist())
                wanted = [a + b for a, b in zip(wanted, more, strict=True)]
            assert found == pytest.approx(wanted, abs=EXACT)


@pytest.mark.parametrize("name", ["qwen3", "llada-moe", "sigmoid"])
def test_layer_of_identical_experts_is_a_dense_network_times_the_sum_of_weights(name):
    layer = sparse(ROUTERS[name])
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[0].clone().expand_as(parameter))
    x = drawn(2, 5, 8, seed=7)
    gate, up = F.linear(x, layer.experts.gate_up_proj[0]).chunk(2, dim=-1)
    dense = F.linear(F.silu(gate) * up, layer.experts.down_proj[0])
    total = route(layer.gate(x.view(10, 8)), layer.moe)[0].sum(dim=1).view(2, 5, 1)
    if layer.moe.renormalise:
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=EXACT)
    torch.testing.assert_close(layer(x), total * dense, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["llada-moe", "biased", "llada2"])
def test_layer_does_not_depend_on_the_order_of_its_experts(name):
    moe = ROUTERS[name]
    layer, other = sparse(moe), sparse(moe)
    size = moe.num_experts // moe.num_groups
    groups = torch.randperm(moe.num_groups, generator=torch.Generator().manual_seed(3)).tolist()
    order = [g * size + e for g in groups for e in reversed(range(size))]
    assert order != sorted(order)
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            tensor.copy_(layer.state_dict()[name][order])
    x = drawn(2, 5, 8, seed=7)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=EXACT)


def test_layer_gives_every_parameter_the_gradient_that_the_loop_gives():
    layer = sparse(MoE(**{**ROUTERS["llada2"].__dict__, "num_shared_experts": 1}), dtype=torch.float32)
    x = drawn(4, 40, 8, seed=7, dtype=torch.float32).requires_grad_()
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(layer(x).square().sum(), leaves)
    layer.experts.implementation = "loop"
    wanted = torch.autograd.grad(layer(x).square().sum(), leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, FLOAT32)


def test_layer_in_bfloat16_returns_bfloat16():
    moe = MoE(8, 2, 8, num_shared_experts=1)
    layer = sparse(moe, dtype=torch.bfloat16)
    x = drawn(2, 9, 8, seed=7, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.double(), layer.double()(x.double()), BFLOAT16)


def test_layer_has_the_names_and_sizes_that_expert_parallelism_and_converters_know():
    layer = SparseFeedForward(architecture(MoE(6, 2, 4, num_shared_experts=3, selection_bias=True)))
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "gate.weight": (6, 8),
        "gate.e_score_correction_bias": (6,),
        "experts.gate_up_proj": (6, 8, 8),
        "experts.down_proj": (6, 8, 4),
        "shared_experts.gate_up.weight": (24, 8),
        "shared_experts.down.weight": (8, 12),
    }
    assert isinstance(layer.gate, nn.Linear)
    without = SparseFeedForward(architecture(MoE(6, 2, 4)))
    assert list(without.state_dict()) == ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]


def test_shared_experts_map_tokens_of_any_shape():
    dense = FeedForward(4, 6).double()
    x = drawn(2, 3, 4)
    torch.testing.assert_close(dense(x).view(6, 4), dense(x.view(6, 4)), rtol=0, atol=EXACT)


def test_layer_of_an_architecture_without_experts_is_refused():
    with pytest.raises(ValueError, match="moe is None; experts need its sizes"):
        SparseFeedForward(architecture(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_tells_compilers_its_shapes(dtype):
    product = torch.ops.dlm.grouped_product.default
    x, w, ends = drawn(10, 8, dtype=dtype), drawn(3, 16, 8, dtype=dtype), torch.tensor([4, 4, 10], dtype=torch.int32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(product, (x, w.transpose(1, 2), ends), test_utils=tests)
    torch.library.opcheck(product, (x.t(), drawn(10, 16, seed=1, dtype=dtype), ends), test_utils=tests)


def test_compiled_layer_equals_the_plain_one(unchecked):
    layer = sparse(MoE(**{**ROUTERS["llada2"].__dict__, "num_shared_experts": 1}), dtype=torch.float32)
    x = drawn(2, 9, 8, seed=7, dtype=torch.float32)
    wanted = layer(x)
    wanted.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    found.square().sum().backward()
    assert_close(found.detach(), wanted.detach(), FLOAT32)
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        assert_close(parameter.grad, gradient, FLOAT32)
