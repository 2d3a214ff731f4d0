"""Memory of one worker in training, by component and by the moments that can be its peak, before anything is built.

DeepSpeed 0.19.8 with AdamW or Muon on float32 masters.  ``benchmarks/memory.py`` measures how far it is off.  The CLI
uses it, so nothing here imports torch.

Shapes: N parameters, N_w those that a worker holds for its products (experts divided by ep_size), W workers, b bytes of
a number in the precision of the products, B the size of a bucket of gradients.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from dlm_core.models.config import ModelConfig
from pipeline.pretrain.activations import (
    NUM_BYTES,
    Pass,
    Precision,
    head_bytes,
    kept_by_layers,
    kept_outside,
    passed_back,
)

ZeroStage = Literal[0, 1, 2, 3]
Moment = Literal["head", "layers", "reduction", "update"]

REDUCE_BUCKET_NUMEL = 500_000_000
"""Gradients that are reduced at once: ``reduce_bucket_size`` of DeepSpeed, which allocates it whole on a GPU."""
MAX_LIVE_NUMEL = 1_000_000_000
"""Gathered parameters that ZeRO-3 keeps at once: ``stage3_max_live_parameters`` of DeepSpeed."""
_MUON_BATCH_NUMEL = 1 << 26
"""Elements of equal matrices that Muon iterates on together (muon.py)."""


@dataclass(frozen=True)
class Layout:
    """How a training is spread over workers, and what one of them does in a pass."""

    workers: int
    micro_batch_seqs: int
    seq_len: int
    precision: Precision = "bf16"
    zero_stage: ZeroStage = 1
    ep_size: int = 0
    """Workers that share the experts of a layer through AutoEP; 0: every worker holds all experts."""
    grad_accum_steps: int = 1
    block_diffusion: bool = False
    activation_checkpointing: bool = False
    offload_optimizer: bool = False
    muon: bool = False
    ema: bool = False
    on_gpu: bool = True

    def __post_init__(self) -> None:
        for name in ("workers", "micro_batch_seqs", "seq_len", "grad_accum_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3")
        if self.precision not in NUM_BYTES:
            raise ValueError(f'precision is "{self.precision}"; it must be one of {", ".join(NUM_BYTES)}')
        if self.ep_size < 0 or (self.ep_size and self.workers % self.ep_size):
            raise ValueError(f"ep_size is {self.ep_size}; it must divide workers {self.workers}, or be 0")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer is true with zero_stage 0, which keeps its optimizer whole; raise it")


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device of one worker, by component; what lies on its host is apart."""

    parameters: int
    """b N_w; b N / W with ZeRO-3."""
    masters: int
    """4 N / W; 4 N_w without ZeRO.  0 where the parameters are float32 and are what is stepped: ZeRO-0 and ZeRO-3."""
    moments: int
    """8 bytes an element of the masters for AdamW, of those that Muon leaves to it."""
    momentum: int
    """4 bytes an element of the masters that Muon steps: matrices of the layers."""
    ema: int
    """4 bytes an element of the masters."""
    accumulated: int
    """Gradients of earlier passes while another is under way: b N_w up to ZeRO-1, b N / W from ZeRO-2 on."""
    bucket: int
    """Where gradients are laid to be reduced, all through a pass: on a GPU b B, whatever it is filled with."""
    reduction: int
    """As gradients are reduced: these, b N_w up to ZeRO-1 or this worker's b N / W, and a copy, b min(B, N_w).

    On a CPU pages of the bucket count as they are filled, and gloo copies once more where ZeRO-3 scatters."""
    gathered: int
    """ZeRO-3: parameters that are whole at once, b min(10^9, N_w)."""
    update: int
    """While masters are stepped: this worker's gradients, and their copies as one row and in float32."""
    activations: int
    """What autograd keeps (activations.py); with checkpointing the input of each layer."""
    working_layer: int
    """Gradients within the widest layer, and with checkpointing its activations, computed again."""
    head: int
    """Rows, gradients and logits of the head, every position masked; afterwards its own gradient is all that stays."""
    head_gradient: int
    """b V d"""
    exchange: int
    """Tokens on their way to experts of other workers and back, for a router in balance."""
    host_start: int
    """On the host, until the engine has it: the model as it is made, whole and in float32, 4 N."""
    host_optimizer: int
    """On the host: masters, moments, averages and gradients of an optimizer that is offloaded."""
    host_checkpoint: int
    """On the host: the copy of masters and optimizer state that a checkpoint is written from, W-th part of it."""
    checkpoint_bytes: int
    """Of all workers' files together: 4 N for the masters, and as much for each tensor of the optimizer's state."""

    def at(self, moment: Moment) -> dict[str, int]:
        """Components on the device, largest first, as the head is passed back, as the widest layer is, as gradients are
        reduced, or as the masters are stepped.
        """
        in_pass = ("accumulated", "bucket", "gathered", "activations")
        names = {
            "head": (*in_pass, "head"),
            "layers": (*in_pass, "head_gradient", "working_layer", "exchange"),
            "reduction": ("bucket", "gathered", "reduction"),
            "update": ("bucket", "update"),
        }[moment]
        kept = ("parameters", "masters", "moments", "momentum", "ema")
        found = {name: getattr(self, name) for name in (*kept, *names)}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def peak(self) -> dict[str, int]:
        """Components at the moment that needs most, largest first."""
        return max((self.at(moment) for moment in get_args(Moment)), key=lambda parts: sum(parts.values()))

    @property
    def device_bytes(self) -> int:
        """The most that is held at once."""
        return sum(self.peak().values())

    @property
    def host_bytes(self) -> int:
        """The most that is held at once beside the process itself."""
        return max(self.host_start, self.host_optimizer + self.host_checkpoint)


