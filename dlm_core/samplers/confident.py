"""Samplers that take the surest predictions first: how sure a position is decides when it comes.

Of the masked positions the n with the highest scores are taken, the rest stay masked.  The score and n are the two
choices; each sampler of LLaDA, Dream, MaskGIT, Fast-dLLM and the entropy bound is a pair of them (presets.py).

B rows, W positions that a row can still fill.  A row with fewer has places without meaning behind them.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.noise import Stream
from dlm_core.samplers.loop import Ask, Canvas, Rule, first_of, flat_places, open_places
from dlm_core.samplers.proposal import Drawn, Score
from dlm_core.samplers.quotas import EvenQuotas, Quotas


@dataclass(frozen=True)
class Threshold:
    """All whose score is above tau, at least one: Fast-dLLM (arXiv 2505.22618), LLaDA2.0 (2512.15745).

    At tau = 1 one a step.  Raises ValueError for a tau outside [0, 1].
    """

    tau: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"tau is {self.tau}; it must lie in [0, 1]")

    def count(
        self, score: Float[Tensor, "B W"], entropy: Float[Tensor, "B W"], is_open: Bool[Tensor, "B W"]
    ) -> Int[Tensor, " B"]:
        """Of a score that is a probability."""
        return ((score > self.tau) & is_open).sum(dim=1).clamp(min=1)


@dataclass(frozen=True)
class Factor:
    """The largest n whose n-th score is at least 1 - f / (n + 1): the factor of Fast-dLLM (arXiv 2505.22618).

    At f = 0 one a step, unless scores are 1.  Raises ValueError for a negative f.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.factor < 0.0:
            raise ValueError(f"factor is {self.factor}; it must be 0 or more")

    def count(
        self, score: Float[Tensor, "B W"], entropy: Float[Tensor, "B W"], is_open: Bool[Tensor, "B W"]
    ) -> Int[Tensor, " B"]:
        """The scores fall and the bound rises with n, so what holds is a prefix."""
        n = 1 + torch.arange(score.shape[1], device=score.device)
        return ((score >= 1.0 - self.factor / (n + 1)) & is_open).sum(dim=1).clamp(min=1)


@dataclass(frozen=True)
class EntropyBound:
    """The largest prefix whose entropies, but for the largest, add up to gamma nats or less (arXiv 2505.24857).

    That bounds what is lost by taking them as if independent.  At gamma = 0 one a step, but for those without entropy.
    Raises ValueError for a negative gamma.
    """

    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.gamma < 0.0:
            raise ValueError(f"gamma is {self.gamma}; it must be 0 or more")

    def count(
        self, score: Float[Tensor, "B W"], entropy: Float[Tensor, "B W"], is_open: Bool[Tensor, "B W"]
    ) -> Int[Tensor, " B"]:
        """The sum less the largest never falls with the length of the prefix."""
        lost = entropy.cumsum(dim=1) - entropy.cummax(dim=1).values
        return ((lost <= self.gamma) & is_open).sum(dim=1).clamp(min=1)


Count = Threshold | Factor | EntropyBound
"""How many of the surest positions of a row to take, of scores in falling order: at least one."""


