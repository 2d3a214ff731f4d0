"""Losses of the router against loops over lists, counts against counting, and what the tap takes and refuses."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dlm_core.models.attention import AttentionMask
from dlm_core.models.config import Architecture, MoE
from dlm_core.models.moe import SparseFeedForward, route
from dlm_core.models.presets import PRESETS, tiny
from dlm_core.models.router_losses import (
    RouterTap,
    balance_loss,
    tokens_per_expert,
    tokens_per_expert_and_bin,
    z_loss,
)
from dlm_core.models.transformer import Denoiser
from tests.support import moe as naive

EXACT = 1e-10  # float64, sums in another order
ROUTERS = {
    "softmax": MoE(6, 2, 4, renormalise=False),
    "sigmoid": MoE(6, 2, 4, router_score="sigmoid"),
    "biased groups": MoE(6, 2, 4, num_groups=3, top_groups=2, selection_bias=True, routed_scale=3.0),
}


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_valid(num_rows: int, seq_len: int) -> Tensor:
    """Rows 2 and 3 hold no valid token; of the others about a third are padding."""
    valid = drawn(num_rows, seq_len, seed=5) > -0.5
    valid[2:4] = False
    return valid


def bias_of(moe: MoE) -> Tensor | None:
    return drawn(moe.num_experts, seed=9, scale=0.3) if moe.selection_bias else None


# --- balance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_seqs", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ROUTERS)
def test_balance_loss_equals_the_definition(name, group_seqs):
    moe = ROUTERS[name]
    logits, valid, bias = drawn(8, 5, 6), drawn_valid(8, 5), bias_of(moe)
    found = balance_loss(logits, valid, moe, group_seqs=group_seqs, selection_bias=bias)
    given = None if bias is None else bias.tolist()
    wanted = 0.0
    for start in range(0, 8, group_seqs):
        rows = slice(start, start + group_seqs)
        wanted += naive.balance(logits[rows].tolist(), valid[rows].tolist(), moe, given)
    assert float(found.loss_sum) == pytest.approx(wanted, abs=EXACT)
    assert int(found.denominator) == 8 // group_seqs
    assert found.denominator.dtype == torch.int64


@pytest.mark.parametrize("name", ROUTERS)
def test_balance_loss_has_the_gradient_of_its_probabilities(name):
    moe, valid = ROUTERS[name], drawn_valid(4, 3)

    def loss(logits: Tensor) -> Tensor:
        return balance_loss(logits, valid, moe, group_seqs=2, selection_bias=bias_of(moe)).loss_sum

    logits = drawn(4, 3, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, logits)
    (grad,) = torch.autograd.grad(loss(logits), logits)
    assert not grad[~valid].any()
    assert grad[valid].any(dim=1).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_balance_loss_of_an_even_router_is_one(score):
    moe = MoE(8, 3, 4, router_score=score)
    rows = torch.zeros(2, 8, 8, dtype=torch.float64)
    for token in range(8):
        for slot in range(3):
            rows[:, token, (token + slot) % 8] = 0.7 + 0.1 * slot
    found = balance_loss(rows, torch.ones(2, 8, dtype=torch.bool), moe, group_seqs=1)
    assert float(found.loss_sum) == pytest.approx(2.0, abs=EXACT)


def test_balance_loss_of_a_collapsed_router_is_experts_over_top_k():
    moe = MoE(8, 2, 4)
    rows = torch.zeros(3, 5, 8, dtype=torch.float64)
    rows[..., [1, 6]] = 40.0
    found = balance_loss(rows, torch.ones(3, 5, dtype=torch.bool), moe, group_seqs=3)
    assert float(found.loss_sum) == pytest.approx(8 / 2, abs=EXACT)


@pytest.mark.parametrize("group_seqs", [1, 2])
@pytest.mark.parametrize("micro", [2, 4, 8])
def test_router_losses_do_not_depend_on_how_a_batch_is_split(group_seqs, micro):
    moe, valid = ROUTERS["biased groups"], drawn_valid(8, 5)
    results = []
    for size in (8, micro):
        logits = drawn(8, 5, 6).requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        denominators = [0, 0]
        for start in range(0, 8, size):
            part, keep = logits[start : start + size], valid[start : start + size]
            balance = balance_loss(part, keep, moe, group_seqs=group_seqs, selection_bias=bias_of(moe))
            z = z_loss(part, keep)
            total = total + balance.loss_sum + 0.1 * z.loss_sum
            denominators = [denominators[0] + int(balance.denominator), denominators[1] + int(z.denominator)]
        total.backward()
        results.append((total.detach(), logits.grad, denominators))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=EXACT)


def test_single_rows_give_the_same_balance_loss():
    moe, valid, logits = ROUTERS["softmax"], drawn_valid(8, 5), drawn(8, 5, 6)
    whole = balance_loss(logits, valid, moe, group_seqs=1)
    rows = [balance_loss(logits[[i]], valid[[i]], moe, group_seqs=1) for i in range(8)]
    assert float(sum(row.loss_sum for row in rows)) == pytest.approx(float(whole.loss_sum), abs=EXACT)
    assert sum(int(row.denominator) for row in rows) == int(whole.denominator)


def test_balance_loss_of_a_group_with_one_valid_token_is_that_of_the_token():
    moe = MoE(num_experts=4, top_k=2, d_ff_expert=1)
    logits, valid = drawn(2, 3, 4), torch.tensor([[False, True, False], [False, False, False]])
    probs = logits[0, 1].softmax(dim=-1)
    wanted = 4 * probs.topk(2).values.sum() / 2
    found = balance_loss(logits, valid, moe, group_seqs=1).loss_sum
    assert float(found) == pytest.approx(float(wanted), abs=EXACT)


@pytest.mark.parametrize(("num_rows", "group_seqs"), [(8, 3), (8, 16), (8, 0), (8, -1), (9, 2)])
def test_balance_loss_of_broken_groups_is_refused(num_rows, group_seqs):
    message = f"group_seqs is {group_seqs}, which does not divide the {num_rows} rows"
    with pytest.raises(ValueError, match=message):
        balance_loss(
            drawn(num_rows, 2, 6),
            torch.ones(num_rows, 2, dtype=torch.bool),
            ROUTERS["softmax"],
            group_seqs=group_seqs,
        )


def test_balance_loss_of_bfloat16_logits_is_computed_in_float32():
    moe, valid = ROUTERS["softmax"], torch.ones(4, 5, dtype=torch.bool)
    narrow = drawn(4, 5, 6).bfloat16()
    found = balance_loss(narrow, valid, moe, group_seqs=2).loss_sum
    assert found.dtype == torch.float32
    assert torch.equal(found, balance_loss(narrow.float(), valid, moe, group_seqs=2).loss_sum)


# --- z --------------------------------------------------------------------------------------------------------------


def test_z_loss_equals_the_definition():
    logits, valid = drawn(4, 5, 6), drawn_valid(4, 5)
    found = z_loss(logits, valid)
    assert float(found.loss_sum) == pytest.approx(naive.z(logits[valid].tolist()), abs=EXACT)
    assert int(found.denominator) == int(valid.sum())
    flat = z_loss(logits.view(20, 6), valid.view(20))
    assert float(flat.loss_sum) == pytest.approx(float(found.loss_sum), abs=EXACT)


def test_z_loss_of_zero_logits_is_the_squared_log_of_the_number_of_experts():
    found = z_loss(torch.zeros(3, 7, 64, dtype=torch.float64), torch.ones(3, 7, dtype=torch.bool))
    assert float(found.loss_sum / found.denominator) == pytest.approx(math.log(64) ** 2, abs=EXACT)
    assert float(found.loss_sum / found.denominator) == pytest.approx(17.296, abs=1e-3)


def test_z_loss_has_the_gradient_of_its_definition_and_none_at_padding():
    valid = drawn_valid(4, 3)
    logits = drawn(4, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: z_loss(z, valid).loss_sum, logits)
    z_loss(logits, valid).loss_sum.backward()
    assert not logits.grad[~valid].any()


def test_z_loss_of_bfloat16_logits_is_computed_in_float32():
    narrow, valid = drawn(4, 5, 6).bfloat16(), torch.ones(4, 5, dtype=torch.bool)
    assert torch.equal(z_loss(narrow, valid).loss_sum, z_loss(narrow.float(), valid).loss_sum)


# --- counts ---------------------------------------------------------------------------------------------------------


def test_tokens_of_each_expert_are_counted_where_valid():
    ids = route(drawn(20, 6), ROUTERS["softmax"])[1].view(4, 5, 2)
    valid = drawn_valid(4, 5)
    wanted = Counter(ids[valid].flatten().tolist())
    found = tokens_per_expert(ids, valid, 6)
    assert found.tolist() == [wanted[expert] for expert in range(6)]
    assert int(found.sum()) == 2 * int(valid.sum())
    assert torch.equal(tokens_per_expert(ids.view(20, 2), valid.view(20), 6), found)


def test_tokens_of_each_expert_are_counted_in_bins_of_t():
    ids = route(drawn(20, 6), ROUTERS["softmax"])[1].view(4, 5, 2)
    valid = drawn(4, 5, seed=5) > -0.5
    t = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 0.99, 1.0, 0.1, 0.3] * 2).view(4, 5)
    t[valid.nonzero()[3].unbind()] = math.nan
    wanted = Counter()
    for chosen, keep, time in zip(ids.view(20, 2).tolist(), valid.flatten(), t.flatten().tolist(), strict=True):
        for expert in chosen if keep and not math.isnan(time) else ():
            wanted[sum(time >= edge for edge in (0.25, 0.5, 0.75)), expert] += 1
    found = tokens_per_expert_and_bin(ids, valid, t, 6)
    assert found.tolist() == [[wanted[index, expert] for expert in range(6)] for index in range(4)]
    assert found.dtype == tokens_per_expert(ids, valid, 6).dtype == torch.int64
    timed = valid & ~t.isnan()
    assert torch.equal(found.sum(dim=0), tokens_per_expert(ids, timed, 6))
    halves = [tokens_per_expert_and_bin(ids[part], valid[part], t[part], 6) for part in (slice(1), slice(1, 4))]
    assert torch.equal(sum(halves), found)


# --- the tap --------------------------------------------------------------------------------------------------------

NAMES = ["blocks.0.feed_forward.gate", "blocks.1.feed_forward.gate"]


class Block(nn.Module):
    def __init__(self, moe: MoE, reentrant: bool | None) -> None:
        super().__init__()
        self.feed_forward = SparseFeedForward(Architecture(d_model=8, num_heads=2, d_ff=None, moe=moe))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return x + self.feed_forward(x)
        return x + checkpoint(self.feed_forward, x, use_reentrant=self.reentrant)


class Stack(nn.Module):
    """Two sparse layers, and modules whose names are nearly those of routers."""

    def __init__(self, moe: MoE = ROUTERS["softmax"], reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(moe, reentrant) for _ in range(2))
        self.gate = nn.Linear(8, 8)
        self.my_router = nn.ModuleDict({"gate": nn.Linear(8, 8), "gates": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.my_router["gates"](self.my_router["gate"](self.gate(x)))


X = drawn(2, 3, 8, seed=2).float()


def taken(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """What a tap takes from one forward pass after the other."""
    with (tap := RouterTap(model)):
        for x in inputs:
            model(x)
    return tap.logits


def router_loss(logits: dict[str, Tensor]) -> Tensor:
    valid = torch.ones(2, 3, dtype=torch.bool)
    return sum(z_loss(z.view(2, 3, -1), valid).loss_sum for z in logits.values())


def test_tap_takes_the_logits_of_every_router_while_it_is_open():
    model = Stack()
    seen: dict[int, Tensor] = {}
    for index, block in enumerate(model.blocks):
        block.feed_forward.gate.register_forward_hook(lambda m, i, z, index=index: seen.__setitem__(index, z))
    tap = RouterTap(model)
    assert tap.logits == {}
    model(X)
    assert tap.logits == {}
    with tap as same:
        assert same is tap
        model(X)
    assert list(tap.logits) == NAMES
    assert [tap.logits[name] is seen[index] for index, name in enumerate(NAMES)] == [True, True]
    first = dict(tap.logits)
    model(2 * X)
    assert all(tap.logits[name] is first[name] for name in NAMES)
    with tap:
        assert tap.logits == {}
        model(2 * X)
    assert not torch.equal(tap.logits[NAMES[0]], first[NAMES[0]])


def test_router_loss_through_the_tap_reaches_gates_and_what_is_below_but_no_expert_above():
    model = Stack()
    with (tap := RouterTap(model)):
        model(X)
    router_loss(tap.logits).backward()
    for block in model.blocks:
        assert block.feed_forward.gate.weight.grad.any()
    assert model.blocks[0].feed_forward.experts.down_proj.grad.any()
    assert model.blocks[1].feed_forward.experts.down_proj.grad is None


def test_tap_under_checkpointing_gives_the_gradients_without_it():
    found = []
    for reentrant in (None, False):
        model = Stack(reentrant=reentrant)
        with (tap := RouterTap(model)):
            y = model(X)
        (y.square().sum() + router_loss(tap.logits)).backward()
        assert list(tap.logits) == NAMES
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_tap_refuses_reentrant_checkpointing_which_would_lose_the_loss():
    model = Stack(reentrant=True)
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"router blocks.0.feed_forward.gate: .* use_reentrant=True cuts it off"):
        taken(model, x)


def test_tap_without_gradients_takes_logits_without_gradients():
    model = Stack()
    with torch.no_grad(), (tap := RouterTap(model)):
        model(X)
    assert [z.requires_grad for z in tap.logits.values()] == [False, False]


def test_tap_without_a_forward_pass_is_refused():
    with pytest.raises(ValueError, match=r"router blocks.0.feed_forward.gate gave no logits"):
        taken(Stack())


def test_tap_of_two_forward_passes_is_refused():
    model = Stack()
    with pytest.raises(ValueError, match=r"router blocks.0.feed_forward.gate ran twice in one `with`"):
        taken(model, X, X)
    model(X)  # what failed is closed
    assert list(taken(model, X)) == NAMES


def test_tap_lets_errors_of_the_model_through():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        taken(Stack(), torch.zeros(2, 3, 5))


def test_model_that_was_tapped_can_be_copied_and_a_forgotten_tap_takes_nothing():
    model = Stack()
    tap = RouterTap(model)
    with tap:
        model(X)
    twin = copy.deepcopy(model)
    with tap:
        out = model(X)
    assert torch.equal(twin(X), out)
    del tap
    assert torch.equal(model(X), out)


@pytest.mark.parametrize("shape", [(2, 8, 4), (4, 8), (2, 3, 8)])
def test_balance_loss_of_logits_that_do_not_fit_names_the_shapes(shape, unchecked):
    moe = MoE(num_experts=8, top_k=2, d_ff_expert=1)
    with pytest.raises(ValueError, match=rf"logits are \[{', '.join(map(str, shape))}\] and valid is \[2, 4\]; wanted"):
        balance_loss(torch.zeros(shape), torch.ones(2, 4, dtype=torch.bool), moe, group_seqs=1)


def test_z_loss_of_logits_of_other_tokens_names_the_shapes(unchecked):
    with pytest.raises(
        ValueError, match=r"logits are \[2, 8, 4\] and valid is \[2, 4\]; wanted one row of logits a token"
    ):
        z_loss(torch.zeros(2, 8, 4), torch.ones(2, 4, dtype=torch.bool))


def test_routers_in_block_diffusion_see_both_halves_but_the_last_the_noisy_one():
    model = Denoiser(tiny(PRESETS["llada2-mini"])).float()
    model.init_weights(0)
    xt = torch.randint(63, (2, 8), generator=torch.Generator().manual_seed(0))
    model.blocks.append(copy.deepcopy(model.blocks[1]))  # layer 0 is dense
    with (tap := RouterTap(model)):
        model(xt, x0=xt, mask=AttentionMask("block_diffusion", block_size=2))
    assert [tuple(logits.view(2, -1, 8).shape) for logits in tap.logits.values()] == [(2, 16, 8), (2, 8, 8)]


def test_closed_tap_takes_nothing():
    model = Stack()
    tap = RouterTap(model)
    tap.close()
    with pytest.raises(ValueError, match="gave no logits"), tap:
        model(X)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.ModuleDict({"my_router": nn.ModuleDict({"gate": nn.ReLU()})})])
def test_tap_of_a_model_without_a_router_is_refused(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no router"):
        RouterTap(model)


def test_tap_finds_routers_of_a_block_alone_and_of_replaced_layers():
    moe = ROUTERS["biased groups"]
    block = Block(moe, None)
    gate = block.feed_forward.gate
    assert RouterTap(block)._names == ("feed_forward.gate",)
    assert RouterTap(block).selection_bias("feed_forward.gate") is gate.e_score_correction_bias
    assert RouterTap(Stack()).selection_bias(NAMES[0]) is None
    replaced = nn.ModuleDict({"router": nn.ModuleDict({"gate": nn.Linear(8, 6)})})
    bias = torch.zeros(6)
    replaced["router"].register_buffer("e_score_correction_bias", bias)
    tap = RouterTap(nn.ModuleDict({"feed_forward": replaced}))
    assert tap._names == ("feed_forward.router.gate",)
    assert tap.selection_bias("feed_forward.router.gate") is bias


@pytest.mark.parametrize("router_score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -300.0])
def test_router_losses_do_not_see_what_padding_holds(router_score, value):
    moe = MoE(num_experts=4, top_k=2, d_ff_expert=4, router_score=router_score)
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    padded = torch.where(valid[..., None], logits, value).requires_grad_()
    for loss in (balance_loss(padded, valid, moe, group_seqs=1).loss_sum, z_loss(padded, valid).loss_sum):
        (gradient,) = torch.autograd.grad(loss, padded)
        assert gradient.isfinite().all()
        assert (gradient[~valid] == 0).all()
    wanted = balance_loss(logits, valid, moe, group_seqs=1).loss_sum, z_loss(logits, valid).loss_sum
    found = balance_loss(padded, valid, moe, group_seqs=1).loss_sum, z_loss(padded, valid).loss_sum
    assert [float(x.detach()) for x in found] == [float(x) for x in wanted]
