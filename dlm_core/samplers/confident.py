"""Samplers that take the surest predictions first: how sure a position is decides when it comes.

Of the masked positions the n with the highest scores are taken, the rest stay masked.  The score and n are the two
choices; each sampler of LLaDA, Dream, MaskGIT, Fast-dLLM and the entropy bound is a pair of them (presets.py).

B rows of L positions; what is not asked for has no score, and comes last in every order.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dlm_core.noise import Stream
from dlm_core.samplers.loop import Ask, Canvas, Rule, by_score, first_of, open_places, put, sent_together
from dlm_core.samplers.proposal import Drawn, Score, check_score
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
        self, score: Float[Tensor, "B L"], entropy: Float[Tensor, "B L"], is_open: Bool[Tensor, "B L"]
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
        self, score: Float[Tensor, "B L"], entropy: Float[Tensor, "B L"], is_open: Bool[Tensor, "B L"]
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
        self, score: Float[Tensor, "B L"], entropy: Float[Tensor, "B L"], is_open: Bool[Tensor, "B L"]
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
    exp(score / order_temperature): alg_temp of Dream.  A position for which one of the ids ``last`` was drawn has a
    score of -inf, and is taken when no other is left: what LLaDA does with ends of text (confidence_eos_eot_inf).

    With quotas nothing waits for the device, and a row makes a pass for each step with a quota.  With a ``Count`` a row
    is done after a number of steps that the host does not know: it looks every ``look_every`` steps, and till then rows
    that are done go through passes as well, which ``nfe`` does not count and ``num_passes`` does.  Raises ValueError
    for an unknown score, a negative temperature, one beside a ``Count``, a look_every below 1, and a negative id.
    """

    score: Score = "probability"
    num: Quotas | Count = field(default_factory=lambda: EvenQuotas(64))
    is_tempered: bool = False
    order_temperature: float = 0.0
    look_every: int = 1
    last: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_score(self.score)
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
        if any(i < 0 for i in self.last):
            raise ValueError(f"last has the id {min(self.last)}; ids begin at 0")

    def turns(self, canvas: Canvas) -> Generator[Ask, Drawn, None]:
        """One pass a step."""
        is_open = canvas.is_open.to(canvas.device)
        if isinstance(self.num, Count):
            yield from self._until_done(canvas, is_open, self.num)
            return
        left = canvas.is_open.sum(dim=1)
        quotas = self.num.split(left)
        sizes = (left[:, None] - quotas.cumsum(dim=1) + quotas).where(quotas > 0, 0).sum(dim=0).tolist()
        rows = sent_together([quota.nonzero().squeeze(1) for quota in quotas.T], canvas.device)
        counts = quotas.to(canvas.device)
        for step, (size, asked) in enumerate(zip(sizes, rows, strict=True)):
            if not size:
                continue
            places = open_places(is_open & (counts[:, step] > 0)[:, None], size)
            drawn = yield self._ask(canvas, places, asked, step)
            _, order = by_score(is_open.shape, places, self._perturbed(canvas, places, self._sureness(drawn), step))
            _take(canvas, is_open, first_of(order, counts[:, step]), places, drawn.x0)

    def _until_done(self, canvas: Canvas, is_open: Bool[Tensor, "B L"], num: Count) -> Generator[Ask, Drawn, None]:
        step, left = 0, canvas.is_open.sum(dim=1)
        while left.any():
            rows, size = left.nonzero().squeeze(1).to(canvas.device), int(left.sum())
            first = open_places(is_open, 1)
            for _ in range(min(self.look_every, int(left.max()))):
                places = open_places(is_open, size)
                # rows that go on unseen leave places over: they ask for one that may be asked for, in vain
                ask = self._ask(canvas, torch.where(places < is_open.numel(), places, first), rows, step)
                drawn = yield ask._replace(is_busy=is_open.any(dim=1)[ask.rows])
                score, order = by_score(is_open.shape, places, self._sureness(drawn))
                entropy = put(torch.zeros_like(score), places, drawn.entropy).gather(1, order)
                count = num.count(score, entropy, is_open.gather(1, order))
                _take(canvas, is_open, first_of(order, count), places, drawn.x0)
                step += 1
            left = is_open.sum(dim=1).cpu()

    def _ask(self, canvas: Canvas, places: Int[Tensor, " M"], rows: Int[Tensor, " R"], step: int) -> Ask:
        return canvas.ask(places, rows, step, step)._replace(
            score=self.score, is_tempered=self.is_tempered, with_entropy=isinstance(self.num, EntropyBound)
        )

    def _sureness(self, drawn: Drawn) -> Float[Tensor, " M"]:
        score = drawn.score
        for token_id in self.last:
            score = score.masked_fill(drawn.x0 == token_id, -torch.inf)
        return score

    def _perturbed(
        self, canvas: Canvas, places: Int[Tensor, " M"], score: Float[Tensor, " M"], step: int
    ) -> Float[Tensor, " M"]:
        """The highest of score / temperature + Gumbel are a draw without replacement."""
        if not self.order_temperature:
            return score
        u = canvas.draws(places, step, Stream.ORDER)
        return score / self.order_temperature - torch.log(-torch.log1p(-u))


def _take(
    canvas: Canvas,
    is_open: Bool[Tensor, "B L"],
    is_taken: Bool[Tensor, "B L"],
    places: Int[Tensor, " M"],
    x0: Int[Tensor, " M"],
) -> None:
    """Write what was drawn where it is taken, and close it."""
    is_new = is_taken & is_open
    canvas.xt.copy_(torch.where(is_new, put(canvas.xt, places, x0), canvas.xt))
    is_open &= ~is_new
