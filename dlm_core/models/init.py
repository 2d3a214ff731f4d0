"""Initial weights as the papers draw them, and the loss that a model begins with.

What lives here: standard deviations by the role of a parameter.  What must not: the model, checkpoints.
"""

import math

import torch
from torch import Tensor, nn

from dlm_core.models.config import Architecture, ModelConfig

_WRITES = ("attention.out.weight", "feed_forward.down.weight", "experts.down_proj", "shared_experts.down.weight")
_CUTOFF = 3.0
"""Standard deviations beyond which "mitchell" draws again."""


def init_weights(model: nn.Module, a: Architecture, init_seed: int) -> None:
    """Draw every parameter, in the order of their names in the model, on the CPU, from init_seed alone.

    The selection biases of routers, buffers all, become 0.

    ``writes`` are the matrices that write into the residual stream: of attention, and the down projections.  Norms are
    1, modulations 0 (adaLN-zero), biases 0 but in "mdlm".

    ::

        normal         N(0, init_std^2)                                     Qwen, LLaDA-MoE (arXiv 2509.24389)
        scaled_normal  the same, writes divided by sqrt(2 num_layers)       GPT-2
        small          N(0, 2 / (5 d_model)),                               SMDM (arXiv 2410.18514)
                       writes N(0, 1 / (d_model num_layers^2))
        mitchell       N(0, 1 / d_model) cut off at 3 standard deviations,  LLaDA (arXiv 2502.09992), from OLMo
                       writes N(0, 1 / (2 fan_in (layer + 1)))
        mdlm           uniform within 1 / sqrt(fan_in), the head 0          MDLM (arXiv 2406.07524)
    """
    generator = torch.Generator().manual_seed(init_seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            matrix = parameters.get(name.removesuffix("bias") + "weight", parameter)
            parameter.copy_(_drawn(name, parameter.shape, matrix.shape[-1], a, generator))
        for buffer in model.buffers():
            buffer.zero_()


def _drawn(name: str, shape: torch.Size, fan_in: int, a: Architecture, generator: torch.Generator) -> Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if "modulation" in name:
        return torch.zeros(shape)
    if a.init == "mdlm":
        uniform = 2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1
        return torch.zeros(shape) if name.startswith("head.") else uniform / math.sqrt(fan_in)
    if name.endswith("bias"):
        return torch.zeros(shape)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
    while a.init == "mitchell" and (outside := drawn.abs() > _CUTOFF).any():
        drawn[outside] = torch.randn(int(outside.sum()), generator=generator, dtype=torch.float32)
    return drawn * _std(name, fan_in, a)


def _std(name: str, fan_in: int, a: Architecture) -> float:
    writes = name.endswith(_WRITES)
    if a.init == "small":
        return 1 / (math.sqrt(a.d_model) * a.num_layers) if writes else math.sqrt(2 / (5 * a.d_model))
    if a.init == "mitchell":
        layer = int(name.split(".")[1]) if writes else 0
        return 1 / math.sqrt(2 * fan_in * (layer + 1)) if writes else 1 / math.sqrt(a.d_model)
    assert a.init_std is not None
    return a.init_std / math.sqrt(2 * a.num_layers) if writes and a.init == "scaled_normal" else a.init_std


def expected_initial_loss(config: ModelConfig) -> float:
    """Cross-entropy of a masked token before training, nats:  log(vocab_size - 1) + d_model * head_std^2 / 2.

    Normalised hidden states of mean square 1 give logits of variance d_model * head_std^2 that know nothing of the
    target; the mean of log sum exp of many such is log(their number) + half the variance, by Jensen's inequality at
    most.  Exact where the head is 0.
    """
    a = config.architecture
    head_std = 0.0 if a.init == "mdlm" else _std("head.weight", a.d_model, a)
    return math.log(config.vocab_size - 1) + a.d_model * head_std**2 / 2
