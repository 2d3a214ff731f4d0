"""Generation with a diffusion model: begin with masks, and replace those that the model is surest of, step by step.

Shapes: B rows, P tokens of the prompt, N new tokens, L = P + N, M masks, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ORDERS = ("confidence", "entropy")


class DiffusionGenerationMixin:
    """``generate`` of a diffusion model.  It takes the place of transformers' own, which is causal."""

    order = "confidence"
    """Which masks go first: those with the likeliest token (LLaDA, arXiv 2502.09992), or those whose distribution has
    the least entropy (Dream, 2508.15487)."""
    predicts_next = False
    """Whether the output of position i - 1 says token i, as in Dream."""
    is_block_causal = False
    """Whether a block sees itself and the blocks before it alone, as in LLaDA2 (2512.15745)."""

    @classmethod
    def can_generate(cls) -> bool:
        """So that transformers reads generation_config.json."""
        return True

    @torch.no_grad()
    def diffusion_generate(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        steps: int | None = None,
        block_length: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        threshold: float | None = None,
        order: str | None = None,
        seed: int | None = None,
        mask_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> Tensor:
        """The prompt [B, P], untouched, and ``max_new_tokens`` tokens behind it, [B, L].

        Blocks of ``block_length`` tokens are filled one after the other: by default the answer is one block, or as many
        as the model was trained with if it is block-causal, whose blocks are counted from the first token of a row.
        ``steps`` is how many times the model runs at most, in equal parts a block; by default once a token.  A step
        replaces its share of the masks, and all those whose token is likelier than ``threshold``.  ``temperature`` 0
        takes the likeliest token; ``top_p`` draws among the likeliest that have this probability together.  ``seed``
        makes draws repeatable, else they are torch's.  Rows of unequal length are padded on the left and have an
        ``attention_mask`` [B, P].  Token ids are those of generation_config.json or config.json by default; behind an
        end of text there is padding alone, and once all rows have ended the rest is not computed.

        Raises ValueError for a setting out of range, and for a model without a mask token.
        """
        mask_id, ends, pad_id = _special_ids(self, mask_token_id, eos_token_id, pad_token_id)
        by: str = self.order if order is None else order
        size: int = self.config.block_size if self.is_block_causal else max_new_tokens
        size = size if block_length is None else block_length
        _check(input_ids, attention_mask, max_new_tokens, size, temperature, top_p, threshold, by)
        device = input_ids.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)

        x = F.pad(input_ids, (0, max_new_tokens), value=mask_id)
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_token = F.pad(is_token.bool(), (0, max_new_tokens), value=True)
        if self.predicts_next and not is_token[:, : input_ids.shape[1]].any(1).all():
            raise ValueError("a row of input_ids has no token, but this model predicts the next one; begin with one")
        positions = (is_token.long().cumsum(1) - 1).clamp(min=0)
        place = torch.arange(x.shape[1], device=device).expand_as(x) - input_ids.shape[1]
        is_answer = place >= 0
        block = (positions if self.is_block_causal else place) // size
        pairs = _block_pairs(block, is_token) if self.is_block_causal else is_token
        is_masked = is_answer.clone()

        numbers = block[is_masked].unique().tolist()
        for number, num_steps in zip(numbers, _shares(steps, len(numbers)), strict=True):
            here = (block == number) & is_answer
            count = here.sum(1, keepdim=True)
            end = int(here.any(0).nonzero().max()) + 1 if self.is_block_causal else x.shape[1]
            num_steps = int(count.max()) if num_steps is None else num_steps
            for step in range(num_steps):
                active = here & is_masked
                if not active.any():
                    break
                logits = self(
                    input_ids=x[:, :end],
                    attention_mask=pairs[..., :end, :end] if self.is_block_causal else pairs,
                    position_ids=positions[:, :end],
                ).logits
                if self.predicts_next:
                    logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
                logits = logits[active[:, :end]].float()
                logits[:, mask_id] = -torch.inf
                tokens, sureness, prob = _draw(logits, temperature, top_p, by, generator)
                quota = count // num_steps + (step < count % num_steps)
                chosen = active & (_rank(sureness, active) < quota)
                if threshold is not None:
                    chosen |= torch.zeros_like(active).masked_scatter(active, prob > threshold)
                x = torch.where(chosen, x.masked_scatter(active, tokens.to(x.dtype)), x)
                is_masked &= ~chosen
            if _ended(x, is_answer, ends).any(1).all():
                break
        return x.masked_fill(F.pad(_ended(x, is_answer, ends)[:, :-1], (1, 0)), pad_id)

    generate = diffusion_generate


