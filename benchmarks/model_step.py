"""A whole training step: ours against the same architecture in plain torch, and against transformers' own model.

Everyone has the same dtype, the one that the machine multiplies faster, float32 masters and one fused AdamW; every side
runs eager and compiled, all in turn, and a ratio takes each side's faster form.  Tokens are pairs of bytes of a text;
times and masks are those of training, another batch in every round.  block_over_masked is our own step of block
diffusion over that of masked diffusion, on the same rows.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.child import in_child
from benchmarks.command import Measured, Options, RefusedError, run, table
from benchmarks.interleave import interleave, median_ratio
from benchmarks.peers import PlainModel, TransformersModel
from benchmarks.text import read_text
from dlm_core.corruption import mask_tokens, sample_times
from dlm_core.models.attention import AttentionMask
from dlm_core.models.config import Architecture, ModelConfig, MoE
from dlm_core.models.transformer import Denoiser

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T_MIN = 1e-3
NOISE_SEED = 0
NUM_WARM_UPS = 3
"""Steps, each with another number of masked rows, before any is timed; one more than a compiler needs to see that."""
WEIGHT_SCALE = 5.0
"""Of the drawn matrices: as drawn, the logits hardly depend on the layers, and anything would give the same loss."""
MAX_LOSS_DIFFERENCE = 1e-4
"""Of the loss sum of one batch between implementations in float32, relative."""


@dataclass(frozen=True)
class Size:
    """What is measured, and how often."""

    model: ModelConfig
    batch_seqs: int
    seq_len: int
    block_size: int
    num_rounds: int
    heap_bytes: int
    """Touched and freed before anything else, more than all sides need, so that no step waits for new pages."""

    @property
    def mask_token_id(self) -> int:
        """The last id."""
        return self.model.vocab_size - 1


def _dense(vocab_size: int) -> ModelConfig:
    architecture = Architecture(
        d_model=320, num_layers=8, num_heads=5, d_ff=853, tied_head=False, init="normal", norm_eps=1e-6
    )
    return ModelConfig(architecture, vocab_size, vocab_size - 1)


def _sparse(vocab_size: int) -> ModelConfig:
    moe = MoE(num_experts=32, top_k=4, d_ff_expert=128)
    architecture = Architecture(
        d_model=256, num_layers=8, num_heads=4, d_ff=None, moe=moe, tied_head=False, init="normal"
    )
    return ModelConfig(architecture, vocab_size, vocab_size - 1)


DENSE = Size(_dense(32_768), batch_seqs=8, seq_len=512, block_size=16, num_rounds=5, heap_bytes=14 << 30)
SPARSE = replace(DENSE, model=_sparse(32_768))
DENSE_SMALL_VOCABULARY = replace(DENSE, model=_dense(8_192))


def _quick(size: Size) -> Size:
    architecture = replace(size.model.architecture, num_layers=1)
    model = ModelConfig(architecture, vocab_size=512, mask_token_id=511)
    return replace(size, model=model, batch_seqs=2, seq_len=64, num_rounds=2, heap_bytes=0)


@dataclass(frozen=True)
class Batch:
    """One global batch, and what each side wants of it."""

    x0: Tensor
    xt: Tensor
    select: Tensor
    targets: Tensor
    weight: Tensor
    """Of the selected positions."""
    dense_weight: Tensor
    """[B, L]: the same, 0 where nothing is predicted."""


def _batch(size: Size, text: bytes, step: int) -> Batch:
    num_tokens, mask_token_id = size.batch_seqs * size.seq_len, size.mask_token_id
    start = 2 * num_tokens * step
    pairs = torch.frombuffer(bytearray(text[start : start + 2 * num_tokens]), dtype=torch.uint8).long().view(-1, 2)
    x0 = ((pairs[:, 0] * 256 + pairs[:, 1]) % mask_token_id).view(size.batch_seqs, size.seq_len)
    t = sample_times(NOISE_SEED, step, size.batch_seqs, T_MIN)
    ids = step * size.batch_seqs + torch.arange(size.batch_seqs)
    xt = mask_tokens(x0, t[:, None], ids, noise_seed=NOISE_SEED, step=step, mask_token_id=mask_token_id)
    is_masked = (xt == mask_token_id).flatten()
    dense = (1 / t).float()[:, None].expand_as(x0).flatten() * is_masked
    select = is_masked.nonzero().squeeze(1)
    columns = (x0, xt, select, x0.flatten()[select], dense[select], dense.view_as(x0))
    return Batch(*(column.to(DEVICE) for column in columns))


class MasterAdamW:
    """Fused AdamW on the weights, or on float32 copies of narrower ones: what every side steps with."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().requires_grad_() for p in self.weights]  # the weights, if they are float32
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(self) -> None:
        """One update from the gradients of the weights, which are dropped."""
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.weights]
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                if master.dtype != weight.dtype:
                    weight.copy_(master)
                weight.grad = None


