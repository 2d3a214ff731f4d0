"""Memory by formula: against what autograd keeps of real models, against their parameters, and against itself."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_core import cross_entropy
from dlm_core.models.attention import AttentionMask
from dlm_core.models.config import Architecture, ModelConfig, MoE
from dlm_core.models.presets import PRESETS, tiny
from dlm_core.models.router_losses import RouterTap, balance_loss, z_loss
from dlm_core.models.transformer import Denoiser
from pipeline.pretrain import activations, memory
from pipeline.pretrain.activations import Pass, head_bytes, kept_by_layers, kept_outside
from pipeline.pretrain.memory import (
    Layout,
    expert_params,
    held_params,
    largest_matrix,
    matrix_params,
    rank_memory,
)
from pipeline.pretrain.muon import _BATCH_NUMEL, matrices_of

ROWS, LENGTH, BLOCK, VOCAB = 2, 32, 4, 64
DENSE = Architecture(d_model=32, num_layers=2, num_heads=4, d_ff=96, tied_head=False)
SPARSE = replace(DENSE, d_ff=None, moe=MoE(8, 2, 24, num_shared_experts=1, renormalise=False))
ARCHITECTURES = {
    "dense": DENSE,
    "grouped heads": replace(DENSE, num_kv_heads=2),
    "norm of heads": replace(DENSE, num_kv_heads=2, qk_norm=True),
    "half rotated": replace(DENSE, rope_fraction=0.5),
    "dit": replace(DENSE, norm="layer", activation="gelu", cond_dim=16),
    "experts": SPARSE,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODEL = ModelConfig(DENSE, VOCAB, VOCAB - 1)
LAYOUT = Layout(workers=4, micro_batch_seqs=2, seq_len=32)


def kept_by_autograd(a: Architecture, precision: str, *, has_blocks: bool) -> int:
    """Bytes of every storage that a forward pass saves, parameters and tables of attention left out."""
    model = Denoiser(ModelConfig(a, VOCAB, VOCAB - 1)).to(DTYPES[precision])
    ours = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        is_table = tensor.ndim == 4 and tensor.shape[-2:] in ((2 * LENGTH, 2 * LENGTH), (LENGTH, 2 * LENGTH))
        if place not in ours and not is_table:
            found[place] = tensor
        return tensor

    xt = torch.randint(0, VOCAB, (ROWS, LENGTH))
    blocks = {"x0": xt, "mask": AttentionMask("block_diffusion", block_size=BLOCK), "backend": "dense"}
    tap = RouterTap(model) if a.moe is not None else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if tap is None:
            loss = model(xt, **(blocks if has_blocks else {})).sum()
        else:
            with tap:
                loss = model(xt, **(blocks if has_blocks else {})).sum()
            for flat in tap.logits.values():
                logits, valid = flat.view(ROWS, -1, flat.shape[-1]), torch.ones(ROWS, flat.shape[0] // ROWS) > 0
                assert a.moe is not None
                loss = loss + balance_loss(logits, valid, a.moe, group_seqs=1).loss_sum + z_loss(logits, valid).loss_sum
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("has_blocks", [False, True], ids=["rows", "blocks"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_of_a_layer_are_what_autograd_keeps(name, precision, has_blocks):
    a = ARCHITECTURES[name]
    p = Pass(ROWS, LENGTH, precision, block_diffusion=has_blocks, on_gpu=False)
    more = replace(a, num_layers=3)
    kept = kept_by_autograd(more, precision, has_blocks=has_blocks) - kept_by_autograd(
        a, precision, has_blocks=has_blocks
    )
    assert kept_by_layers(more, p)[1] == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_of_the_last_layer_of_blocks_are_those_of_half_of_its_queries(name):
    a = replace(ARCHITECTURES[name], num_layers=1)
    p = Pass(ROWS, LENGTH, "fp32", block_diffusion=True, on_gpu=False)
    by_formula = sum(kept_by_layers(a, p)) + kept_outside(ModelConfig(a, VOCAB, VOCAB - 1), p)
    logits = 4 * ROWS * LENGTH * VOCAB  # which training with targets never makes
    assert by_formula == pytest.approx(kept_by_autograd(a, "fp32", has_blocks=True) - logits, rel=0.1)


def test_activations_a_gpu_keeps_less_of_the_norms():
    p = Pass(ROWS, LENGTH, "bf16")
    saved = sum(kept_by_layers(DENSE, replace(p, on_gpu=False))) - sum(kept_by_layers(DENSE, p))
    assert saved == 2 * DENSE.num_layers * ROWS * LENGTH * (2 * 4 - 2) * DENSE.d_model


def test_sizes_that_are_copied_from_modules_with_torch_are_theirs():
    assert activations.CHUNK_BYTES == cross_entropy.CHUNK_BYTES
    assert memory._MUON_BATCH_NUMEL == _BATCH_NUMEL


@pytest.mark.parametrize(("precision", "expected"), [("fp32", 8), ("bf16", 10)])
def test_head_of_a_large_vocabulary_is_mostly_the_gradients_of_its_matrix(precision, expected):
    model = ModelConfig(replace(DENSE, d_model=512), 200_000, 0)
    rows = 3 * 64 * 512 * (4 if precision == "fp32" else 2)
    assert head_bytes(model, Pass(2, 32, precision)) == rows + expected * 200_000 * 512


@pytest.mark.parametrize("name", PRESETS)
def test_counts_of_experts_and_matrices_are_those_of_the_model(name):
    model = tiny(PRESETS[name])
    shapes = {name: p.shape for name, p in Denoiser(model).named_parameters()}
    experts = [shape.numel() for name, shape in shapes.items() if ".experts." in name]
    matrices = [matrix.numel for matrix in matrices_of(shapes)]
    assert expert_params(model) == sum(experts)
    assert matrix_params(model) == sum(matrices)
    assert largest_matrix(model) == max(matrices)
    assert held_params(model, 0) == held_params(model, 1) == model.num_params()
    if experts:
        assert held_params(model, 4) == model.num_params() - sum(experts) * 3 // 4


# --- spread over workers --------------------------------------------------------------------------------------------

N = MODEL.num_params()


@pytest.mark.parametrize(
    ("precision", "stage", "parameters", "masters", "moments"),
    [
        ("fp32", 0, 4 * N, 0, 8 * N),
        ("bf16", 0, 2 * N, 4 * N, 8 * N),
        ("fp32", 1, 4 * N, N, 2 * N),
        ("bf16", 2, 2 * N, N, 2 * N),
        ("fp32", 3, N, 0, 2 * N),
        ("bf16", 3, N // 2, N, 2 * N),
    ],
)
def test_state_is_spread_as_the_zero_stage_says(precision, stage, parameters, masters, moments):
    assert N % 4 == 0
    found = rank_memory(MODEL, replace(LAYOUT, precision=precision, zero_stage=stage))
    assert (found.parameters, found.masters, found.moments) == (parameters, masters, moments)
    assert (found.momentum, found.ema, found.host_optimizer) == (0, 0, 0)
    assert found.checkpoint_bytes == 12 * N
    assert found.host_checkpoint == 3 * N


def test_muon_keeps_one_tensor_for_matrices_and_an_average_is_one_more():
    found = rank_memory(MODEL, replace(LAYOUT, workers=1, muon=True, ema=True))
    matrices = matrix_params(MODEL)
    assert (found.momentum, found.moments, found.ema) == (4 * matrices, 8 * (N - matrices), 4 * N)
    assert found.checkpoint_bytes == 4 * N + 4 * matrices + 8 * (N - matrices) + 4 * N


def test_offloaded_optimizer_leaves_the_device():
    stays = rank_memory(MODEL, LAYOUT)
    leaves = rank_memory(MODEL, replace(LAYOUT, offload_optimizer=True))
    assert (leaves.masters, leaves.moments, leaves.update) == (0, 0, 0)
    assert leaves.host_optimizer == stays.masters + stays.moments + N
    assert stays.host_bytes == max(4 * N, stays.host_checkpoint)  # every worker makes the whole model in float32
    assert leaves.host_bytes == max(4 * N, leaves.host_optimizer + leaves.host_checkpoint)


def test_spread_experts_divide_parameters_and_not_masters():
    model = ModelConfig(SPARSE, VOCAB, VOCAB - 1)
    whole, spread = (rank_memory(model, replace(LAYOUT, ep_size=size)) for size in (0, 4))
    assert whole.parameters - spread.parameters == 2 * expert_params(model) * 3 // 4
    assert whole.masters == spread.masters
    assert whole.exchange == 0 < spread.exchange


def test_recomputed_layers_keep_their_inputs_alone():
    p = Pass(LAYOUT.micro_batch_seqs, LAYOUT.seq_len, "bf16")
    found = rank_memory(MODEL, replace(LAYOUT, activation_checkpointing=True))
    inputs = DENSE.num_layers * p.positions * DENSE.d_model * 2
    assert found.activations == kept_outside(MODEL, p) + inputs
    assert found.working_layer - rank_memory(MODEL, LAYOUT).working_layer == max(kept_by_layers(DENSE, p))


def test_accumulated_gradients_cost_memory_beside_activations():
    once, twice = (rank_memory(MODEL, replace(LAYOUT, grad_accum_steps=number)) for number in (1, 2))
    assert (once.accumulated, twice.accumulated) == (0, 2 * N)


layouts = st.builds(
    Layout,
    workers=st.sampled_from([1, 2, 4, 8]),
    micro_batch_seqs=st.integers(1, 8),
    seq_len=st.sampled_from([32, 1024]),
    precision=st.sampled_from(["fp32", "bf16"]),
    zero_stage=st.sampled_from([1, 2, 3]),
    grad_accum_steps=st.integers(1, 3),
    block_diffusion=st.booleans(),
    activation_checkpointing=st.booleans(),
    offload_optimizer=st.booleans(),
    muon=st.booleans(),
    ema=st.booleans(),
    on_gpu=st.booleans(),
)


@settings(deadline=None)
@given(layouts)
def test_peak_is_the_largest_moment_and_no_part_is_negative(layout):
    found = rank_memory(MODEL, layout)
    assert all(getattr(found, field.name) >= 0 for field in fields(found))
    moments = [sum(found.at(moment).values()) for moment in ("head", "layers", "reduction", "update")]
    assert found.device_bytes == max(moments)
    assert list(found.peak().values()) == sorted(found.peak().values(), reverse=True)


@settings(deadline=None)
@given(layouts)
def test_peak_grows_with_the_rows_of_a_pass_and_with_an_average_of_the_weights(layout):
    found = rank_memory(MODEL, layout).device_bytes
    assert rank_memory(MODEL, replace(layout, micro_batch_seqs=layout.micro_batch_seqs + 1)).device_bytes >= found
    assert rank_memory(MODEL, replace(layout, ema=True)).device_bytes >= found


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"micro_batch_seqs": 0}, "micro_batch_seqs is 0"),
        ({"seq_len": -1}, "seq_len is -1"),
        ({"grad_accum_steps": 0}, "grad_accum_steps is 0"),
        ({"zero_stage": 4}, "zero_stage is 4; it must be 0, 1, 2 or 3"),
        ({"precision": "fp16"}, 'precision is "fp16"; it must be one of fp32, bf16'),
        ({"ep_size": 3}, "ep_size is 3; it must divide workers 4"),
        ({"ep_size": -1}, "ep_size is -1"),
        ({"offload_optimizer": True, "zero_stage": 0}, "offload_optimizer is true with zero_stage 0"),
    ],
)
def test_layout_that_cannot_be_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(LAYOUT, **change)


@pytest.mark.parametrize(
    ("a", "workers", "words"), [(DENSE, 4, "ep_size is 4, but the model has no experts"), (SPARSE, 16, "has 8 experts")]
)
def test_experts_that_cannot_be_spread_are_refused(a, workers, words):
    with pytest.raises(ValueError, match=words):
        rank_memory(ModelConfig(a, VOCAB, 0), replace(LAYOUT, workers=workers, ep_size=workers))
