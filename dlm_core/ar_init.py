"""From an autoregressive model to a diffusion model: the shift, the annealing of attention, block sizes, mask noise.

What lives here: pure functions of steps and tensors.  What must not: checkpoints and their names, the masks themselves
(masks.py).
"""

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.cross_entropy import Denoise
from dlm_core.noise import Stream, hash_normal, hash_words


def shift_right(logits: Float[Tensor, "B L V"]) -> Float[Tensor, "B L V"]:
    """Inference side of target_offset 1: the prediction for position l is what the model computed at l - 1.

    Position 0 keeps its own, which no training has touched: it must be given (Dream, arXiv 2508.15487).
    """
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def shift_left(logits: Float[Tensor, "B L V"]) -> Float[Tensor, "B L V"]:
    """The inverse of ``shift_right`` on all but the last position, which is repeated."""
    return torch.cat([logits[:, 1:], logits[:, -1:]], dim=1)


def shifted(denoise: Denoise) -> Denoise:
    """A denoiser of target_offset 1 as one of offset 0, for samplers and estimators: token l is asked for at l - 1.

    Dream (arXiv 2508.15487).  The result raises ValueError when asked for position 0, which nothing predicts; on a
    device it is the device that stops, since the host does not wait to look.
    """
    message = "position 0 of a row is asked for, which a shifted model can't predict; give it"

    def ask(xt: Tensor, select: Tensor) -> Tensor:
        is_first = (select % xt.shape[1] == 0).any()
        if select.device.type == "cpu":
            if is_first:
                raise ValueError(message)
        else:
            torch.ops.aten._assert_async.msg(~is_first, message)
        return denoise(xt, select - 1)

    return ask


def anneal_ratio(step: int, num_anneal_steps: int) -> float:
    """Share of the future that attention may see at a step:  min(1, (step + 1) / num_anneal_steps).

    DiffuLLaMA (arXiv 2410.17891), 10,000 steps there; 0 steps make attention full at once, as Dream does.
    Raises ValueError for a negative number.
    """
    if step < 0 or num_anneal_steps < 0:
        raise ValueError(f"step is {step} and num_anneal_steps {num_anneal_steps}; neither may be negative")
    return 1.0 if num_anneal_steps == 0 else min(1.0, (step + 1) / num_anneal_steps)


@dataclass(frozen=True)
class BlockSizeSchedule:
    """Block size as a function of the step: phases (block_size, num_steps) in order; the last one never ends.

    LLaDA2.0 (arXiv 2512.15745): warm-up 1, 4, 32, 64, 4096, stable at the whole sequence (masked diffusion),
    then decay to the block size of inference.  Raises ValueError for no phase, or a size or length below 1.
    """

    phases: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("a block-size schedule needs at least one phase; phases is empty")
        for number, (block_size, num_steps) in enumerate(self.phases):
            if block_size < 1 or num_steps < 1:
                raise ValueError(
                    f"phase {number} is {num_steps} steps at block_size {block_size}; both must be at least 1"
                )

    @classmethod
    def warmup_stable_decay(
        cls,
        warmup: tuple[int, ...],
        decay: tuple[int, ...],
        *,
        seq_len: int,
        num_stage_steps: int,
        num_stable_steps: int,
    ) -> "BlockSizeSchedule":
        """Growing ``warmup`` sizes, ``num_stage_steps`` each, then seq_len, then shrinking ``decay`` sizes likewise.

        No warm-up and one decay size is BD3-LM's recipe (arXiv 2503.09573): whole sequences, then the target.

        Raises ValueError unless the sizes grow below seq_len, then shrink below it, and each divides seq_len.
        """
        grows = all(a < b for a, b in itertools.pairwise((*warmup, seq_len)))
        shrinks = all(a > b for a, b in itertools.pairwise((seq_len, *decay)))
        if not grows or not shrinks:
            raise ValueError(f"block sizes {warmup} must grow to {seq_len}, and {decay} must shrink from it")
        for size in (*warmup, *decay):
            if size < 1 or seq_len % size:
                raise ValueError(f"block_size is {size}; it must divide the row of {seq_len} tokens")
        rising, falling = ([(size, num_stage_steps) for size in sizes] for sizes in (warmup, decay))
        return cls((*rising, (seq_len, num_stable_steps), *falling))

    def block_size_at(self, step: int) -> int:
        """Block size of a step, counted from 0.  Raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step is {step}; it must not be negative")
        end = 0
        for block_size, num_steps in self.phases:
            end += num_steps
            if step < end:
                return block_size
        return self.phases[-1][0]


def add_mask_noise(
    embeddings: Float[Tensor, "B L D"],
    is_masked: Bool[Tensor, "B L"],
    sample_ids: Int[Tensor, " B"],
    *,
    std: float,
    noise_seed: int,
    step: int,
) -> Float[Tensor, "B L D"]:
    """Add N(0, std^2) to the embedding of every masked position, drawn anew a step, sample, position and channel.

    LLaDA2.0 (arXiv 2512.15745) section 7.1: an autoregressive checkpoint never saw the mask, whose embedding has
    decayed to almost zero; noise in the first steps keeps the gradient from exploding.  Neither std nor the number of
    steps is published.  Raises ValueError unless 0 <= std < inf.
    """
    if not 0.0 <= std < math.inf:
        raise ValueError(f"std is {std}; it must be 0 or more, and finite")
    if std == 0.0:
        return embeddings
    row, place = is_masked.to(embeddings.device).nonzero(as_tuple=True)
    address = hash_words(noise_seed, Stream.EMBEDDING, step, sample_ids.to(embeddings.device)[row], place)
    noise = std * hash_normal(address[:, None], torch.arange(embeddings.shape[2], device=embeddings.device))
    return embeddings.index_put((row, place), noise.to(embeddings.dtype), accumulate=True)


def mask_noise_std(step: int, std: float, num_steps: int) -> float:
    """Linear fade-out of the mask noise:  std * max(0, 1 - step / num_steps).

    Raises ValueError for a negative number, an infinite std, or no step to fade over while std is above 0.
    """
    if step < 0 or num_steps < 0 or not 0.0 <= std < math.inf or (std > 0.0 and num_steps == 0):
        raise ValueError(
            f"step {step}, std {std}, num_steps {num_steps}: all must be 0 or more and finite, and std needs a step"
        )
    return std * max(0.0, 1.0 - step / num_steps) if std > 0.0 else 0.0
