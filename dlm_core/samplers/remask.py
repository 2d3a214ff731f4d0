"""Samplers that take tokens back: ReMDM and path planning.

A token that was drawn early, with little to go by, gets another chance.  More steps than tokens are then of use.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.noise import Stream
from dlm_core.samplers.loop import Ask, Canvas, Rule, first_of, flat_places, open_places
from dlm_core.samplers.proposal import Drawn
from dlm_core.samplers.quotas import ScheduleQuotas

Remasking = Literal["cap", "rescale", "confidence", "loop"]


@dataclass(frozen=True)
class ReMDM(Rule):
    """From t to s a token is masked again with probability sigma, and masks are revealed so much more often.

    arXiv 2503.00307, eq. 5: a mask is revealed with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t).  Any sigma of at
    most (1 - alpha_s) / alpha_t keeps the marginals of masked diffusion, so any trained model will do.  alpha_t is
    1 - t but for "loop".

    ::

        cap         sigma = min(eta, (1 - alpha_s) / alpha_t)
        rescale     sigma = eta min(1, (1 - alpha_s) / alpha_t)
        confidence  sigma of "rescale", spread over the tokens of a row by softmax(-p), p theirs when they were drawn
        loop        alpha rises to ``alpha_loop`` until t = t_on, stays until t_off while sigma is eta, rises to 1

    With eta 0 it is ``Ancestral``, token for token under the same noise.  A row makes a pass for each step that reveals
    something in it.  "confidence" waits for the device in each step.  Raises ValueError for values out of range, and
    for those of "loop" elsewhere.
    """

    num_steps: int
    eta: float
    kind: Remasking = "cap"
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_loop: float = 0.9

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta is {self.eta}; it must lie in [0, 1]")
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
        """Reveals and remaskings of a step are of what was there before it.

        A mask stays while u is below the probability that it has stayed so long; each stay has a u of its own.
        """
        alphas, sigmas = self.rates()
        is_masked = canvas.is_open.clone()
        stayed = torch.ones(is_masked.shape, dtype=torch.float64)
        visit = torch.zeros_like(is_masked, dtype=torch.int64)
        sureness = torch.full_like(stayed, torch.inf)
        u = canvas.uniforms(Stream.REVEAL, visit)
        for step, (alpha_t, alpha_s, sigma) in enumerate(zip(alphas[:-1], alphas[1:], sigmas, strict=True)):
            of_token = self._by_token(sigma, sureness, canvas.is_open & ~is_masked)
            own = sigma if self.kind != "confidence" else torch.zeros_like(sigma)
            stayed = stayed * (1.0 - (alpha_s - (1.0 - own) * alpha_t) / (1.0 - alpha_t))
            is_revealed = is_masked & (stayed <= u)
            is_remasked = canvas.is_open & ~is_masked & (canvas.uniforms(Stream.REMASK, step) < of_token)
            if is_revealed.any():
                drawn = yield self._ask(canvas, is_revealed, visit, 1.0 - float(alpha_t))
                canvas.write(is_revealed.flatten().nonzero().squeeze(1).to(canvas.device), drawn.x0)
                if self.kind == "confidence":
                    sureness[is_revealed] = drawn.score.cpu()
            if is_remasked.any():
                places = is_remasked.flatten().nonzero().squeeze(1).to(canvas.device)
                canvas.write(places, torch.full_like(places, canvas.mask_token_id))
                visit = visit + is_remasked
                stayed = torch.where(is_remasked, 1.0, stayed)
                u = canvas.uniforms(Stream.REVEAL, visit)
            is_masked = (is_masked & ~is_revealed) | is_remasked

    def _by_token(
        self, sigma: Float[Tensor, ""], sureness: Float[Tensor, "B L"], is_token: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L"]:
        if self.kind != "confidence":
            return sigma.expand(sureness.shape)
        doubt = torch.where(is_token, -sureness, -torch.inf)
        return sigma * doubt.softmax(dim=1).nan_to_num(0.0)  # a row without tokens has none to take back

    def _ask(self, canvas: Canvas, is_revealed: Bool[Tensor, "B L"], visit: Int[Tensor, "B L"], t: float) -> Ask:
        rows = is_revealed.any(dim=1).nonzero().squeeze(1)
        flat = is_revealed[rows].flatten().nonzero().squeeze(1)
        step = visit[rows].flatten()[flat].to(canvas.device)
        times = torch.full((len(rows),), t, dtype=torch.float64)
        ask = canvas.ask(flat.to(canvas.device), rows.to(canvas.device), 0, times.to(canvas.device))
        return ask._replace(step=step, score="probability" if self.kind == "confidence" else None)


def _most(alpha: Float[Tensor, " T1"]) -> Float[Tensor, " T"]:
    """The largest sigma of each step; where alpha_t is 0 there is nothing to take back."""
    return torch.where(alpha[:-1] > 0.0, (1.0 - alpha[1:]) / alpha[:-1], 1.0).clamp(max=1.0)


@dataclass(frozen=True)
class PathPlanning(Rule):
    """Each step draws for all masks and keeps the best of the row: all but the (1 - k/T) n lowest scores after step k.

    P2 (arXiv 2502.03540), with the denoiser as its own planner.  The score is log p of the drawn token at a mask, and
    ``eta`` log p of what stands there at a token: eta 1 treats them alike, more takes back more, and at 0 no token is
    taken back: then it is ``Confident`` with linear ``ScheduleQuotas``.  T passes.  Raises ValueError for values out of
    range.
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
        places, is_asked = open_places(canvas.is_open.to(canvas.device), int(num.max()) if len(num) else 0)
        select = flat_places(places, canvas.xt.shape[1])
        for step in range(self.num_steps if places.shape[1] else 0):
            held = canvas.xt.view(-1)[select]
            drawn = yield Ask(
                select, canvas.xt, canvas.rows, step, score="probability", is_tempered=self.is_tempered, held=held
            )
            is_token = held != canvas.mask_token_id
            log_prob = drawn.score.log()
            score = torch.where(is_token, self.eta * log_prob if self.eta else torch.inf, log_prob).view(places.shape)
            order = score.masked_fill(~is_asked, -torch.inf).argsort(dim=1, descending=True, stable=True)
            is_kept = first_of(order, kept[:, step]).flatten()
            filled = torch.where(is_token, held, drawn.x0)
            changed = torch.where(is_kept, filled, canvas.mask_token_id)
            canvas.write(select, torch.where(is_asked.flatten(), changed, held))
