"""Greedy sampling of one token a step, several steps in one pass: a draft by the model itself, verified by it.

Self-speculative decoding (SSD, arXiv 2510.04147).
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from dlm_core.samplers.loop import Ask, Canvas, Rule, open_places
from dlm_core.samplers.proposal import Drawn, Score


@dataclass(frozen=True)
class SelfSpeculative(Rule):
    """What ``Confident`` with one token a step writes at temperature 0, exactly, in fewer passes of more rows.

    From the predictions in a state, its surest positions give a chain of further states, each with one token more.  The
    next pass has them all, as rows; as long as the model's own choice in a state is the next state of the chain it is
    followed.  The predictions where it is left are at hand, and begin the next chain.  ``num_states`` a pass: each
    counts as a forward pass of the row.  One look at the device a pass.  SSD (arXiv 2510.04147).  Raises ValueError for
    less than one state.
    """

    adds_rows: ClassVar[bool] = True

    num_states: int = 4
    score: Score = "probability"

    def __post_init__(self) -> None:
        if self.num_states < 1:
            raise ValueError(f"num_states is {self.num_states}; it must be at least 1")

    def turns(self, canvas: Canvas) -> Generator[Ask, Drawn, None]:
        """The first pass has the rows as they are, each later one a chain of states of each."""
        num_rows, seq_len = canvas.xt.shape
        width = int(canvas.is_open.sum(dim=1).max()) if num_rows else 0
        states, rows = canvas.xt[:, None], torch.arange(num_rows, device=canvas.device)
        while width:
            num = states.shape[1]
            flat = states.reshape(-1, seq_len)
            places, is_asked = open_places(flat == canvas.mask_token_id, width)
            select = (torch.arange(len(flat), device=canvas.device)[:, None] * seq_len + places).flatten()
            drawn = yield Ask(
                select, flat, rows.repeat_interleave(num), 0, score=self.score, is_greedy=True, is_busy=is_asked[:, 0]
            )
            score = drawn.score.view(places.shape).masked_fill(~is_asked, -torch.inf)
            order = score.argsort(dim=1, descending=True, stable=True)[:, : self.num_states]
            tokens = torch.where(is_asked, drawn.x0.view(places.shape), flat.gather(1, places))
            chain = _chains(flat, places.gather(1, order), tokens.gather(1, order), self.num_states)
            chain = chain.view(num_rows, num, self.num_states, seq_len)
            # the first state of each row's chain is right, and each next one while the one before chose it
            agrees = (chain[:, :-1, 0] == states[:, 1:]).all(dim=2).cumprod(dim=1).sum(dim=1)
            states = chain[rows, agrees]
            canvas.xt.copy_(states[:, 0])
            width = int((canvas.xt == canvas.mask_token_id).sum(dim=1).max())


def _chains(
    states: Int[Tensor, "S L"], places: Int[Tensor, "S W"], tokens: Int[Tensor, "S W"], num_states: int
) -> Int[Tensor, "S K L"]:
    """Each state with its first 1, 2, ..., K tokens written; where there are fewer, the last again."""
    chain: list[Tensor] = []
    for k in range(num_states):
        if k < places.shape[1]:
            states = states.scatter(1, places[:, k : k + 1], tokens[:, k : k + 1])
        chain.append(states)
    return torch.stack(chain, dim=1)
