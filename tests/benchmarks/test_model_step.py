"""The benchmark of the whole step: its peers compute what we compute, and it refuses one that doesn't."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import model_step
from benchmarks.command import Options, RefusedError
from benchmarks.peers import PlainModel
from dlm_core.models.config import MoE

TEXT = bytes(range(256)) * 5
DENSE, SPARSE = (model_step._quick(size) for size in (model_step.DENSE, model_step.SPARSE))
RTOL = 1e-5  # float32 sums of some hundred terms in two orders


pytestmark = pytest.mark.usefixtures("one_thread")


def test_sizes_are_those_that_are_asked_for():
    dense, sparse = model_step.DENSE, model_step.SPARSE
    for size in (dense, sparse):
        assert (size.batch_seqs, size.seq_len, size.model.vocab_size, size.block_size) == (8, 512, 32_768, 16)
        assert size.num_rounds >= 5
        assert not size.model.architecture.tied_head
    a, b = dense.model.architecture, sparse.model.architecture
    assert (a.d_model, a.num_layers, a.num_heads, a.d_ff, a.moe) == (320, 8, 5, 853, None)
    assert (b.d_model, b.num_layers, b.d_ff, b.moe) == (256, 8, None, MoE(num_experts=32, top_k=4, d_ff_expert=128))
    assert replace(model_step.DENSE_SMALL_VOCABULARY, model=dense.model) == dense
    assert model_step.DENSE_SMALL_VOCABULARY.model == replace(dense.model, vocab_size=8192, mask_token_id=8191)


def test_batch_weighs_the_masked_positions_alone_on_either_side():
    batch = model_step._batch(DENSE, TEXT, 1)
    assert torch.equal(batch.dense_weight.flatten()[batch.select], batch.weight)
    assert int((batch.dense_weight > 0).sum()) == len(batch.select) > 0
    assert torch.equal(batch.x0.flatten()[batch.select], batch.targets)
    assert (batch.xt.flatten()[batch.select] == DENSE.model.mask_token_id).all()


@pytest.mark.parametrize(("size", "num_sides"), [(DENSE, 4), (SPARSE, 3)])
def test_loss_and_gradients_of_every_side_are_ours(size, num_sides):
    batch = model_step._batch(size, TEXT, 0)
    sides = model_step._sides(size)
    assert len(sides) == num_sides
    found = {}
    for name, (model, loss) in sides.items():
        if name != model_step.BLOCKS:
            if hasattr(model, "excluded"):
                model.excluded = size.model.mask_token_id
            loss_sum = loss(batch)
            loss_sum.backward()
            found[name] = float(loss_sum.detach())
    for name, value in found.items():
        assert value == pytest.approx(found[model_step.OURS], rel=RTOL), name
    ours, peer = sides[model_step.OURS][0], sides[model_step.PLAIN][0]
    expected = PlainModel(size.model, size.seq_len)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    model_step._copy_to_plain(ours, expected)
    for (name, theirs), wanted in zip(peer.named_parameters(), expected.state_dict().values(), strict=True):
        if "norm" not in name:  # which nobody copies: 1 at first, here and there
            torch.testing.assert_close(theirs.grad, wanted, rtol=0, atol=RTOL * float(wanted.abs().max()), msg=name)


@pytest.mark.parametrize("size", [DENSE, SPARSE])
def test_peer_without_one_of_its_layers_has_another_loss(size):
    batch, sides = model_step._batch(size, TEXT, 0), model_step._sides(size)
    plain, _ = sides[model_step.PLAIN]
    with torch.no_grad():
        plain.layers[0].attention.o.weight.zero_()
    with pytest.raises(RefusedError, match=r"the loss of 'plain torch' in float32 is .* and that of 'ours'"):
        model_step._check_losses(sides, batch, size.model.mask_token_id)


def test_side_with_another_loss_is_refused(monkeypatch):
    monkeypatch.setattr(model_step, "_theirs", lambda model: lambda b: 1.001 * model(b.xt, b.x0, b.dense_weight))
    with pytest.raises(RefusedError, match=r"the loss of 'plain torch' in float32 is .* and that of 'ours'"):
        model_step._measure(DENSE, TEXT, torch.float32, settings=(False,))


def test_ratio_takes_the_faster_setting_of_each_side():
    seconds = {"ours": [3.0], "plain torch": [4.0], "ours, compiled": [2.0], "plain torch, compiled": [5.0]}
    timed = model_step.Timed(seconds, dict.fromkeys(seconds, 0.0), 0.5, 1.0)
    assert timed.fastest(model_step.OURS) == [2.0]
    assert timed.fastest(model_step.PLAIN) == [4.0]
    over_ours = [line.split()[-2] for line in model_step._table("", timed).splitlines()[2:]]
    assert over_ours == ["1.00", "1.33", "1.00", "2.50"]


def test_block_diffusion_is_compared_in_the_same_setting():
    seconds = {"ours": [3.0], "ours, block diffusion": [4.0], "ours, compiled": [1.0]}
    seconds["ours, block diffusion, compiled"] = [1.5]
    timed = model_step.Timed(seconds, dict.fromkeys(seconds, 0.0), 0.5, 1.0)
    assert timed.block_over_masked() == 1.5


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_quick_run_has_every_ratio_and_the_machine_s_faster_dtype():
    measured = model_step.measure(Options(quick=True, text=()))
    assert measured.ratios.keys() == {
        "plain", "transformers", "loop", "loop_same_trunk", "block_over_masked", "block_over_fastest_masked",
        "gemm_fraction",
    }  # fmt: skip
    assert all(ratio > 0 for ratio in measured.ratios.values())
    assert measured.figures["dtype"] in ("float32", "bfloat16")
    assert "ours, block diffusion" in measured.table
    json.dumps(measured.figures)
