"""Whether an answer is what a model writes when it takes the most likely token, from left to right."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.inference.likelihood import LikelihoodConfig, Request, fitted
from pipeline.inference.model import OpenModel
from pipeline.weights import ModelRecord

if TYPE_CHECKING:
    from torch import Tensor


def are_greedy(model: OpenModel, requests: Sequence[Request], config: LikelihoodConfig) -> list[bool]:
    """Of every request in their order.

    An answer is one only if each token is the most likely after those before it, whatever the ones behind: a model of
    masked diffusion is asked with all of these masked, and what follows an answer shown.  A pass for each token.
    Raises UserError as ``score`` does, for guidance, and for a model of blocks.
    """
    check_greedy(config, model.record)
    return [_is_greedy(model, request, config.batch_rows) for request in requests]


def check_greedy(config: LikelihoodConfig, record: ModelRecord) -> None:
    """UserError for what is not built."""
    if config.guidance:
        raise UserError(
            f"is_greedy is true, but guidance is {config.guidance}, with which it isn't built; leave one out"
        )
    if record.objective == "block_nelbo":
        raise UserError("is_greedy is true, but the model is of blocks, for which it isn't built yet; set it to false")


def _is_greedy(model: OpenModel, request: Request, batch_rows: int) -> bool:
    import torch

    row = fitted(model, request)
    tokens, places = torch.tensor(row.tokens), torch.arange(row.start, row.start + row.size)
    with torch.no_grad():
        for some in places.split(len(places) if model.is_autoregressive else batch_rows):
            if not bool((_most_likely(model, tokens, row.before, row.stop, some) == tokens[some]).all()):
                return False
    return True


def _most_likely(model: OpenModel, tokens: "Tensor", before: int, stop: int, places: "Tensor") -> "Tensor":
    """The token that a model takes at each place, given those before it."""
    import torch

    from dlm_core.models.attention import AttentionMask

    if model.is_autoregressive:
        seen = torch.cat([torch.tensor([before]), tokens[:-1]])[None].to(model.device)
        logits = model.denoiser(seen, places.to(model.device), mask=AttentionMask("causal"))
        return logits.argmax(dim=-1).cpu()
    every = torch.arange(len(tokens))
    is_hidden = (every >= places[:, None]) & (every < stop)
    xt = tokens.expand(len(places), -1).masked_fill(is_hidden, model.mask_token_id)
    select = torch.arange(len(places)) * len(tokens) + places - model.record.target_offset
    return model.denoiser(xt.to(model.device), select.to(model.device)).argmax(dim=-1).cpu()
