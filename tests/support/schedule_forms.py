"""Closed forms of the noise schedules, independent of dlm_core: 1 - alpha_t in 40 digits, the weight in floats."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext

DIGITS = 40
PI = Decimal("3.14159265358979323846264338327950288419716939937510582")


@dataclass(frozen=True)
class Form:
    """What a schedule ought to be."""

    mask_prob: Callable[[Decimal], Decimal]
    weight: Callable[[float], float]
    """-dalpha_t / (1 - alpha_t)."""
    ends: tuple[float, float] = (0.0, 1.0)
    """mask_prob at t = 0 and at t = 1."""
    scale: float = 1.0
    """Time by which the schedule has done most of its work."""

    @property
    def exact_ends(self) -> bool:
        """Whether the ends are numbers that were given, not values of exp."""
        return all(round(end, 2) == end for end in self.ends)


def exact_mask_prob(form: Form, t: float) -> float:
    """1 - alpha_t at exactly this float, rounded once."""
    with localcontext() as context:
        context.prec = DIGITS
        return float(form.mask_prob(Decimal(t)))


def _sine(x: Decimal) -> Decimal:
    """Taylor series; enough terms for |x| < 4."""
    term, total = x, x
    for k in range(1, 40):
        term *= -x * x / (2 * k * (2 * k + 1))
        total += term
    return total


def _power(exponent: str) -> Form:
    return Form(lambda t: t ** Decimal(exponent), lambda t: float(exponent) / t)


def _sigma_linear(low: str, high: str, ends: tuple[float, float] = (0.0, 1.0), scale: float = 1.0) -> Form:
    def weight(t: float) -> float:
        return (float(high) - float(low)) / math.expm1(float(low) + (float(high) - float(low)) * t)

    return Form(lambda t: 1 - (-Decimal(low) * (1 - t) - Decimal(high) * t).exp(), weight, ends, scale)


def _geometric(low: str, high: str) -> Form:
    def weight(t: float) -> float:
        sigma = float(low) ** (1 - t) * float(high) ** t
        return sigma * math.log(float(high) / float(low)) / math.expm1(sigma)

    def mask_prob(t: Decimal) -> Decimal:
        return 1 - (-(Decimal(low).ln() * (1 - t) + Decimal(high).ln() * t).exp()).exp()

    return Form(mask_prob, weight, ends=(-math.expm1(-float(low)), -math.expm1(-float(high))))


def _clipped(low: str, high: str) -> Form:
    def mask_prob(t: Decimal) -> Decimal:
        return Decimal(low) * (1 - t) + Decimal(high) * t

    def weight(t: float) -> float:
        return (float(high) - float(low)) / (float(low) * (1 - t) + float(high) * t)

    return Form(mask_prob, weight, ends=(float(low), float(high)))


FORMS = {
    "linear": Form(lambda t: t, lambda t: 1 / t),
    "cosine": Form(lambda t: 2 * _sine(PI * t / 4) ** 2, lambda t: math.pi / 2 / math.tan(math.pi * t / 4)),
    "cosine_sqr": Form(lambda t: _sine(PI * t / 2) ** 2, lambda t: math.pi / math.tan(math.pi * t / 2)),
    "sigma_linear": _sigma_linear("0", "1e8", scale=1e-7),
    "geometric": _geometric("1e-4", "20"),
    "square": _power("2"),
    "sqrt": _power("0.5"),
    "log": Form(lambda t: (1 + t).ln() / Decimal(2).ln(), lambda t: 1 / ((1 + t) * math.log1p(t))),
    "cube": _power("3"),
    "sigma_linear(0.125, 5)": _sigma_linear("0.125", "5", ends=(-math.expm1(-0.125), -math.expm1(-5.0))),
    "geometric(0.01, 8)": _geometric("0.01", "8"),
    "clipped(0.3, 0.8)": _clipped("0.3", "0.8"),
    "clipped(0, 0.5)": _clipped("0", "0.5"),
    "clipped(0.1, 0.45)": _clipped("0.1", "0.45"),
    "clipped(0.05, 0.35)": _clipped("0.05", "0.35"),
}
"""The published schedules by their names, then others with parameters."""
