"""Greedy sampling of one token a step, several steps in one pass: a draft by the model itself, verified by it.

Self-speculative decoding (SSD, arXiv 2510.04147).
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from dlm_core.samplers.loop import Ask, Canvas, Rule, by_score, open_places, put, within
from dlm_core.samplers.proposal import Drawn, Score, check_score


@dataclass(frozen=True)
class SelfSpeculative(Rule):
    """What ``Confident`` with one token a step writes at temperature 0, exactly, in fewer passes of more rows.

    From the predictions in a state, its surest positions give a chain of further states, each with one token more.  The
    next pass has them all, as rows; as long as the model's own choice in a state is the next state of the chain it is
    followed.  The predictions where it is left are at hand, and begin the next chain.  ``num_states`` a pass: each
    counts as a forward pass of the row.  One look at the device a pass.  SSD (arXiv 2510.04147).  Raises ValueError for
    less than one state, and for an unknown score.
    """

    adds_rows: ClassVar[bool] = True

    num_states: int = 4
    score: Score = "probability"

    def __post_init__(self) -> None:
        check_score(self.score)
        if self.num_states < 1:
            raise ValueError(f"num_states is {self.num_states}; it must be at least 1")

    def turns(self, canvas: Canvas) -> Generator[Ask, Drawn, None]:
        """The first pass has the rows as they are, each later one a chain of states of each."""
        num_rows, seq_len = canvas.xt.shape
        states, is_open = canvas.xt[:, None], canvas.is_open.to(canvas.device)[:, None]
        left = canvas.is_open.sum(dim=1)
        while left.any():
            num, flat, opened = states.shape[1], states.flatten(0, 1), is_open.flatten(0, 1)
            asked = left.nonzero().squeeze(1).to(canvas.device)
            places = open_places(opened, int(left.sum()))
            drawn = yield Ask(
                within(places, asked, flat), flat[asked], asked // num, 0, None, score=self.score, is_greedy=True
            )
            _, order = by_score(flat.shape, places, drawn.score)
            order, tokens = order[:, : self.num_states], put(flat, places, drawn.x0)
            shape = num_rows, num, order.shape[1], seq_len
            chain = _chains(flat, order, tokens.gather(1, order)).view(shape)
            chain_is_open = _chains(opened, order, torch.zeros_like(order, dtype=torch.bool)).view(shape)
            # the first state of each row's chain is right, and each next one while the one before chose it
            agrees = (chain[:, :-1, 0] == states[:, 1:]).all(dim=2).cumprod(dim=1).sum(dim=1)
            states, is_open = chain[canvas.rows, agrees], chain_is_open[canvas.rows, agrees]
            canvas.xt.copy_(states[:, 0])
            left = is_open.sum(dim=2).flatten().cpu()


def _chains(
    states: Shaped[Tensor, "S L"], order: Int[Tensor, "S K"], values: Shaped[Tensor, "S K"]
) -> Shaped[Tensor, "S K L"]:
    """Each state with its first 1, 2, ..., K values written; what is not open gets what it has."""
    chain: list[Tensor] = []
    for k in range(order.shape[1]):
        states = states.scatter(1, order[:, k : k + 1], values[:, k : k + 1])
        chain.append(states)
    return torch.stack(chain, dim=1)
