"""Memory of a rank in training: the formula of pipeline/pretrain/memory.py beside what the kernel counts."""

import ctypes
import gc
import multiprocessing
import os
import socket
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks import command
from benchmarks.child import resident_bytes
from benchmarks.command import Measured, Options, RefusedError
from dlm_core.models.config import Architecture, ModelConfig, MoE
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.memory import Layout, RankMemory, rank_memory
from pipeline.pretrain.optimizer_config import OptimizerConfig

WORKERS = 2
_DEADLINE_S = 300.0
_MMAP_THRESHOLD = 1 << 16
"""From this size on, malloc maps a tensor by itself and gives its pages back when it dies: what is resident lives."""


@dataclass(frozen=True)
class Case:
    """A training of two ranks, small enough for two cores and large enough that libraries and caches are little."""

    model: ModelConfig
    layout: Layout


_DENSE = Architecture(d_model=512, num_layers=8, num_heads=8, d_ff=1408, tied_head=False)
_SPARSE = Architecture(
    d_model=384, num_layers=6, num_heads=6, d_ff=None, moe=MoE(16, 2, 384, renormalise=False), tied_head=False
)
_LAYOUT = Layout(WORKERS, micro_batch_seqs=8, seq_len=256, precision="fp32", on_gpu=False)

CASES = {
    "dense, float32, ZeRO-1": Case(ModelConfig(_DENSE, 8192, 8191), _LAYOUT),
    "dense, bfloat16, ZeRO-2, 2 passes": Case(
        ModelConfig(_DENSE, 8192, 8191),
        replace(_LAYOUT, precision="bf16", zero_stage=2, micro_batch_seqs=4, grad_accum_steps=2),
    ),
    "dense, float32, ZeRO-3, recomputed": Case(
        ModelConfig(_DENSE, 8192, 8191), replace(_LAYOUT, zero_stage=3, activation_checkpointing=True)
    ),
    "dense, float32, ZeRO-2, Muon and an average": Case(
        ModelConfig(_DENSE, 8192, 8191), replace(_LAYOUT, zero_stage=2, micro_batch_seqs=2, muon=True, ema=True)
    ),
    "experts, float32, ZeRO-2": Case(ModelConfig(_SPARSE, 8192, 8191), replace(_LAYOUT, zero_stage=2)),
    "experts spread over 2, float32, ZeRO-1": Case(ModelConfig(_SPARSE, 8192, 8191), replace(_LAYOUT, ep_size=2)),
}


def measure(options: Options) -> Measured:
    """Peak of every case, measured and by the formula."""
    if options.text:
        raise ValueError("--text: there is no text in this benchmark; leave it out")
    rows, ratios, figures = [], {}, {}
    for name, case in CASES.items():
        case = _small(case) if options.quick else case
        memory, measured = rank_memory(case.model, case.layout), peak_bytes(case)
        predicted = memory.device_bytes
        key = "predicted_over_measured_" + name.replace(", ", "_").replace(" ", "_").replace("-", "").lower()
        ratios[key] = predicted / measured
        figures[name] = {"measured_bytes": measured, "predicted_bytes": predicted, "components": _shown(memory)}
        megabytes = [f"{size / 1e6:.0f}" for size in (measured, predicted)]
        rows.append([name, f"{case.model.num_params() / 1e6:.1f}", *megabytes, f"{predicted / measured:.3f}"])
    heads = ["training on two ranks", "M parameters", "peak MB", "by the formula", "over measured"]
    return Measured(command.table(heads, rows), ratios, figures)


def _shown(memory: RankMemory) -> dict[str, int]:
    return {name: size for name, size in memory.peak().items() if size}


