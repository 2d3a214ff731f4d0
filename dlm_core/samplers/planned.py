"""Samplers whose order is known before the first pass: which position comes when depends on the noise alone.

Ancestral sampling reveals a masked token with a probability that no prediction enters (MDLM, arXiv 2406.07524, eq. 6),
so all reveals are drawn first.  A pass is made only where a row reveals something, each row at its own pace: what MDLM
gets from keeping the last prediction, for each row by itself and for models that are conditioned on t as well.

One number u a position says it all: a position is masked at time t while u < mask_prob(t) / mask_prob(1).  First
hitting takes the positions in falling order of u, and ancestral sampling in T steps is the same, cut into T pieces.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.noise import Stream
from dlm_core.samplers.loop import Ask, Canvas, Rule, sent_together
from dlm_core.samplers.proposal import Drawn
from dlm_core.samplers.quotas import EvenQuotas, Quotas
from dlm_core.schedules import LinearSchedule, Schedule

_NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Ancestral(Rule):
    """t from 1 to t_end in ``num_steps`` equal steps; a mask is revealed from t to s by the posterior q(xs | xt, x0).

    MDLM (arXiv 2406.07524) eq. 6: the probability is (alpha_s - alpha_t) / (1 - alpha_t).  With t_end = 0 the last step
    leaves no mask.  With ``denoises_at_end`` one more pass fills what is left at t_end: with the most likely tokens
    ("argmax", MDLM's noise removal, t_end = 1e-5 there), or with drawn ones ("draw", the last step of SEDD's analytic
    sampler, arXiv 2310.16834, whose other steps are these for the absorbing kernel: RADD, 2406.03736).

    Not ``is_lazy``, every step makes a pass of every row, and the same tokens come of it: T passes, or T + 1.  Lazy, a
    row makes one for each step that reveals something in it: at most min(T, L), on average T (1 - (1 - 1/T)^L) for the
    linear schedule; or 1 more, which a row without masks does not make.  Discrete time of T steps (D3PM, arXiv
    2107.03006) is this rule with t_end 0.  Raises ValueError for no step, a t_end outside [0, 1), and for masks left at
    the end.
    """

    num_steps: int
    schedule: Schedule = field(default_factory=LinearSchedule)
    t_end: float = 0.0
    denoises_at_end: Literal["no", "argmax", "draw"] = "no"
    is_lazy: bool = True

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1")
        if self.denoises_at_end not in ("no", "argmax", "draw"):
            raise ValueError(f'denoises_at_end is "{self.denoises_at_end}"; it must be "no", "argmax" or "draw"')
        if not 0.0 <= self.t_end < 1.0:
            raise ValueError(f"t_end is {self.t_end}; it must lie in [0, 1)")
        if self.denoises_at_end == "no" and self._left() > 0:
            raise ValueError(
                f"{self.schedule} leaves masks at t_end {self.t_end}; take t_end 0 and a schedule that masks nothing "
                'there, or denoises_at_end="argmax"'
            )

    @classmethod
    def origin(cls, num_steps: int, eps: float = 1e-3) -> "Ancestral":
        """ "origin" of Dream (arXiv 2508.15487): num_steps passes at the first num_steps times of 1, ..., eps.

        A mask is revealed with 1 - s/t, and in the last pass all that are left are drawn.  Raises ValueError for no
        step, and for an eps outside [0, 1).
        """
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
        if not 0.0 <= eps < 1.0:
            raise ValueError(f"eps is {eps}; it must lie in [0, 1)")
        if num_steps == 1:
            return cls(1)
        return cls(num_steps - 1, t_end=1.0 - (num_steps - 1) / num_steps * (1.0 - eps), denoises_at_end="draw")

    @classmethod
    def analytic(cls, num_steps: int, schedule: Schedule, t_end: float = 1e-5) -> "Ancestral":
        """The analytic sampler of SEDD (arXiv 2310.16834) for the absorbing kernel: num_steps passes, and one more.

        Raises ValueError for no step, and for a t_end outside [0, 1).
        """
        return cls(num_steps, schedule, t_end, denoises_at_end="draw")

    def _left(self) -> float:
        return float(self.schedule.mask_prob(torch.tensor(self.t_end, dtype=torch.float64)))

    def turns(self, canvas: Canvas) -> Generator[Ask, Drawn, None]:
        """One pass for each step that reveals something."""
        times = torch.linspace(1.0, self.t_end, self.num_steps + 1, dtype=torch.float64)
        shares = self.schedule.mask_prob(times) / self.schedule.mask_prob(times[:1])
        u = canvas.uniforms(Stream.REVEAL, 0)
        step = torch.searchsorted(-shares[1:].contiguous(), -u)  # the first with share_s <= u; num_steps for none
        left = (canvas.is_open & (step == self.num_steps)).flatten().nonzero().squeeze(1).to(canvas.device)
        at_end = (canvas.is_open.any(dim=1) | (not self.is_lazy)).nonzero().squeeze(1).to(canvas.device)
        if not self.is_lazy:
            yield from _every_step(canvas, step, times)
        else:
            has_pass = canvas.is_open & (step < self.num_steps)
            yield from _in_order(canvas, torch.where(has_pass, step, _NEVER), times[step])
        if self.denoises_at_end != "no" and len(at_end):
            ends = torch.full((len(at_end),), self.t_end, dtype=times.dtype, device=canvas.device)
            ask = canvas.ask(left, at_end, 0, None, ends)  # comes when the other rows are done: no step of its own
            drawn = yield ask._replace(is_greedy=self.denoises_at_end == "argmax")
            canvas.write(left, drawn.x0)


@dataclass(frozen=True)
class FirstHitting(Rule):
    """Position by position at the times at which a process of infinitely many steps would reveal them.

    arXiv 2409.02908: the next of n masks goes at mask_prob u^(1/n) of what it was, and each is as likely to be it.
    Which is to take the positions in falling order of one uniform number each.  The law is that of ancestral sampling
    with T to infinity; a row of n masks makes n passes, or ceil(n / per_pass), with an error, for more than one token a
    pass, which is shown the time of the first of its tokens.  What a schedule leaves masked at t = 0 comes last, at
    t = 0.  Raises ValueError for less than one token a pass.
    """

    schedule: Schedule = field(default_factory=LinearSchedule)
    per_pass: int = 1

    def __post_init__(self) -> None:
        if self.per_pass < 1:
            raise ValueError(f"per_pass is {self.per_pass}; it must be at least 1")

    def turns(self, canvas: Canvas) -> Generator[Ask, Drawn, None]:
        """One pass a token."""
        u = canvas.uniforms(Stream.REVEAL, 0)
        last, first = self.schedule.mask_prob(torch.tensor([0.0, 1.0], dtype=torch.float64))
        rank = _ranks(canvas.is_open, -u)
        times = self.schedule.time_of((u * first).clamp(min=last))
        yield from _in_order(canvas, rank.where(rank == _NEVER, rank // self.per_pass), times)


@dataclass(frozen=True)
class RandomOrder(Rule):
    """As many positions a step as the quotas say, each as likely: "random" remasking of LLaDA (arXiv 2502.09992).

    In expectation the steps of ``Ancestral``, without the spread of their sizes.
    """

    quotas: Quotas = field(default_factory=lambda: EvenQuotas(64))

    def turns(self, canvas: Canvas) -> Generator[Ask, Drawn, None]:
        """One pass a step with a quota."""
        rank = _ranks(canvas.is_open, canvas.uniforms(Stream.REVEAL, 0))
        ends = self.quotas.split(canvas.is_open.sum(dim=1)).cumsum(dim=1)
        step = torch.searchsorted(ends, rank.clamp(max=canvas.xt.shape[1]), right=True)
        yield from _in_order(canvas, torch.where(canvas.is_open, step, _NEVER), None)


def _ranks(is_open: Bool[Tensor, "B L"], key: Float[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """0, 1, ... in rising order of the key for the open positions of each row."""
    ranks = key.masked_fill(~is_open, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return torch.where(is_open, ranks, _NEVER)


def _in_order(canvas: Canvas, step: Int[Tensor, "B L"], t: Float[Tensor, "B L"] | None) -> Generator[Ask, Drawn, None]:
    """A pass for each step of a row.  Rows go on at once, whatever their step: the j-th pass has the j-th of each."""
    for turn, (places, rows, times) in enumerate(_passes(step, t, canvas.device)):
        ask = canvas.ask(places, rows, 0, turn, times)
        drawn = yield ask
        canvas.write(places, drawn.x0)


def _passes(
    step: Int[Tensor, "B L"], t: Float[Tensor, "B L"] | None, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """(places, rows, t) of each pass, sent to the device at once.  Of several times of a row it is the largest."""
    seq_len = step.shape[1]
    ordered, order = step.sort(dim=1)
    is_first = torch.cat([torch.zeros_like(ordered[:, :1]), (ordered.diff(dim=1) != 0).long()], dim=1)
    number = torch.empty_like(step).scatter_(1, order, is_first.cumsum(dim=1))
    flat = (step != _NEVER).flatten().nonzero().squeeze(1)
    flat = flat[number.flatten()[flat].argsort(stable=True)]
    places = flat.split(torch.bincount(number.flatten()[flat]).tolist())
    found = [torch.unique(some // seq_len, return_inverse=True) for some in places]
    sent = sent_together(places, device), sent_together([rows for rows, _ in found], device)
    if t is None:
        yield from zip(*sent, [None] * len(places), strict=True)
        return
    times = [
        torch.zeros(len(rows), dtype=t.dtype).scatter_reduce_(0, local, t.flatten()[some], "amax")
        for some, (rows, local) in zip(places, found, strict=True)
    ]
    yield from zip(*sent, sent_together(times, device), strict=True)


def _every_step(canvas: Canvas, step: Int[Tensor, "B L"], times: Float[Tensor, " T1"]) -> Generator[Ask, Drawn, None]:
    revealed = [(canvas.is_open & (step == number)).flatten().nonzero().squeeze(1) for number in range(len(times) - 1)]
    for turn, (places, t) in enumerate(
        zip(sent_together(revealed, canvas.device), times[:-1].to(canvas.device), strict=True)
    ):
        drawn = yield canvas.ask(places, canvas.rows, 0, turn, t.expand(len(canvas.rows)))
        canvas.write(places, drawn.x0)
