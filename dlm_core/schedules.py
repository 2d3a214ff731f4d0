"""Noise schedules: how likely a token is noised at time t, how fast that grows, and the NELBO weight it implies.

What lives here: closed forms in t, exact down to t = 0, and the discrete-time chain.  What must not: sampling
(corruption.py), matrices over the vocabulary (kernels.py), losses (objectives.py).

A schedule is given by  mask_prob(t) = 1 - alpha(t),  nondecreasing on [0, 1].  Times are best held in float64.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Times = Float[Tensor, "..."]


def _check_range(name: str, value: Tensor, low: float, high: float) -> None:
    outside = ~((value >= low) & (value <= high))  # catches nan too
    if outside.any():
        raise ValueError(f"{name} is {float(value[outside].flatten()[0])}; it must lie in [{low}, {high}]")


@dataclass(frozen=True)
class Schedule(ABC):
    """One noise schedule; a subclass is final and gives three closed forms, on which the methods here rest.

    ``_mask_prob(t)``, its derivative ``_slope(t)`` and its inverse ``_time_of(mask_prob)``, each of a float tensor of
    any shape, elementwise, in its own dtype; arguments are checked before they are called.  MDLM (arXiv 2406.07524)
    section 3.1.
    """

    def mask_prob(self, t: Times) -> Times:
        """Probability that a token is noised at time t:  1 - alpha_t.

        Raises ValueError for t outside [0, 1], or if the schedule's own formula leaves [0, 1].
        """
        _check_range("t", t, 0.0, 1.0)
        mask_prob = self._mask_prob(t)
        _check_range(f"mask_prob of {self}", mask_prob, 0.0, 1.0)
        return mask_prob

    def alpha(self, t: Times) -> Times:
        """Probability that a token is still clean at time t.  Raises ValueError for t outside [0, 1]."""
        return 1.0 - self.mask_prob(t)

    def dalpha(self, t: Times) -> Times:
        """Derivative of alpha in t, <= 0.  Raises ValueError for t outside [0, 1], and where it is infinite or > 0."""
        _check_range("t", t, 0.0, 1.0)
        slope = self._rise(t)
        if not slope.isfinite().all():
            raise ValueError(f"dalpha diverges at t = 0 for {self}; take t > 0")
        return -slope

    def _rise(self, t: Times) -> Times:
        slope = self._slope(t)
        if not (slope >= 0).all():  # catches nan too
            bad = ~(slope >= 0)
            raise ValueError(
                f"alpha of {self} rises: mask_prob has the slope {float(slope[bad][0])} at t = {float(t[bad][0])}; "
                "it must not be negative"
            )
        return slope

    def nelbo_weight(self, t: Times) -> Times:
        """Weight of the masked cross-entropy at time t:  -dalpha_t / (1 - alpha_t)  >= 0,  in 1 / time.

        MDLM (arXiv 2406.07524) eq. 10, which keeps the sign inside alpha'; also LLaDA (2502.09992) eq. 12 and the
        bound of BD3-LM (2503.09573).  The -dalpha_t alone of some tutorials is not it.  Raises ValueError for t
        outside [0, 1], where alpha rises, and where mask_prob is 0: there the weight diverges, hence the lower end
        t_min of sampled times.
        """
        mask_prob = self.mask_prob(t)
        if (mask_prob <= 0).any():
            raise ValueError(
                f"the NELBO weight diverges where nothing is masked: mask_prob of {self} is 0 at "
                f"t = {float(t[mask_prob <= 0][0])}; take t >= t_min > 0"
            )
        return self._rise(t) / mask_prob

    def discrete_weight(self, index: Times, num_timesteps: int) -> Times:
        """Weight of the masked cross-entropy at step i = 1..T of T:  T (alpha_s - alpha_t) / (1 - alpha_t), t = i / T.

        s = (i - 1) / T; tends to ``nelbo_weight`` as T grows.  MDLM (arXiv 2406.07524) eq. 8, written with mask
        probabilities, which keep their digits.  Raises ValueError for less than one step, an index outside 1..T, where
        alpha rises, and where mask_prob is 0 at t.
        """
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps is {num_timesteps}; it must be at least 1")
        _check_range("index", index, 1.0, float(num_timesteps))
        before, after = (self.mask_prob((index - back) / num_timesteps) for back in (1, 0))
        if (after <= 0).any():
            raise ValueError(f"{self} masks nothing at one of {num_timesteps} steps, so that step has no weight")
        if (after < before).any():
            raise ValueError(f"alpha of {self} rises in one of {num_timesteps} steps; it must not")
        return num_timesteps * (after - before) / after

    def time_of(self, mask_prob: Times) -> Times:
        """The time t at which a token is noised with this probability, the inverse of ``mask_prob``.

        Where mask_prob rounds to that of an end, the time is that end.  Raises ValueError for a probability that the
        schedule never takes.
        """
        low, high = self._mask_prob(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        slack = 4 * torch.finfo(mask_prob.dtype).eps  # what mask_prob itself may be off by
        _check_range("mask_prob", mask_prob[~((mask_prob >= low - slack) & (mask_prob <= high + slack))], low, high)
        wanted = mask_prob.double()
        t = self._time_of(wanted)
        ends = torch.tensor([low, high], dtype=torch.float64).to(mask_prob.dtype)
        t = torch.where(wanted <= ends[0], 0.0, torch.where(wanted >= ends[1], 1.0, t))
        return t.to(mask_prob.dtype)

    @abstractmethod
    def _mask_prob(self, t: Times) -> Times: ...

    @abstractmethod
    def _slope(self, t: Times) -> Times:
        """Derivative of mask_prob."""

    @abstractmethod
    def _time_of(self, mask_prob: Times) -> Times: ...


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """alpha_t = 1 - t,  weight 1 / t.

    LLaDA (arXiv 2502.09992), Dream (2508.15487) and BD3-LM; the code of MDLM calls it log-linear.
    """

    def _mask_prob(self, t: Times) -> Times:
        return t.clone()

    def _slope(self, t: Times) -> Times:
        return torch.ones_like(t)

    def _time_of(self, mask_prob: Times) -> Times:
        return mask_prob.clone()


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """alpha_t = cos(pi t / 2),  weight (pi / 2) cot(pi t / 4).

    MDLM (arXiv 2406.07524) table 9, without its epsilon.  1 - cos is written as sin^2 / (1 + cos), which keeps its
    digits at small t, and that cos as sin(pi (1 - t) / 2), which is 0 at t = 1.
    """

    def _mask_prob(self, t: Times) -> Times:
        return torch.sin(math.pi * t / 2) ** 2 / (1.0 + torch.sin(math.pi * (1.0 - t) / 2))

    def _slope(self, t: Times) -> Times:
        return math.pi / 2 * torch.sin(math.pi * t / 2)

    def _time_of(self, mask_prob: Times) -> Times:
        return 4 / math.pi * torch.asin(torch.sqrt(mask_prob / 2))


@dataclass(frozen=True)
class CosineSquaredSchedule(Schedule):
    """alpha_t = cos(pi t / 2)^2,  weight pi cot(pi t / 2).

    MDLM (arXiv 2406.07524) table 9, without its epsilon; with T steps and an offset: ``DiscreteChain.cosine``.
    """

    def _mask_prob(self, t: Times) -> Times:
        return torch.sin(math.pi * t / 2) ** 2

    def _slope(self, t: Times) -> Times:
        return math.pi * torch.sin(math.pi * t / 2) * torch.sin(math.pi * (1.0 - t) / 2)

    def _time_of(self, mask_prob: Times) -> Times:
        return 2 / math.pi * torch.asin(torch.sqrt(mask_prob))


@dataclass(frozen=True)
class PolynomialSchedule(Schedule):
    """alpha_t = 1 - t^exponent,  weight exponent / t.

    Exponents 2 and 1/2 are the square and square-root schedules of BD3-LM (arXiv 2503.09573) table 8.
    Raises ValueError unless the exponent is positive and finite.
    """

    exponent: float

    def __post_init__(self) -> None:
        if not 0.0 < self.exponent < math.inf:
            raise ValueError(f"exponent is {self.exponent}; alpha falls from 1 to 0 only for an exponent above 0")

    def _mask_prob(self, t: Times) -> Times:
        return t**self.exponent

    def _slope(self, t: Times) -> Times:
        return self.exponent * t ** (self.exponent - 1)

    def _time_of(self, mask_prob: Times) -> Times:
        return mask_prob ** (1 / self.exponent)


@dataclass(frozen=True)
class LogarithmicSchedule(Schedule):
    """alpha_t = 1 - log(1 + t) / log 2,  weight 1 / ((1 + t) log(1 + t)).

    BD3-LM (arXiv 2503.09573) table 8.
    """

    def _mask_prob(self, t: Times) -> Times:
        return torch.log1p(t) / math.log(2)

    def _slope(self, t: Times) -> Times:
        return 1 / ((1 + t) * math.log(2))

    def _time_of(self, mask_prob: Times) -> Times:
        return torch.expm1(mask_prob * math.log(2))


@dataclass(frozen=True)
class SigmaLinearSchedule(Schedule):
    """alpha_t = exp(-sigma_t),  sigma_t = sigma_min + (sigma_max - sigma_min) t,  weight sigma'_t / expm1(sigma_t).

    MDLM (arXiv 2406.07524) table 9 calls it linear, with sigma_max = 1e8: then all is masked, and the weight gone,
    beyond t = 1e-6, so that times from a t_min of 1e-3 train on nothing; give a smaller sigma_max for those.  Neither
    end is reached: a share 1 - exp(-sigma_min) is masked at t = 0, a share exp(-sigma_max) is clean at t = 1. Raises
    ValueError unless 0 <= sigma_min < sigma_max < inf.
    """

    sigma_min: float = 0.0
    sigma_max: float = 1e8

    def __post_init__(self) -> None:
        if not 0.0 <= self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma runs from {self.sigma_min} to {self.sigma_max}; alpha falls only for 0 <= sigma_min < sigma_max"
            )

    def _sigma(self, t: Times) -> Times:
        return self.sigma_min + (self.sigma_max - self.sigma_min) * t

    def _mask_prob(self, t: Times) -> Times:
        return -torch.expm1(-self._sigma(t))

    def _slope(self, t: Times) -> Times:
        return (self.sigma_max - self.sigma_min) * torch.exp(-self._sigma(t))

    def _time_of(self, mask_prob: Times) -> Times:
        return (-torch.log1p(-mask_prob) - self.sigma_min) / (self.sigma_max - self.sigma_min)


@dataclass(frozen=True)
class GeometricSchedule(Schedule):
    """alpha_t = exp(-sigma_t),  sigma_t = sigma_min^(1 - t) sigma_max^t,  weight sigma'_t / expm1(sigma_t).

    SEDD (arXiv 2310.16834) and RADD (2406.03736).  Neither end is reached, as for SigmaLinearSchedule.
    Raises ValueError unless 0 < sigma_min < sigma_max < inf.
    """

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma runs from {self.sigma_min} to {self.sigma_max}; alpha falls only for 0 < sigma_min < sigma_max"
            )

    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def _sigma(self, t: Times) -> Times:
        return self.sigma_min * torch.exp(self._log_ratio() * t)

    def _mask_prob(self, t: Times) -> Times:
        return -torch.expm1(-self._sigma(t))

    def _slope(self, t: Times) -> Times:
        sigma = self._sigma(t)
        return self._log_ratio() * sigma * torch.exp(-sigma)

    def _time_of(self, mask_prob: Times) -> Times:
        return torch.log(-torch.log1p(-mask_prob) / self.sigma_min) / self._log_ratio()


@dataclass(frozen=True)
class ClippedSchedule(Schedule):
    """alpha_t = 1 - (low + (high - low) t): mask probabilities uniform on [low, high]; weight (high - low) / mask_prob.

    BD3-LM (arXiv 2503.09573) table 2, low = beta and high = omega.  For training that paper weighs with
    1 / mask_prob, which is this weight / (high - low) (``InverseMaskProb`` in objectives.py): the same gradient up to
    a factor, and a loss that is defined for low = high = 1, where everything is masked.  The integral over [low, high]
    alone bounds nothing; likelihood.py adds what lies outside.
    Raises ValueError unless 0 <= low <= high <= 1.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise ValueError(
                f"mask probabilities are clipped to [{self.low}, {self.high}]; alpha falls only for "
                "0 <= low <= high <= 1"
            )

    def _mask_prob(self, t: Times) -> Times:
        return self.low * (1.0 - t) + self.high * t

    def _slope(self, t: Times) -> Times:
        return torch.full_like(t, self.high - self.low)

    def _time_of(self, mask_prob: Times) -> Times:
        if self.low == self.high:
            raise ValueError(f"mask_prob is {self.low} at every t of {self}: no time belongs to it")
        return (mask_prob - self.low) / (self.high - self.low)


