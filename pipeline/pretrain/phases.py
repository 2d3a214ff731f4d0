"""Trainings in phases: other blocks, rows, rotary base or mixture from one step on, without a restart.

BD3-LM (arXiv 2503.09573) trains on whole rows, then on blocks; LLaDA2.0 (2512.15745) lets the block size grow and
shrink; LLaDA-MoE (2509.24389) changes the data, then the row length and the rotary base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.data.mixture import whole_weights


@dataclass(frozen=True)
class Phase:
    """What is different in one phase.  A field that is left out has the value of the whole training."""

    share: float = 1.0
    """Of the training's steps, relative to the shares of the other phases."""
    block_size: int | None = None
    """0: whole rows."""
    seq_len: int | None = None
    """Rows are cut into pieces of this length, which divides theirs: as many tokens a step, in more rows."""
    rope_base: float | None = None
    mixture: dict[str, float] | None = None
    """Shares of rows by source; empty: all rows."""

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise ValueError(f"share is {self.share}; it must be positive")
        if self.block_size is not None and self.block_size < 0:
            raise ValueError(f"block_size is {self.block_size}; it must be at least 1, or 0 for whole rows")
        if self.seq_len is not None and self.seq_len < 1:
            raise ValueError(f"seq_len is {self.seq_len}; it must be at least 1")
        if self.rope_base is not None and not self.rope_base > 0:
            raise ValueError(f"rope_base is {self.rope_base}; it must be positive")
        if self.mixture:
            whole_weights(self.mixture)


@dataclass(frozen=True)
class Span:
    """The steps of a phase, and the values it has there."""

    name: str
    first_step: int
    stop_step: int
    """The step after the last one."""
    block_size: int
    seq_len: int
    """0: rows as they are packed."""
    rope_base: float
    mixture: Mapping[str, float]

    @property
    def model_kind(self) -> tuple[int, int, float]:
        """What a validation loss is of: losses, and weights, of different kinds are not compared or averaged."""
        return self.block_size, self.seq_len, self.rope_base


def first_step_of_kind(all_spans: Sequence[Span], step: int) -> int:
    """First step of the phases in a row, up to that of a step, that are of its kind."""
    found = next(number for number, span in enumerate(all_spans) if step < span.stop_step)
    while found and all_spans[found - 1].model_kind == all_spans[found].model_kind:
        found -= 1
    return all_spans[found].first_step


def spans(
    phases: Mapping[str, Phase],
    num_steps: int,
    block_size: int,
    rope_base: float,
    mixture: Mapping[str, float],
) -> tuple[Span, ...]:
    """The phases one after another, over num_steps: phase k ends at  round(num_steps * share up to k / all shares).

    Without phases there is one, with the values given here.  Raises ValueError if a phase would have no step.
    """
    named = phases or {"all": Phase()}
    total = sum(phase.share for phase in named.values())
    found: list[Span] = []
    share, first = 0.0, 0
    for name, phase in named.items():
        share += phase.share
        stop = round(num_steps * share / total)
        if stop <= first:
            raise ValueError(
                f"phase {name} has {phase.share:g} of {total:g} shares of {num_steps} steps: none. Take more steps, or "
                "leave the phase out"
            )
        found.append(
            Span(
                name,
                first,
                stop,
                block_size if phase.block_size is None else phase.block_size,
                phase.seq_len or 0,
                rope_base if phase.rope_base is None else phase.rope_base,
                mixture if phase.mixture is None else phase.mixture,
            )
        )
        first = stop
    return tuple(found)