def peak_bytes(case: Case) -> int:
    """Peak of the resident memory of a rank while it trains, above what its libraries take; the larger of two ranks.

    RefusedError if a rank fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "MALLOC_MMAP_THRESHOLD_": str(_MMAP_THRESHOLD),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(case.layout.workers),
        "LOCAL_SIZE": str(case.layout.workers),
    }
    context = multiprocessing.get_context("spawn")
    before = dict(os.environ)
    pipes, ranks = [], []
    try:
        os.environ.update(environment)
        for rank in range(case.layout.workers):
            receiver, sender = context.Pipe(duplex=False)
            ranks.append(context.Process(target=_rank, args=(case, rank, sender), daemon=True))
            ranks[-1].start()
            sender.close()
            pipes.append(receiver)
        return max(_received(pipe) for pipe in pipes)
    finally:
        os.environ.clear()
        os.environ.update(before)
        for process in ranks:
            process.join(timeout=5)
            process.kill()


def _received(pipe: Connection) -> int:
    try:
        if not pipe.poll(_DEADLINE_S):
            raise RefusedError(f"a rank gave no answer within {_DEADLINE_S:.0f} s")
        return pipe.recv()
    except EOFError:
        raise RefusedError("a rank ended without an answer; its words stand above") from None


def _rank(case: Case, rank: int, answer: Connection) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    from pipeline.pretrain.engine import leave_process_group, prepare_process, start_process_group
    from pipeline.pretrain.watchdog import WatchdogLimits

    prepare_process(1)
    start_process_group(WatchdogLimits())
    _Training(_small(case)).step()  # loads what is lazy
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    training = _Training(case)
    training.step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here: making the engine is left out
    training.step()
    answer.send(resident_bytes("VmHWM") - before)
    leave_process_group()


def _small(case: Case) -> Case:
    """The same kind of training with next to no memory."""
    a = case.model.architecture
    moe, d_ff = a.moe and replace(a.moe, d_ff_expert=16), a.d_ff and 48
    small = replace(a, d_model=64, num_layers=1, num_heads=2, d_ff=d_ff, moe=moe)
    return Case(ModelConfig(small, 64, 63), replace(case.layout, micro_batch_seqs=1, seq_len=32))


class _Training:
    """An engine and random rows, every position of which is asked for, as the formula counts."""

    def __init__(self, case: Case) -> None:
        import torch

        from dlm_core.models.transformer import Denoiser
        from pipeline.pretrain.engine import build_engine

        layout, self._model = case.layout, case.model
        self._layout = layout
        torch.manual_seed(int(os.environ["RANK"]))
        model = Denoiser(case.model)
        model.init_weights(0)
        self._engine = build_engine(model, _pretrain_config(case))
        shape = (layout.micro_batch_seqs, layout.seq_len)
        xt = torch.randint(case.model.vocab_size - 1, shape)  # rows of masks alone would all go to the same experts
        targets = torch.randint(case.model.vocab_size - 1, (xt.numel(),))
        self._columns = (xt, torch.arange(xt.numel()), targets, torch.full((xt.numel(),), 1 / xt.numel()))

    def step(self) -> None:
        """One optimizer step."""
        for _ in range(self._layout.grad_accum_steps):
            loss = self._engine(*self._columns).loss_sum
            self._engine.backward(loss)
            del loss
            self._engine.step()


def _pretrain_config(case: Case) -> PretrainConfig:
    layout = case.layout
    return PretrainConfig(
        architecture=case.model.architecture,
        workers=layout.workers,
        zero_stage=layout.zero_stage,
        ep_size=layout.ep_size,
        activation_checkpointing=layout.activation_checkpointing,
        optimizer=OptimizerConfig(kind="muon" if layout.muon else "adamw", ema_decay=0.999 if layout.ema else 0.0),
        precision=layout.precision,
        micro_batch_seqs=layout.micro_batch_seqs,
        global_batch_seqs=layout.workers * layout.micro_batch_seqs * layout.grad_accum_steps,
    )


if __name__ == "__main__":
    raise SystemExit(command.run("memory", measure, is_timed=False))