Loss = Callable[[Batch], Tensor]


def _ours(model: Denoiser) -> Loss:
    return lambda b: model(b.xt, b.select, b.targets, b.weight).loss_sum


def _ours_in_blocks(model: Denoiser, block_size: int) -> Loss:
    mask = AttentionMask("block_diffusion", block_size=block_size)
    return lambda b: model(b.xt, b.select, b.targets, b.weight, x0=b.x0, mask=mask).loss_sum


def _theirs(model: nn.Module) -> Loss:
    return lambda b: model(b.xt, b.x0, b.dense_weight)


def _copy_to_plain(source: Denoiser, peer: PlainModel) -> None:
    """The same weights, packed matrices cut."""
    a, ours = source.config.architecture, dict(source.named_parameters())
    with torch.no_grad():
        peer.embedding.weight.copy_(ours["embedding.weight"])
        peer.head.weight.copy_(ours["head.weight"])
        for number, layer in enumerate(cast("list[Any]", peer.layers)):
            here = f"blocks.{number}."
            parts = ours[here + "attention.qkv.weight"].chunk(3)
            for part, linear in zip(parts, (layer.attention.q, layer.attention.k, layer.attention.v), strict=True):
                linear.weight.copy_(part)
            layer.attention.o.weight.copy_(ours[here + "attention.out.weight"])
            if a.moe is None:
                gate, up = ours[here + "feed_forward.gate_up.weight"].chunk(2)
                experts = [(layer.mlp, gate, up, ours[here + "feed_forward.down.weight"])]
            else:
                layer.mlp.gate.weight.copy_(ours[here + "feed_forward.gate.weight"])
                pairs, downs = (ours[f"{here}feed_forward.experts.{name}_proj"] for name in ("gate_up", "down"))
                experts = [
                    (expert, *pair.chunk(2), down)
                    for expert, pair, down in zip(layer.mlp.experts, pairs, downs, strict=True)
                ]
            for network, gate, up, down in experts:
                network.gate.weight.copy_(gate)
                network.up.weight.copy_(up)
                network.down.weight.copy_(down)


def _copy_to_transformers(source: Denoiser, peer: TransformersModel) -> None:
    from pipeline.hf_names import to_family

    theirs = to_family("llama", source.config.architecture, source.state_dict())
    peer.model.load_state_dict(theirs, strict=True)


def _compile(model: nn.Module) -> None:
    """Ours layer by layer for its fixed shapes; a peer whole, which fuses its loss too, and as torch compiles it."""
    if not isinstance(model, Denoiser):
        model.compile()
        return
    for block in model.blocks:
        block.compile(dynamic=False)


OURS, PLAIN, TRANSFORMERS, BLOCKS, LOOP = "ours", "plain torch", "transformers", "ours, block diffusion", "ours, loop"


