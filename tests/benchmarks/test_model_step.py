"""The benchmark of the whole step: its peers compute what we compute, and it refuses one that doesn't."""

import json
from collections.abc import Iterator

import pytest
import torch

from benchmarks import model_step
from benchmarks.command import Options, RefusedError

TEXT = bytes(range(256)) * 5
DENSE, SPARSE = (model_step._quick(size) for size in (model_step.DENSE, model_step.SPARSE))
RTOL = 1e-5  # float32 sums of some hundred terms in two orders


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are small: threads gain nothing and, on a shared machine, wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)  # a measurement sets it for its process


def test_sizes_are_those_that_are_asked_for():
    assert 30e6 < model_step.DENSE.model.num_params() < 32e6
    assert 40e6 < model_step.SPARSE.model.num_params() < 64e6
    assert model_step.DENSE_SMALL_VOCABULARY.model.vocab_size == 8192


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
            norm = sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None) ** 0.5
            found[name] = [float(loss_sum.detach()), norm]
    for name, values in found.items():
        assert values == pytest.approx(found[model_step.OURS], rel=RTOL), name


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


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_quick_run_has_every_ratio_and_the_machine_s_faster_dtype():
    measured = model_step.measure(Options(quick=True, text=()))
    assert measured.ratios.keys() == {
        "plain", "transformers", "loop", "loop_same_trunk", "block_over_masked", "gemm_fraction",
    }  # fmt: skip
    assert all(ratio > 0 for ratio in measured.ratios.values())
    assert measured.figures["dtype"] in ("float32", "bfloat16")
    assert "ours, block diffusion" in measured.table
    json.dumps(measured.figures)
