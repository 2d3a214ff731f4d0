"""Peak memory of conversions, each in a process of its own, beside the bound that it has to keep."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import command, process
from benchmarks.command import Measured, Options, RefusedError
from benchmarks.conversion_files import write_family, write_training
from dlm_core.models.config import Architecture, ModelConfig, MoE
from dlm_core.models.tensor_shapes import tensor_shapes
from pipeline.hf_names import Family
from pipeline.repack import their_shapes
from pipeline.tensor_files import read_header

MIN_BYTES = 2_000_000_000
"""Of every checkpoint that is converted."""
ALLOWANCE_BYTES = 200_000_000
"""For the interpreter, its libraries and what has to be kept of the names."""
TENSORS, RANK_FILES = 2.0, 1.5
"""How often the largest tensor, or the largest file of a rank, may be held besides."""
WORKERS = 8
_MB = 1e6


@dataclass(frozen=True)
class Case:
    """A model in the files of another project; numbers of two bytes, in files of half a gigabyte."""

    family: Family
    model: ModelConfig


_LLAMA = Architecture(2048, 22, 32, num_kv_heads=4, d_ff=5632, norm_eps=1e-5, tied_head=False)
_EXPERTS = MoE(num_experts=64, top_k=8, d_ff_expert=384)
_SPARSE = Architecture(
    1024, 14, 16, num_kv_heads=4, head_dim=64, d_ff=None, qk_norm=True, moe=_EXPERTS, tied_head=False
)
CASES = {
    "Llama": Case("llama", ModelConfig(_LLAMA, 32_000, None)),
    "Qwen3-MoE": Case("qwen3_moe", ModelConfig(_SPARSE, 32_000, None)),
}
TRAINED = ModelConfig(Architecture(1024, 8, 16, d_ff=2816), 32_000, 31_999)
"""Kept four times over in float32: the masters, their average, and both moments."""


@dataclass(frozen=True)
class Peak:
    """What a conversion took, and may take."""

    name: str
    read_bytes: int
    peak_bytes: int
    bound_bytes: float
    wall_s: float


def measure(options: Options) -> Measured:
    """Every conversion, one after the other; RefusedError if one fails or the checkpoint was too small."""
    if options.text:
        raise ValueError("--text: there is no text in this benchmark; leave it out")
    found: list[Peak] = []
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as place:
            found += _both_ways(name, _small(case) if options.quick else case, Path(place))
    with tempfile.TemporaryDirectory() as place:
        found += _from_training(_small_model(TRAINED) if options.quick else TRAINED, Path(place))
    small = [peak.name for peak in found if peak.read_bytes < MIN_BYTES]
    if small and not options.quick:
        raise RefusedError(f"the checkpoints of {', '.join(small)} have less than {MIN_BYTES / 1e9:.0f} GB")
    rows = [
        [
            peak.name,
            *(f"{size / _MB:.0f}" for size in (peak.read_bytes, peak.peak_bytes, peak.bound_bytes)),
            f"{peak.peak_bytes / peak.bound_bytes:.3f}",
            f"{peak.wall_s:.1f}",
        ]
        for peak in found
    ]
    heads = ["conversion in a process of its own", "MB read", "peak MB", "bound MB", "over bound", "seconds"]
    ratios = {f"peak_over_bound_{_key(peak.name)}": peak.peak_bytes / peak.bound_bytes for peak in found}
    figures = {
        peak.name: {
            "read_bytes": peak.read_bytes,
            "peak_bytes": peak.peak_bytes,
            "bound_bytes": int(peak.bound_bytes),
            "wall_s": round(peak.wall_s, 1),
        }
        for peak in found
    }
    return Measured(command.table(heads, rows), ratios, figures)


def _key(name: str) -> str:
    return name.lower().replace(" -> ", "_to_").replace(", ", "_").replace(" ", "_").replace("-", "_")


CUT = {"dtype": "bfloat16", "max_shard_bytes": 500_000_000}
"""Of the files that are written."""


def _both_ways(name: str, case: Case, place: Path) -> Iterator[Peak]:
    """From another project's files and back to them."""
    theirs, ours, again = (place / part for part in ("theirs", "ours", "again"))
    theirs.mkdir()
    write_family(case.family, case.model, theirs)
    shapes = [*their_shapes(case.family, case.model).values(), *tensor_shapes(case.model).values()]
    largest = max(4 * _numel(shape) for shape in shapes)
    bound = TENSORS * largest + ALLOWANCE_BYTES
    read = sum(path.stat().st_size for path in theirs.iterdir())
    # The proof by logits holds two models of 4 GB, in a process of its own, which is not what is bounded.
    config = json.dumps({"path": str(theirs), "proof": "tensors"})
    yield _peak(f"{name} -> interchange", read, bound, place, "to_interchange", config, str(ours))
    read = sum(path.stat().st_size for path in ours.iterdir())
    config = json.dumps({"family": case.family, "proof": "tensors", "without_tokenizer": True, **CUT})
    yield _peak(f"interchange -> {name}", read, bound, place, "from_interchange", config, str(again), str(ours))


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def _from_training(model: ModelConfig, place: Path) -> Iterator[Peak]:
    """From the files of all ranks of a training, to its last weights and to a mean over two checkpoints."""
    source = place / "pretrain"
    write_training(model, source, WORKERS)
    files = sorted(source.glob("checkpoints/*/*.safetensors"))
    bound = RANK_FILES * max(path.stat().st_size for path in files) + ALLOWANCE_BYTES
    once = sum(path.stat().st_size for path in files if path.parent == files[0].parent)
    for weights in ("last", "ema", "average"):
        out = place / weights
        name = f"training -> interchange, {weights}"
        yield _peak(name, once, bound, place, "from_training", json.dumps({"weights": weights}), str(out), str(source))
        assert len(read_header(out / "model.safetensors")) == len(tensor_shapes(model))


def _peak(name: str, read_bytes: int, bound_bytes: float, place: Path, function: str, *arguments: str) -> Peak:
    log = place / "log"
    cost = process.run_program(f"benchmarks.conversion_sides:{function}", *arguments, log=log)
    return Peak(name, read_bytes, int(log.read_text().splitlines()[-1]), bound_bytes, cost.wall_s)


def _small(case: Case) -> Case:
    return Case(case.family, _small_model(case.model))


def _small_model(model: ModelConfig) -> ModelConfig:
    a = model.architecture
    moe = a.moe and replace(a.moe, num_experts=8, top_k=2, d_ff_expert=32)
    small = replace(a, d_model=256, num_layers=2, num_heads=4, d_ff=a.d_ff and 512, moe=moe)
    return replace(model, architecture=small)


if __name__ == "__main__":
    raise SystemExit(command.run("conversion", measure, is_timed=False))