def _sides(size: Size) -> dict[str, tuple[nn.Module, Loss]]:
    """Every side with the same weights; a dense size gets transformers and block diffusion, a sparse one loops."""
    ours = Denoiser(size.model)
    ours.init_weights(0)
    with torch.no_grad():
        for weight in ours.parameters():
            if weight.ndim > 1:
                weight *= WEIGHT_SCALE
    plain = PlainModel(size.model, size.seq_len)
    _copy_to_plain(ours, plain)
    sides: dict[str, tuple[nn.Module, Loss]] = {OURS: (ours, _ours(ours)), PLAIN: (plain, _theirs(plain))}
    if size.model.architecture.moe is None:
        peer, blocks = TransformersModel(size.model, size.seq_len), Denoiser(size.model)
        _copy_to_transformers(ours, peer)
        blocks.load_state_dict(ours.state_dict())
        sides[TRANSFORMERS] = (peer, _theirs(peer))
        sides[BLOCKS] = (blocks, _ours_in_blocks(blocks, size.block_size))
    else:
        loop = Denoiser(size.model)
        loop.load_state_dict(ours.state_dict())
        for block in cast("list[Any]", loop.blocks):
            block.feed_forward.experts.implementation = "loop"
        sides[LOOP] = (loop, _ours(loop))
    for model, _ in sides.values():
        model.to(DEVICE)
    return sides


def _check_losses(sides: dict[str, tuple[nn.Module, Loss]], batch: Batch, mask_token_id: int) -> None:
    """RefusedError unless all but block diffusion, another objective, have the same loss of a batch."""
    found = {}
    with torch.no_grad():
        for name, (model, loss) in sides.items():
            if name == BLOCKS:
                continue
            if isinstance(model, PlainModel | TransformersModel):
                model.excluded = mask_token_id
            found[name] = float(loss(batch))
            if isinstance(model, PlainModel | TransformersModel):
                model.excluded = None  # as released code leaves it: 1 id of 32,768, and a copy of the logits
    for name, loss_sum in found.items():
        if not abs(loss_sum - found[OURS]) <= MAX_LOSS_DIFFERENCE * found[OURS]:
            raise RefusedError(
                f"the loss of {name!r} in float32 is {loss_sum:.6g} and that of {OURS!r} {found[OURS]:.6g}"
            )


@dataclass(frozen=True)
class Timed:
    """Seconds of every side and setting in every round, and what it took to be ready."""

    seconds: dict[str, list[float]]
    """Keys are "SIDE" and "SIDE, compiled"."""
    warm_up_s: dict[str, float]
    masked_share: float
    matmul_gflops: float
    """Median rate of a large square product in the dtype of the step."""

    def fastest(self, side: str) -> list[float]:
        """The rounds of a side in the setting with the lower median."""
        return min((times for name, times in self.seconds.items() if _side(name) == side), key=statistics.median)

    def block_over_masked(self) -> float:
        """Our block diffusion over our masked diffusion in the same setting, the larger of the ratios."""
        return max(
            median_ratio(times, self.seconds[name.replace(BLOCKS, OURS)])
            for name, times in self.seconds.items()
            if _side(name) == BLOCKS
        )


_COMPILED = ", compiled"


def _side(name: str) -> str:
    return name.removesuffix(_COMPILED)


def _measure(size: Size, text: bytes, dtype: torch.dtype, settings: tuple[bool, ...]) -> Timed:
    """Time whole steps of all sides in turn, compiled or not; RefusedError if their losses differ."""
    torch.set_flush_denormal(True)
    torch.ones(size.heap_bytes if DEVICE.type == "cpu" else 0, dtype=torch.int8)
    batches = [_batch(size, text, step) for step in range(size.num_rounds)]
    warm_up_s: dict[str, float] = {}
    steps: dict[str, Callable[[int], object]] = {}
    for is_compiled in settings:
        sides = _sides(size)
        _check_losses(sides, batches[0], size.mask_token_id)
        for side, (model, loss) in sides.items():
            model.to(dtype)
            if is_compiled:
                _compile(model)
            optimizer = MasterAdamW(model)

            def step(number: int, loss: Loss = loss, optimizer: MasterAdamW = optimizer) -> None:
                (loss(batches[number]) / batches[number].x0.numel()).backward()
                optimizer.step()
                _wait()

            name = side + _COMPILED if is_compiled else side
            start = time.perf_counter()
            for number in range(min(NUM_WARM_UPS, size.num_rounds)):
                step(number)
            warm_up_s[name], steps[name] = time.perf_counter() - start, step
    rates = [_matmul_gflops(dtype) for _ in range(5)]
    seconds = interleave(steps, size.num_rounds)
    rates += [_matmul_gflops(dtype) for _ in range(5)]
    masked_share = statistics.fmean(len(b.select) / b.x0.numel() for b in batches)
    return Timed(seconds, warm_up_s, masked_share, statistics.median(rates))


