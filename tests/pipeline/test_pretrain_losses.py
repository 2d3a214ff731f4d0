"""The losses do not depend on how the work is spread, and are those of a loop without DeepSpeed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dlm_core.models.config import ModelConfig
from dlm_core.models.transformer import Denoiser
from pipeline.data.rows import open_rows
from pipeline.data.vocabulary import load_vocabulary
from pipeline.pretrain.batches import PhasedLoader, micro_batches
from pipeline.pretrain.config import STAGE, PretrainConfig
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.pretrain.phases import Phase
from tests.support.tiny_run import Artifacts, arguments, losses, metrics, pretrain, start_gang, tiny

pytestmark = pytest.mark.timeout(120)
SPREAD = 1e-4
"""Bar for other orders of float32 sums over 20 steps; 2e-6 is found."""
PLAIN = 1e-5
"""Bar for five steps of another implementation in float32."""


def assert_same_training(found: Path, wanted: Path, tolerance: float) -> None:
    """Losses, gradient norms and counts of two trainings agree."""
    for a, b in zip(metrics(found), metrics(wanted), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * tolerance)
        for exact in ("step", "lr", "tokens", "masked_fraction"):
            assert a[exact] == b[exact]


def test_steps_without_a_token_to_predict_cost_nothing_and_change_nothing_but_by_decay(
    made: Artifacts, tmp_path: Path
) -> None:
    phases = {"rows": Phase(), "single tokens": Phase(seq_len=1)}  # of which none has one before it
    config = tiny(num_steps=6, objective=ObjectiveConfig(kind="autoregressive"), phases=phases)
    lines = metrics(pretrain(config, made, tmp_path / "out"))[3:]
    assert [(line["loss"], line["nelbo"], line["grad_norm"]) for line in lines] == [(0.0, 0.0, 0.0)] * 3
    assert len({line["tokens"] for line in lines}) == 1


def test_training_learns(alone: Path) -> None:
    found = losses(alone)
    assert len(found) == 20
    assert sum(found[-5:]) < sum(found[:5])


@pytest.mark.distributed
def test_two_workers_give_the_losses_of_one(alone: Path, pair: Path) -> None:
    assert_same_training(pair, alone, SPREAD)


@pytest.mark.distributed
@pytest.mark.parametrize(("workers", "micro"), [(2, 2), (1, 2)])
def test_accumulation_gives_the_losses_of_one_pass(
    alone: Path, made: Artifacts, tmp_path: Path, workers: int, micro: int
) -> None:
    found = pretrain(tiny(workers=workers, micro_batch_seqs=micro), made, tmp_path / "out")
    assert_same_training(found, alone, SPREAD)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_zero_stages_give_the_losses_of_one_worker(
    alone: Path, made: Artifacts, tmp_path: Path, zero_stage: Any
) -> None:
    found = pretrain(tiny(workers=2, micro_batch_seqs=2, zero_stage=zero_stage), made, tmp_path / "out")
    assert_same_training(found, alone, SPREAD)


@pytest.mark.slow
@pytest.mark.distributed
def test_bf16_gives_nearly_the_losses_of_fp32(alone: Path, made: Artifacts, tmp_path: Path) -> None:
    found = losses(pretrain(tiny(workers=2, precision="bf16"), made, tmp_path / "out"))
    assert found != losses(alone)
    assert found == pytest.approx(losses(alone), rel=0.03)


def plain_training(config: PretrainConfig, made: Artifacts, num_steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the first steps, with nothing but torch: one batch, one mean, AdamW, clipping."""
    special = load_vocabulary(made.tokenizer).special
    loader = PhasedLoader(config, open_rows(made.rows), special.pad_token_id)
    model = Denoiser(ModelConfig(config.architecture, special.vocab_size, special.mask_token_id))
    model.init_weights(config.init_seed)
    o = config.optimizer
    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    others = [p for name, p in model.named_parameters() if "norm" in name]
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(o.beta1, o.beta2), eps=o.eps, foreach=False)
    found = []
    for step in range(num_steps):
        drawn = loader.rank_rows(step, 0)
        (batch,) = micro_batches(config, drawn, special, step, rank=0)
        logits = model(batch.xt).view(*batch.xt.shape, -1)
        cross_entropy = F.cross_entropy(logits.transpose(1, 2), torch.from_numpy(drawn.x0), reduction="none")
        is_masked = (batch.xt == special.mask_token_id).float()
        loss = (cross_entropy * is_masked / batch.t.float()).sum() / batch.is_text.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm, foreach=False)
        warmup_steps = o.lr_schedule.warmup_steps
        warm, left = (step + 1) / (warmup_steps + 1), (config.num_steps - step) / (config.num_steps - warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = o.lr * min(1.0, warm, left)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


def test_losses_are_those_of_a_loop_without_deepspeed(alone: Path, made: Artifacts) -> None:
    wanted = plain_training(tiny(), made, num_steps=5)
    assert max(norm for _, norm in wanted) > tiny().optimizer.max_grad_norm, "nothing was clipped: a weak test"
    for line, (loss, norm) in zip(metrics(alone)[:5], wanted, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=PLAIN)
        assert line["grad_norm"] == pytest.approx(norm, rel=PLAIN)


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_gives_the_losses_of_a_gang(pair: Path, made: Artifacts, tmp_path: Path) -> None:
    line = arguments(tiny(workers=2), made.inputs(), tmp_path / "out")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*torchrun, "-m", "pipeline.pretrain", *line],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert metrics(tmp_path / "out") == metrics(pair)


@pytest.mark.distributed
@pytest.mark.parametrize(("configured", "started"), [(2, 1), (1, 2)])
def test_another_number_of_processes_than_workers_is_exit_2_with_the_command(
    made: Artifacts, tmp_path: Path, configured: int, started: int
) -> None:
    gang = start_gang(STAGE, tiny(workers=configured), made.inputs(), tmp_path / "out", workers=started)
    assert gang.wait() == [2] * started
    assert f"pretrain.workers is {configured}, but {started} process(es) were started" in gang.log()
    assert f"torchrun --nproc-per-node {configured} -m pipeline.pretrain" in gang.log()
