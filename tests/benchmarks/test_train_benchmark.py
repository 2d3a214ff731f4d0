"""The benchmark of whole trainings: keys, a bare step that trains nothing, stalls of rounds."""

import json
from dataclasses import replace

import pytest

from benchmarks import train
from benchmarks.child import in_child
from benchmarks.command import Options, RefusedError
from benchmarks.train_loop import _stalls, _Stretch
from benchmarks.train_models import AUTOREGRESSIVE, DIFFUSION, MODELS, Model, TimedModel, measure_model

PEAK_TFLOPS = 1.0


def _tiny(model: Model) -> Model:
    a = model.architecture
    moe, d_ff = a.moe and replace(a.moe, num_experts=4, top_k=2, d_ff_expert=16), a.d_ff and 48
    return replace(
        model,
        architecture=replace(a, d_model=32, num_layers=1, num_heads=2, d_ff=d_ff, moe=moe),
        precision="fp32",
        is_compiled=False,
        vocab_size=64,
        seq_len=16,
        batch_seqs=4,
        num_warm_ups=1,
        num_rounds=2,
        steps_per_round=1,
    )


@pytest.mark.distributed
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", MODELS)
def test_model_takes_steps_of_both_objectives(name):
    model = _tiny(MODELS[name])
    timed: TimedModel = in_child(measure_model, model, PEAK_TFLOPS)
    assert [len(timed.step_s[side]) for side in (DIFFUSION, AUTOREGRESSIVE)] == [model.num_rounds] * 2
    assert all(0 < timed.mfu[side] < 1 for side in (DIFFUSION, AUTOREGRESSIVE))
    assert timed.diffusion_over_ar > 0
    json.dumps(timed.figures())


def _steps_on_memory(model: Model) -> dict[str, bool]:
    """What bare steps have changed of an engine."""
    from benchmarks.bare_step import BareStep
    from benchmarks.train_models import make_engine, rows_of
    from pipeline.pretrain.batches import micro_batches
    from pipeline.pretrain.engine import leave_process_group
    from pipeline.pretrain.held import EngineState

    config, special, engine, routers = make_engine(model)
    held = [dict(part.tensors) for part in EngineState(engine).held()]
    before = [{name: tensor.detach().clone() for name, tensor in part.items()} for part in held]
    bare = BareStep(config, engine, routers, list(micro_batches(config, rows_of(model), special, 0, 0)))
    bare.run(3)
    changed: dict[str, bool] = {}
    for old, new in zip(before, held, strict=True):
        for name in new:
            changed[name] = changed.get(name, False) or not old[name].equal(new[name])
    assert bare.num_tokens == model.batch_seqs * model.seq_len
    leave_process_group()
    return changed


@pytest.mark.distributed
@pytest.mark.timeout(180)
def test_bare_step_updates_the_optimizer_and_moves_no_weight():
    assert in_child(_steps_on_memory, _tiny(MODELS["dense"])) == {
        "master": False,
        "exp_avg": True,
        "exp_avg_sq": True,
    }


def test_sizes_are_those_that_are_asked_for():
    for size in (train.ON_CPU, train.ON_GPU, train.QUICK):
        assert size.warm_up_steps < size.config.checkpoint_every_steps
        assert size.config.workers == 1
    for size in (train.ON_CPU, train.ON_GPU):
        assert size.config.checkpoint_every_steps == 100
        assert size.num_rounds >= 3
    assert "experts" in MODELS
    assert train.ON_GPU.config.architecture == MODELS["dense"].architecture


def _lines(published: set[int], num_steps: int) -> list[dict[str, float]]:
    """Metrics of steps, with 1 s of stall where a checkpoint was published, and 0.25 s in steps 9, 10 and 21 too."""
    lines = [{"step": step, "checkpoint_stall_s": 0.25 if step in (9, 10, 21) else 0.0} for step in range(num_steps)]
    for step in published:
        lines[step] |= {"checkpoint_stall_s": 1.0, "checkpoint_s": 2.0}
    return lines


def test_stall_is_that_of_all_steps_that_waited_for_the_checkpoint_of_a_round():
    # rounds are steps 6..15 and 16..25; the checkpoint of their end is told of by the first line of the next
    assert _stalls(_lines({6, 11, 16, 22}, 26), warm_up_steps=6, every=10) == [1.5, 1.25]


@pytest.mark.parametrize("published", [{6, 16}, {11}, {11, 13, 22}])
def test_round_without_its_checkpoint_is_refused(published):
    with pytest.raises(RefusedError, match="published in a round of 10 steps; expected 1"):
        _stalls(_lines(published, 26), warm_up_steps=6, every=10)


def test_stretch_is_over_when_its_steps_are_done():
    stretch = _Stretch(end=2)
    stretch.progress(1, 100, loss=1.0)
    assert not stretch.should_stop()
    stretch.progress(2, 100, loss=1.0)
    assert stretch.should_stop()
    assert len(stretch.ends_s) == 2


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_run_has_every_ratio(one_thread):
    measured = train.measure(Options(quick=True, text=()))
    assert {"loop_vs_bare_step", "checkpoint_stall_over_torch_save"} <= measured.ratios.keys()
    assert all(ratio > 0 for ratio in measured.ratios.values())
    rounds = train.QUICK.num_rounds
    assert all(len(measured.figures[name]) == rounds for name in ("loop_step_s", "bare_step_s", "checkpoint_stall_s"))
    assert "skipped" in measured.table
    json.dumps(measured.figures)