def _faster_dtype() -> torch.dtype:
    """Of float32 and bf16; without matrix units for bf16 that is float32."""
    rates = {dtype: [_matmul_gflops(dtype) for _ in range(5)] for dtype in (torch.float32, torch.bfloat16)}
    return max(rates, key=lambda dtype: statistics.median(rates[dtype]))


def _matmul_gflops(dtype: torch.dtype) -> float:
    left, right = torch.randn(2, 2048, 2048).to(DEVICE, dtype)
    _wait()
    start = time.perf_counter()
    for _ in range(3):
        torch.mm(left, right)
    _wait()
    return 3 * 2 * 2048**3 / (time.perf_counter() - start) / 1e9


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _table(title: str, timed: Timed) -> str:
    """x ours is over our step in the same setting."""
    rows = []
    for name, found in timed.seconds.items():
        ours = timed.seconds[name.replace(_side(name), OURS)]
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(found):.0f}",
                f"{1e3 * min(found):.0f}-{1e3 * max(found):.0f}",
                f"{median_ratio(found, ours):.2f}",
                f"{timed.warm_up_s[name]:.0f}",
            ]
        )
    return table([title, "ms", "range", "x ours", "warm-up s"], rows)


def _gemm_fraction(size: Size, timed: Timed) -> float:
    """Useful rate of our step over the rate of a large matrix product in the same process."""
    flops = size.model.flops_per_token(size.seq_len, timed.masked_share) * size.batch_seqs * size.seq_len
    return flops / statistics.median(timed.fastest(OURS)) / 1e9 / timed.matmul_gflops


def measure(options: Options) -> Measured:
    """Dense, sparse and a small vocabulary, eager and compiled, one process a size.

    A ratio is that of each side's faster setting; the fraction is of the rate of a large product in the same dtype.
    """
    sizes = {"dense": DENSE, "experts": SPARSE, "dense, 8,192 ids": DENSE_SMALL_VOCABULARY}
    if options.quick:
        sizes = {f"{name}, quick": _quick(sizes[name]) for name in ("dense", "experts")}
    settings = (False,) if options.quick else (False, True)  # compiling takes minutes
    largest = max(sizes.values(), key=lambda size: size.batch_seqs * size.seq_len * size.num_rounds)
    text = read_text(options.text, 2 * largest.batch_seqs * largest.seq_len * largest.num_rounds)
    dtype: torch.dtype = in_child(_faster_dtype)
    found: dict[str, Timed] = {name: in_child(_measure, size, text, dtype, settings) for name, size in sizes.items()}
    dense, sparse = list(found.values())[:2]
    ratios = {
        "plain": median_ratio(dense.fastest(PLAIN), dense.fastest(OURS)),
        "transformers": median_ratio(dense.fastest(TRANSFORMERS), dense.fastest(OURS)),
        "loop": median_ratio(sparse.fastest(PLAIN), sparse.fastest(OURS)),
        "loop_same_trunk": median_ratio(sparse.fastest(LOOP), sparse.fastest(OURS)),
        "block_over_masked": dense.block_over_masked(),
        "block_over_fastest_masked": median_ratio(dense.fastest(BLOCKS), dense.fastest(OURS)),
        "gemm_fraction": _gemm_fraction(next(iter(sizes.values())), dense),
    }
    figures = {
        "num_params": {name: size.model.num_params() for name, size in sizes.items()},
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "ms": {
            size: {name: [round(1e3 * s, 1) for s in times] for name, times in timed.seconds.items()}
            for size, timed in found.items()
        },
        "masked_share": {size: round(timed.masked_share, 4) for size, timed in found.items()},
        "matmul_gflops": {size: round(timed.matmul_gflops) for size, timed in found.items()},
    }
    return Measured("\n\n".join(_table(size, timed) for size, timed in found.items()), ratios, figures)


if __name__ == "__main__":
    sys.exit(run("model_step", measure))