SCHEDULES: dict[str, Schedule] = {
    "linear": LinearSchedule(),
    "cosine": CosineSchedule(),
    "cosine_sqr": CosineSquaredSchedule(),
    "sigma_linear": SigmaLinearSchedule(),
    "geometric": GeometricSchedule(),
    "square": PolynomialSchedule(2.0),
    "sqrt": PolynomialSchedule(0.5),
    "log": LogarithmicSchedule(),
}
"""The published schedules that need no parameter, by the name a configuration uses."""


def _check_steps(num_timesteps: int) -> None:
    if num_timesteps < 1:
        raise ValueError(f"a chain needs at least one step; num_timesteps is {num_timesteps}")


@dataclass(frozen=True)
class DiscreteChain:
    """A Markov chain of T steps that noises a clean token with probability beta_t at step t = 1..T.

    alpha_t = prod_{s <= t} (1 - beta_s).  D3PM (arXiv 2107.03006) section 3; the matrices Q_t and Q-bar_t are
    ``Kernel.transition`` of 1 - beta_t and of alpha_t.  Raises ValueError for no step or a beta outside [0, 1].
    """

    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.betas:
            raise ValueError("a chain needs at least one step; betas is empty")
        for step, beta in enumerate(self.betas, start=1):
            if not 0.0 <= beta <= 1.0:
                raise ValueError(f"beta_{step} is {beta}; alpha falls only for betas in [0, 1]")

    @classmethod
    def linear(cls, num_timesteps: int, first: float, last: float) -> "DiscreteChain":
        """beta_t from ``first`` to ``last`` in equal steps:  first + (t - 1) / (T - 1) (last - first).

        The schedule of DDPM (arXiv 2006.11239) section 4.  Raises ValueError for no step or a beta outside [0, 1].
        """
        _check_steps(num_timesteps)
        return cls(tuple(torch.linspace(first, last, num_timesteps, dtype=torch.float64).tolist()))

    @classmethod
    def cosine(cls, num_timesteps: int, offset: float = 0.0) -> "DiscreteChain":
        """alpha_t = cos(pi t / (2 T) + offset)^2 for t >= 1, and alpha_0 = 1; offset in radians.

        The cosine of Improved DDPM (arXiv 2102.09672) eq. 17 as tutorials give it; with T >= 2 it falls only for
        -3 pi / (4 T) <= offset <= pi / (4 T), beyond which the cosine turns inside the chain: ValueError.
        """
        _check_steps(num_timesteps)
        angles = math.pi * torch.arange(1, num_timesteps + 1, dtype=torch.float64) / (2 * num_timesteps) + offset
        return cls.of_alphas([1.0, *(torch.cos(angles) ** 2).tolist()])

    @classmethod
    def of_alphas(cls, alphas: list[float]) -> "DiscreteChain":
        """The chain with given alpha_0 = 1, ..., alpha_T.  Raises ValueError where alpha rises or starts below 1."""
        if not alphas:
            raise ValueError("a chain needs at least one step; alphas is empty")
        if alphas[0] != 1.0:
            raise ValueError(f"alpha_0 is {alphas[0]}; a chain starts clean, with alpha_0 = 1")
        betas: list[float] = []
        for step in range(1, len(alphas)):
            before, after = alphas[step - 1], alphas[step]
            if not 0.0 <= after <= before:
                raise ValueError(f"alpha_{step} is {after} after {before}; alpha must not rise, and not leave [0, 1]")
            betas.append(1.0 - after / before if before > 0.0 else 0.0)
        return cls(tuple(betas))

    @classmethod
    def of_schedule(cls, schedule: Schedule, num_timesteps: int) -> "DiscreteChain":
        """The chain that passes through alpha(t / T) of a schedule which starts clean.

        Raises ValueError for no step, or a schedule that masks something at t = 0.
        """
        _check_steps(num_timesteps)
        times = torch.linspace(0.0, 1.0, num_timesteps + 1, dtype=torch.float64)
        return cls.of_alphas(schedule.alpha(times).tolist())

    @property
    def num_timesteps(self) -> int:
        """T, the number of noising steps."""
        return len(self.betas)

    def alphas(self) -> Float[Tensor, " T1"]:
        """alpha_0 = 1, alpha_1, ..., alpha_T in float64:  prod_{s <= t} (1 - beta_s).  D3PM (arXiv 2107.03006)."""
        kept = 1.0 - torch.tensor([0.0, *self.betas], dtype=torch.float64)
        return kept.cumprod(dim=0)

    def thetas(self) -> Float[Tensor, " T"]:
        """Probability theta_t that step t -> t - 1 reveals a mask:  beta_t alpha_{t-1} / (1 - alpha_t), t = 1..T.

        The posterior of D3PM (arXiv 2107.03006) eq. 3 at a mask; the same as
        (alpha_s - alpha_t) / (1 - alpha_t) with s = t - 1.  0 where nothing can be masked yet (alpha_t = 1).
        """
        betas = torch.tensor(self.betas, dtype=torch.float64)
        noised = -torch.expm1(torch.log1p(-betas).cumsum(dim=0))  # 1 - alpha_t, with its digits where betas are tiny
        theta = betas * self.alphas()[:-1] / noised
        return torch.where(noised > 0, theta.clamp(max=1.0), 0.0)