@dataclass(frozen=True)
class Confident(Rule):
    """Take so many of the surest positions a step, until none is masked.

    ``num`` is a number by step (``Quotas``) or by how sure they are (``Count``).  ``is_tempered`` scores the
    distribution that is drawn from (Dream, arXiv 2508.15487) in place of softmax(logits) (LLaDA, 2502.09992).
    ``order_temperature`` takes positions at random in place of the surest, without replacement and in proportion to
    exp(score / order_temperature): alg_temp of Dream.

    With quotas nothing waits for the device.  With a ``Count`` a row is done after a number of steps that the host does
    not know: it looks every ``look_every`` steps, and till then rows that are done go through passes as well, which
    ``nfe`` does not count and ``num_passes`` does.  Raises ValueError for a negative temperature, one beside a
    ``Count``, and a look_every below 1.
    """

    score: Score = "probability"
    num: Quotas | Count = field(default_factory=lambda: EvenQuotas(64))
    is_tempered: bool = False
    order_temperature: float = 0.0
    look_every: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.order_temperature < math.inf:
            raise ValueError(f"order_temperature is {self.order_temperature}; it must be 0 or more, and finite")
        if self.order_temperature and isinstance(self.num, Count):
            raise ValueError(
                f"order_temperature is {self.order_temperature}, but {self.num} counts the surest positions; it goes "
                "with quotas"
            )
        if isinstance(self.num, Threshold | Factor) and self.score != "probability":
            raise ValueError(f'score is "{self.score}", but {self.num} is a bound on the probability; take that')
        if self.look_every < 1:
            raise ValueError(f"look_every is {self.look_every}; it must be at least 1")

    def turns(self, canvas: Canvas) -> Generator[Ask, Drawn, None]:
        """One pass a step."""
        is_open = canvas.is_open.to(canvas.device)
        if isinstance(self.num, Count):
            yield from self._until_done(canvas, is_open, self.num)
            return
        left = canvas.is_open.sum(dim=1)
        quotas = self.num.split(left)
        sent = quotas.to(canvas.device)
        for step in range(quotas.shape[1]):
            if quotas[:, step].any():
                places, is_asked = open_places(is_open, int(left.max()))
                drawn = yield self._ask(canvas, places, step, sent[:, step] > 0)
                score = self._perturbed(canvas, places, drawn.score.view(places.shape), step)
                order = score.masked_fill(~is_asked, -torch.inf).argsort(dim=1, descending=True, stable=True)
                _take(canvas, is_open, places, order, sent[:, step], drawn.x0)
            left -= quotas[:, step]

    def _until_done(self, canvas: Canvas, is_open: Bool[Tensor, "B L"], num: Count) -> Generator[Ask, Drawn, None]:
        step, width = 0, int(canvas.is_open.sum(dim=1).max())
        while width:
            for _ in range(min(self.look_every, width)):
                places, is_asked = open_places(is_open, width)
                drawn = yield self._ask(canvas, places, step, is_asked[:, 0])
                score = drawn.score.view(places.shape).masked_fill(~is_asked, -torch.inf)
                entropy = drawn.entropy.view(places.shape).masked_fill(~is_asked, 0.0)
                score, order = score.sort(dim=1, descending=True, stable=True)
                is_asked = is_asked.gather(1, order)
                count = num.count(score, entropy.gather(1, order), is_asked)
                _take(canvas, is_open, places, order, count * is_asked[:, 0], drawn.x0)
                step += 1
            width = int(is_open.sum(dim=1).max())

    def _ask(self, canvas: Canvas, places: Int[Tensor, "B W"], step: int, is_busy: Bool[Tensor, " B"]) -> Ask:
        select = flat_places(places, canvas.xt.shape[1])
        return Ask(
            select,
            canvas.xt,
            canvas.rows,
            step,
            score=self.score,
            is_tempered=self.is_tempered,
            with_entropy=isinstance(self.num, EntropyBound),
            is_busy=is_busy,
        )

    def _perturbed(
        self, canvas: Canvas, places: Int[Tensor, "B W"], score: Float[Tensor, "B W"], step: int
    ) -> Float[Tensor, "B W"]:
        """The highest of score / temperature + Gumbel are a draw without replacement."""
        if not self.order_temperature:
            return score
        u = canvas.draws(flat_places(places, canvas.xt.shape[1]), step, Stream.ORDER).view(places.shape)
        return score / self.order_temperature - torch.log(-torch.log1p(-u))


def _take(
    canvas: Canvas,
    is_open: Bool[Tensor, "B L"],
    places: Int[Tensor, "B W"],
    order: Int[Tensor, "B W"],
    count: Int[Tensor, " B"],
    x0: Int[Tensor, " BW"],
) -> None:
    """Write the first ``count`` of each row, in the order of ``order``; open positions come first in it."""
    is_taken = first_of(order, count)
    select = flat_places(places, canvas.xt.shape[1])
    canvas.write(select, torch.where(is_taken.flatten(), x0, canvas.xt.view(-1)[select]))
    is_open.scatter_(1, places, is_open.gather(1, places) & ~is_taken)