def _special_ids(model: Any, mask: int | None, ends: Any, pad: int | None) -> tuple[int, list[int], int]:
    """Ids of the mask, of the ends of text and of padding: as given, or of the generation config, or of the config."""
    found: dict[str, Any] = {}
    for name, given in (("mask_token_id", mask), ("eos_token_id", ends), ("pad_token_id", pad)):
        sources = (getattr(config, name, None) for config in (model.generation_config, model.config))
        found[name] = given if given is not None else next((value for value in sources if value is not None), None)
    mask, ends, pad = found.values()
    if mask is None:
        raise ValueError("the model's configuration has no mask_token_id; give mask_token_id")
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return mask, ends, (ends[0] if ends else mask) if pad is None else pad


def _check(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    block_length: int,
    temperature: float,
    top_p: float | None,
    threshold: float | None,
    order: str,
) -> None:
    """ValueError for what can't be generated with."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids are {list(input_ids.shape)}; wanted [B, P]")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}; wanted {list(input_ids.shape)}")
    if attention_mask is not None and (attention_mask.bool().diff(dim=1) & attention_mask[:, :-1].bool()).any():
        raise ValueError("attention_mask has padding behind tokens; pad on the left")
    for name, value in (("max_new_tokens", max_new_tokens), ("block_length", block_length)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be 0 or more, and finite")
    for name, value in (("top_p", top_p), ("threshold", threshold)):
        if value is not None and not 0.0 < value <= 1.0:
            raise ValueError(f"{name} is {value}; it must lie in (0, 1]")
    if top_p is not None and temperature == 0.0:
        raise ValueError(f"top_p is {top_p}, which temperature 0 ignores; give a temperature, or leave it out")
    if order not in ORDERS:
        raise ValueError(f'order is "{order}"; it must be one of {", ".join(ORDERS)}')


def _block_pairs(block: Tensor, is_token: Tensor) -> Tensor:
    """Who may attend to whom, [B, 1, L, L]: a block to itself and those before it, and padding to itself."""
    pairs = (block[:, :, None] >= block[:, None, :]) & is_token[:, None, :]
    return (pairs | torch.eye(block.shape[1], dtype=torch.bool, device=block.device))[:, None]


def _shares(steps: int | None, num_blocks: int) -> list[int | None]:
    """Steps of each block; ValueError for fewer than one."""
    if steps is None:
        return [None] * num_blocks
    if steps < num_blocks:
        raise ValueError(f"steps is {steps}; the answer has {num_blocks} block(s), and each needs a step")
    return [steps // num_blocks + (number < steps % num_blocks) for number in range(num_blocks)]


def _draw(
    logits: Tensor, temperature: float, top_p: float | None, order: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A token for each mask [M, V], how sure the model is of the place, and the token's probability, all [M].

    Sureness and probability are of the model's own distribution, whatever temperature and top_p make of it.
    """
    own = logits.softmax(dim=-1)
    if temperature == 0.0:
        tokens = logits.argmax(dim=-1)
    else:
        probs = (logits.double() / temperature).softmax(dim=-1)
        if top_p is not None:
            ranked, ids = probs.sort(dim=-1, descending=True)
            ranked = ranked.masked_fill(ranked.cumsum(dim=-1) - ranked >= top_p, 0.0)
            probs = torch.zeros_like(probs).scatter(1, ids, ranked)
        tokens = torch.multinomial(probs, 1, generator=generator).squeeze(1)
    prob = own.gather(1, tokens[:, None]).squeeze(1)
    return tokens, prob if order == "confidence" else -torch.special.entr(own).sum(dim=-1), prob


def _rank(sureness: Tensor, active: Tensor) -> Tensor:
    """Place of each active position [B, L] in its row's order, the surest first."""
    scores = torch.full(active.shape, -torch.inf, device=active.device).masked_scatter(active, sureness)
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _ended(x: Tensor, is_answer: Tensor, ends: list[int]) -> Tensor:
    """Whether an end of text stands at a position of the answer or before it, [B, L]."""
    return (torch.isin(x, torch.tensor(ends, dtype=x.dtype, device=x.device)) & is_answer).cumsum(1) > 0