def expert_params(model: ModelConfig) -> int:
    """Parameters of the routed experts: 3 d F E a layer that has them."""
    a = model.architecture
    if a.moe is None:
        return 0
    sparse = sum(a.is_sparse(layer) for layer in range(a.num_layers))
    return sparse * 3 * a.d_model * a.moe.d_ff_expert * a.moe.num_experts


def matrix_params(model: ModelConfig) -> int:
    """Parameters of the layers' attention and networks, which Muon steps: no embedding, head, router, norm or bias."""
    a = model.architecture
    total = expert_params(model)
    for layer in range(a.num_layers):
        total += 2 * a.d_model * (a.num_heads + a.kv_heads) * a.head_size
        if a.moe is not None and a.is_sparse(layer):
            total += 3 * a.d_model * a.moe.num_shared_experts * a.moe.d_ff_expert
        else:
            total += (3 if a.activation == "swiglu" else 2) * a.d_model * (a.d_ff or 0)
    return total


def held_params(model: ModelConfig, ep_size: int) -> int:
    """N_w: parameters of the model that a worker computes with, its share of the experts among them."""
    experts = expert_params(model)
    return model.num_params() - experts + experts // max(1, ep_size)


def rank_memory(model: ModelConfig, layout: Layout) -> RankMemory:
    """Bytes of the worker that holds most; each component's formula stands at its field.

    Raises ValueError for an ep_size that the experts can't be divided by.
    """
    moe = model.architecture.moe
    if layout.ep_size and (moe is None or moe.num_experts % layout.ep_size):
        found = "no experts" if moe is None else f"{moe.num_experts} experts"
        raise ValueError(f"ep_size is {layout.ep_size}, but the model has {found}; take a divisor of their number")
    b, workers, stage = NUM_BYTES[layout.precision], layout.workers, layout.zero_stage
    held = held_params(model, layout.ep_size)
    share = -(-model.num_params() // workers)
    stepped = held if stage == 0 else share
    by_muon = stepped * matrix_params(model) // model.num_params() if layout.muon else 0
    masters = 0 if b == 4 and stage in (0, 3) else 4 * stepped
    checkpoint = model.num_params() * (4 + 8 + 4 * layout.ema) - (4 * matrix_params(model) if layout.muon else 0)
    moments, momentum, ema = 8 * (stepped - by_muon), 4 * by_muon, 4 * stepped * layout.ema
    on_device = 0 if layout.offload_optimizer else 1
    filled = b * min(REDUCE_BUCKET_NUMEL, held)
    room = b * REDUCE_BUCKET_NUMEL if layout.on_gpu else filled if stage == 3 else 0  # untouched pages cost no memory
    part = b * share * on_device
    laid_out = filled if stage >= 2 and not layout.on_gpu else 0
    again = layout.grad_accum_steps > 1
    return RankMemory(
        parameters=b * (share if stage == 3 else held),
        masters=masters * on_device,
        moments=moments * on_device,
        momentum=momentum * on_device,
        ema=ema * on_device,
        accumulated=b * held * again if stage < 2 else part * (again or stage == 3),
        bucket=room if stage else 0,
        reduction=filled + (b * held if stage < 2 else part * (again or stage == 3) + laid_out),
        gathered=b * min(MAX_LIVE_NUMEL, held) if stage == 3 else 0,
        update=_update_bytes(model, layout, held, share),
        exchange=_exchange_bytes(model, layout),
        host_start=4 * model.num_params(),
        host_optimizer=(masters + moments + momentum + ema + 4 * share) * (1 - on_device),
        host_checkpoint=-(-checkpoint // workers),
        checkpoint_bytes=checkpoint,
        **_pass_bytes(model, layout),
    )


def _update_bytes(model: ModelConfig, layout: Layout, held: int, share: int) -> int:
    b = NUM_BYTES[layout.precision]
    in_float32 = 0 if b == 4 else 4
    if layout.zero_stage == 0:
        return (b + in_float32) * held
    if layout.offload_optimizer:
        return 0
    return (b + b + in_float32) * share + (_muon_bytes(model, share) if layout.muon else 0)


def _muon_bytes(model: ModelConfig, share: int) -> int:
    """4 * (3 M / W + (2 + 2 r) B):  updates, as received and whole; B elements of equal matrices that are iterated on
    together, of r times as many rows as columns, with their products.
    """
    a = model.architecture
    widest = largest_matrix(model) // a.d_model
    ratio = min(widest, a.d_model) / max(widest, a.d_model)
    stepped = share * matrix_params(model) // model.num_params()
    networks = 2 if a.activation == "swiglu" else 1
    equal = 2 * expert_params(model) // 3 or networks * a.num_layers * largest_matrix(model)
    batch = max(largest_matrix(model), min(_MUON_BATCH_NUMEL, equal * share // model.num_params()))
    return 4 * (3 * stepped + round((2 + 2 * ratio) * batch))


def largest_matrix(model: ModelConfig) -> int:
    """Elements of the largest matrix that Muon makes orthogonal: queries, gate and each expert by themselves."""
    a = model.architecture
    widths = [a.num_heads * a.head_size, a.d_ff or 0]
    widths += [a.moe.d_ff_expert * max(1, a.moe.num_shared_experts)] if a.moe is not None else []
    return a.d_model * max(widths)


def _pass_of(layout: Layout) -> Pass:
    return Pass(
        layout.micro_batch_seqs,
        layout.seq_len,
        layout.precision,
        layout.block_diffusion,
        layout.ep_size,
        layout.on_gpu,
    )


def _pass_bytes(model: ModelConfig, layout: Layout) -> dict[str, int]:
    a, p = model.architecture, _pass_of(layout)
    by_layer, inputs = kept_by_layers(a, p), a.num_layers * p.positions * a.d_model * NUM_BYTES[p.precision]
    is_checkpointed = layout.activation_checkpointing
    return {
        "activations": kept_outside(model, p) + (inputs if is_checkpointed else sum(by_layer)),
        "working_layer": passed_back(a, p) + (max(by_layer) if is_checkpointed else 0),
        "head": head_bytes(model, p),
        "head_gradient": NUM_BYTES[p.precision] * model.vocab_size * a.d_model,
    }


def _exchange_bytes(model: ModelConfig, layout: Layout) -> int:
    """2 d k b a position: the tokens of its pairs as sent and as received."""
    moe, p = model.architecture.moe, _pass_of(layout)
    if moe is None or not layout.ep_size:
        return 0
    return 2 * p.positions * moe.top_k * model.architecture.d_model * NUM_BYTES[p.precision]
