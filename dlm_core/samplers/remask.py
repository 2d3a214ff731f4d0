"""Samplers that take tokens back: ReMDM and path planning.

A token that was drawn early, with little to go by, gets another chance.  More steps than tokens are then of use.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.noise import Stream
from dlm_core.samplers.loop import Ask, Canvas, Rule, by_score, first_of, sent_together
from dlm_core.samplers.proposal import Drawn
from dlm_core.samplers.quotas import ScheduleQuotas

Remasking = Literal["cap", "rescale", "confidence", "loop"]
_OF_LOOP = {"t_on": 0.55, "t_off": 0.05, "alpha_loop": 0.9}


@dataclass(frozen=True)
class ReMDM(Rule):
    """From t to s a token is masked again with probability sigma, and masks are revealed so much more often.

    arXiv 2503.00307, eq. 5: a mask is revealed with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t).  Any sigma of at
    most (1 - alpha_s) / alpha_t that masks and tokens share keeps the marginals of masked diffusion, so any trained
    model will do.  alpha_t is 1 - t but for "loop".

    ::

        cap         sigma = min(eta, (1 - alpha_s) / alpha_t)
        rescale     sigma = eta min(1, (1 - alpha_s) / alpha_t)
        confidence  sigma of "rescale", spread over the tokens of a row by softmax(-p), p theirs when they were drawn
        loop        alpha rises to ``alpha_loop`` until t = t_on, stays until t_off while sigma is eta, rises to 1

    "confidence" keeps no marginals: masks are revealed as if sigma were 0 while tokens are taken back, so that more is
    masked than 1 - alpha_t, at eta 1 by up to 0.2.

    With eta 0 it is ``Ancestral``, token for token under the same noise: "loop" that of its own alpha, which reveals
    nothing from t_on to t_off.  A row makes a pass for each step that reveals something in it.  Reveals and remaskings
    are known before the first pass but for "confidence", which waits for the device in each pass.  Raises ValueError
    for values out of range, and for those of "loop" elsewhere.
    """

    changes_between: ClassVar[bool] = True

    num_steps: int
    eta: float
    kind: Remasking = "cap"
    t_on: float = _OF_LOOP["t_on"]
    t_off: float = _OF_LOOP["t_off"]
    alpha_loop: float = _OF_LOOP["alpha_loop"]

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta is {self.eta}; it must lie in [0, 1]")
        if self.kind not in get_args(Remasking):
            raise ValueError(f'kind is "{self.kind}"; it must be one of {", ".join(get_args(Remasking))}')
        idle = [name for name, default in _OF_LOOP.items() if getattr(self, name) != default]
        if idle and self.kind != "loop":
            raise ValueError(f'{idle[0]} is {getattr(self, idle[0])}, which kind "{self.kind}" has no use for')
        if not 0.0 < self.t_off < self.t_on < 1.0:
            raise ValueError(f"t_off is {self.t_off} and t_on {self.t_on}; wanted 0 < t_off < t_on < 1")
        if not 0.0 < self.alpha_loop < 1.0:
            raise ValueError(f"alpha_loop is {self.alpha_loop}; it must lie in (0, 1)")

    def rates(self) -> tuple[Float[Tensor, " T1"], Float[Tensor, " T"]]:
        """alpha at the ends of the steps, and sigma of each step."""
        t = torch.linspace(1.0, 0.0, self.num_steps + 1, dtype=torch.float64)
        if self.kind != "loop":
            alpha = 1.0 - t
            most = _most(alpha)
            return alpha, most.clamp(max=self.eta) if self.kind == "cap" else self.eta * most
        rising = (1.0 - t) * self.alpha_loop / (1.0 - self.t_on)
        ending = 1.0 - t * (1.0 - self.alpha_loop) / self.t_off
        alpha = torch.where(t > self.t_on, rising, torch.where(t > self.t_off, self.alpha_loop, ending))
        most = _most(alpha)
        is_looping = (t[:-1] <= self.t_on) & (t[:-1] > self.t_off)
        return alpha, torch.where(is_looping, most.clamp(max=self.eta), 0.0)

    def turns(self, canvas: Canvas) -> Generator[Ask, Drawn, None]:
        """One pass for each step that reveals something."""
        process = self._process(canvas)
        if self.kind != "confidence":
            for step in _sent(list(process), canvas.device):
                yield from self._make(canvas, step)
            return
        step = next(process, None)
        while step is not None:
            score = yield from self._make(canvas, _sent([step], canvas.device)[0])
            try:
                step = process.send(score.cpu())
            except StopIteration:
                step = None

    def _process(self, canvas: Canvas) -> Generator["_Step", Float[Tensor, " M"], None]:
        """What each step reveals and takes back, of what was there before it; told the scores of what was drawn.

        A mask stays while u is below the probability that it has stayed so long; each stay has a u of its own.
        """
        alphas, sigmas = self.rates()
        is_masked = canvas.is_open.clone()
        stayed = torch.ones(is_masked.shape, dtype=torch.float64)
        visit = torch.zeros_like(is_masked, dtype=torch.int64)
        sureness = torch.full_like(stayed, torch.inf)
        u = canvas.uniforms(Stream.REVEAL, visit)
        for turn, (alpha_t, alpha_s, sigma) in enumerate(zip(alphas[:-1], alphas[1:], sigmas, strict=True)):
            of_token = self._by_token(sigma, sureness, canvas.is_open & ~is_masked)
            own = sigma if self.kind != "confidence" else torch.zeros_like(sigma)
            stayed = stayed * (1.0 - (alpha_s - (1.0 - own) * alpha_t) / (1.0 - alpha_t))
            is_revealed = is_masked & (stayed <= u)
            is_remasked = canvas.is_open & ~is_masked & (canvas.uniforms(Stream.REMASK, turn) < of_token)
            revealed, remasked = (where.flatten().nonzero().squeeze(1) for where in (is_revealed, is_remasked))
            if len(revealed) or len(remasked):
                rows = is_revealed.any(dim=1).nonzero().squeeze(1)
                score = yield _Step(turn, 1.0 - float(alpha_t), revealed, rows, visit.flatten()[revealed], remasked)
                if self.kind == "confidence":
                    sureness[is_revealed] = score
            if len(remasked):
                visit = visit + is_remasked
                stayed = torch.where(is_remasked, 1.0, stayed)
                u = canvas.uniforms(Stream.REVEAL, visit)
            is_masked = (is_masked & ~is_revealed) | is_remasked

    def _make(self, canvas: Canvas, step: "_Step") -> Generator[Ask, Drawn, Float[Tensor, " M"]]:
        score = torch.empty(0, dtype=torch.float64)
        if len(step.revealed):
            t = torch.full((len(step.rows),), step.t, dtype=torch.float64, device=canvas.device)
            ask = canvas.ask(step.revealed, step.rows, 0, step.turn, t)
            drawn = yield ask._replace(step=step.visit, score="probability" if self.kind == "confidence" else None)
            canvas.write(step.revealed, drawn.x0)
            score = drawn.score
        canvas.write(step.remasked, torch.full_like(step.remasked, canvas.mask_token_id))
        return score

    def _by_token(
        self, sigma: Float[Tensor, ""], sureness: Float[Tensor, "B L"], is_token: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L"]:
        if self.kind != "confidence":
            return sigma.expand(sureness.shape)
        doubt = torch.where(is_token, -sureness, -torch.inf)
        return sigma * doubt.softmax(dim=1).nan_to_num(0.0)  # a row without tokens has none to take back


class _Step(NamedTuple):
    turn: int
    t: float
    revealed: Int[Tensor, " M"]
    """Flat positions in the batch."""
    rows: Int[Tensor, " R"]
    """In which they lie."""
    visit: Int[Tensor, " M"]
    """How often each was masked again: its draws are addressed by it."""
    remasked: Int[Tensor, " n"]


def _sent(steps: list[_Step], device: torch.device) -> list[_Step]:
    """The same on the device, for four waits."""
    columns = zip(*((step.revealed, step.rows, step.visit, step.remasked) for step in steps), strict=True)
    sent = zip(*(sent_together(column, device) for column in columns), strict=True)
    return [_Step(step.turn, step.t, *parts) for step, parts in zip(steps, sent, strict=True)]


def _most(alpha: Float[Tensor, " T1"]) -> Float[Tensor, " T"]:
    """The largest sigma of each step; where alpha_t is 0 there is nothing to take back."""
    return torch.where(alpha[:-1] > 0.0, (1.0 - alpha[1:]) / alpha[:-1], 1.0).clamp(max=1.0)


@dataclass(frozen=True)
class PathPlanning(Rule):
    """Each step draws for all masks and keeps the best of the row: all but the (1 - k/T) n lowest scores after step k.

    P2 (arXiv 2502.03540), with the denoiser as its own planner.  The score is log p of the drawn token at a mask, and
    ``eta`` log p of what stands there at a token: eta 1 treats them alike, more takes back more, and at 0 no token is
    taken back: then it is ``Confident`` with linear ``ScheduleQuotas``.  T passes of each row with a mask.  Raises
    ValueError for values out of range.
    """

    num_steps: int
    eta: float = 1.0
    is_tempered: bool = False

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1")
        if not 0.0 <= self.eta < math.inf:
            raise ValueError(f"eta is {self.eta}; it must be 0 or more, and finite")

    def turns(self, canvas: Canvas) -> Generator[Ask, Drawn, None]:
        """Every position that was to be filled is asked for in every step."""
        num = canvas.is_open.sum(dim=1)
        kept = ScheduleQuotas(self.num_steps, "linear").split(num).cumsum(dim=1).to(canvas.device)
        places = canvas.is_open.flatten().nonzero().squeeze(1).to(canvas.device)
        rows = num.nonzero().squeeze(1).to(canvas.device)
        for step in range(self.num_steps if len(places) else 0):
            held = canvas.xt.view(-1)[places]
            ask = canvas.ask(places, rows, step, step)
            drawn = yield ask._replace(score="probability", is_tempered=self.is_tempered, held=held)
            is_token = held != canvas.mask_token_id
            log_prob = drawn.score.log()
            score = torch.where(is_token, self.eta * log_prob if self.eta else torch.inf, log_prob)
            _, order = by_score(canvas.xt.shape, places, score)
            is_kept = first_of(order, kept[:, step]).view(-1)[places]
            filled = torch.where(is_token, held, drawn.x0)
            canvas.write(places, torch.where(is_kept, filled, canvas.mask_token_id))
