"""What stops a training that has gone wrong: a first loss that no untrained model has, steps that would harm it."""

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import write_json
from pipeline.errors import NumericsError
from pipeline.pretrain.config import PretrainConfig
from pipeline.training_state import checkpoint_name

if TYPE_CHECKING:
    from dlm_core.models.config import ModelConfig

_FIRST_LOSS_ROUNDING = 0.01
"""Share of the expected first loss that narrow dtypes and what lies in the row may move it by."""
ALERT_SIGMAS = 6.0
"""Spikes are told of from here on where none are skipped; OLMo skips at as many."""
REPORT_FILE = "skipped_steps.json"
"""In the state directory, once training was stopped."""


def check_first_loss(model_config: "ModelConfig", sums: Any) -> None:
    """NumericsError if an untrained model's loss of masked tokens is not what its initial weights must give.

    To be asked of finite losses until an update was applied; the others are the guard's.

    Between log(vocab_size - 1), a uniform prediction, and ``expected_initial_loss``: by Jensen's inequality on either
    side, for logits that know nothing of the target.  They have the variance  s^2 = 2 (expected - log(vocab_size - 1));
    the mean at the targets moves by s times the root of sum_v frequency_v^2, below 1/4 for text, and by s / sqrt(number
    of masked tokens): four times either is let through.
    """
    from dlm_core.models.init import expected_initial_loss

    loss, num_masked = (float(part.sum()) for part in sums.chunk(2))
    low, high = math.log(model_config.vocab_size - 1), expected_initial_loss(model_config)
    slack = math.sqrt(2 * (high - low)) * (1 + 4 / math.sqrt(max(1.0, num_masked))) + _FIRST_LOSS_ROUNDING * high
    if num_masked and not low - slack <= loss / num_masked <= high + slack:
        raise NumericsError(
            f"the first loss is {loss / num_masked:.3f} nats a masked token; an untrained model of this configuration "
            f"has {low:.3f} to {high:.3f}. The weights, the data or the loss are not what they should be"
        )


class Window:
    """Losses and gradient norms of the last updates, against which the next one is held, as in OLMo-core.

    Nothing is called a spike before half of the window is filled.
    """

    def __init__(self, num_steps: int) -> None:
        self.losses, self.grad_norms = deque[float](maxlen=num_steps), deque[float](maxlen=num_steps)

    def is_spike(self, loss: float, grad_norm: float, sigmas: float) -> bool:
        """Whether one of them lies more than ``sigmas`` standard deviations above its mean in the window."""
        if len(self.losses) < max(2, self.losses.maxlen // 2):  # pyright: ignore[reportOptionalOperand]
            return False
        return _is_above(loss, self.losses, sigmas) or _is_above(grad_norm, self.grad_norms, sigmas)

    def add(self, loss: float, grad_norm: float) -> None:
        """Take an update into the window, and the oldest out of it once it is full."""
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)


def _is_above(value: float, before: Collection[float], sigmas: float) -> bool:
    mean = math.fsum(before) / len(before)
    variance = math.fsum((other - mean) ** 2 for other in before) / (len(before) - 1)
    return value - mean > sigmas * math.sqrt(variance)


class Guard:
    """Keeps updates from the weights that would harm them, tells of spikes, and stops after too many in a row.

    The loop says ``before_step`` when the last gradient of a step is there, lets the engine step, and says ``check``.
    In between the engine's optimizer asks whether it may: nothing happens to weights, moments or averages if it may
    not, and the engine clears the gradients as after any step.  What decides are the loss and the gradient norm over
    all ranks, so that all of them decide alike.
    """

    def __init__(
        self, config: PretrainConfig, engine: Any, warn: Callable[[str], None], state: Path, is_first_rank: bool
    ) -> None:
        self._config, self._engine, self._warn = config, engine, warn
        self._report_file, self._is_first_rank = state / REPORT_FILE, is_first_rank
        self._window = Window(config.spike_window_steps)
        self._step, self._loss, self._own_norm, self._is_short = -1, 0.0, None, False
        self._may_apply: bool | None = None
        self._refused_in_a_row: list[dict[str, Any]] = []
        self.num_refused = 0
        """Steps whose update was refused, over the whole training."""
        self.is_spike = False
        """Whether the last step stood out."""
        optimizer = engine.basic_optimizer
        apply = optimizer.step

        def apply_or_not(closure: Any = None) -> Any:
            return apply(closure) if self._decide() else None

        optimizer.step = apply_or_not  # ZeRO calls it once a parameter group

    def before_step(self, step: int, loss: float, *, is_short: bool = False) -> None:
        """Tell the loss of the global batch of a step, its last gradient added up and no update made.

        A step of few tokens, ``is_short``, is no spike and tells nothing of others: its loss and norm scatter more.
        """
        self._step, self._loss, self._is_short, self._may_apply, self._own_norm = step, loss, is_short, None, None
        if self._engine.optimizer is self._engine.basic_optimizer:  # which clips, but keeps no norm
            self._own_norm = _grad_norm(self._engine.module)

    @property
    def grad_norm(self) -> float:
        """Norm of the step's gradient before clipping, over all ranks; not finite if the gradient is not.

        Known to the optimizer when it asks, and until the next step.
        """
        if self._own_norm is not None:
            return self._own_norm
        return float(self._engine.optimizer._global_grad_norm)

    def _decide(self) -> bool:
        if self._may_apply is None:
            sigmas = self._config.spike_sigmas
            is_finite = math.isfinite(self._loss) and math.isfinite(self.grad_norm)
            self._may_apply = is_finite and not (sigmas and self._stands_out(sigmas))
        return self._may_apply

    def _stands_out(self, sigmas: float) -> bool:
        return not self._is_short and self._window.is_spike(self._loss, self.grad_norm, sigmas)

    def check(self, step: int, last_saved: Callable[[], int]) -> None:
        """Look back at a step; ``last_saved`` gives the step of the newest checkpoint, for the message.

        Raises NumericsError after ``max_skipped_steps`` refused updates in a row, what is known of them in a file.
        """
        assert step == self._step, f"the engine stepped {step} after before_step({self._step})"
        loss, norm = self._loss, self.grad_norm
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        self.is_spike = is_finite and self._stands_out(self._config.spike_sigmas or ALERT_SIGMAS)
        samples = range(step * self._config.global_batch_seqs, (step + 1) * self._config.global_batch_seqs)
        figures = f"loss {loss:.6g}, gradient norm {norm:.6g}, samples {samples[0]} to {samples[-1]}"
        if self._decide() and is_finite:
            self._refused_in_a_row.clear()
            if not self._is_short:
                self._window.add(loss, norm)
            if self.is_spike:
                self._warn(f"step {step} is a spike ({figures}) and was applied; pretrain.spike_sigmas would skip such")
            return
        cause = "spike" if is_finite else "non-finite loss or gradient"
        self.num_refused += 1
        self._refused_in_a_row.append(
            {"step": step, "cause": cause, "loss": str(loss), "grad_norm": str(norm), "sample_ids": list(samples)}
        )
        self._warn(f"step {step} had a {cause} and was skipped ({figures})")
        if len(self._refused_in_a_row) >= self._config.max_skipped_steps:
            self._stop(step, max(last_saved(), 0))

    def _stop(self, step: int, last: int) -> None:
        refused = self._refused_in_a_row
        if self._is_first_rank:
            write_json(self._report_file, {"last_checkpoint_step": last, "skipped": refused})
        causes = " or ".join(sorted({entry["cause"] for entry in refused}))
        newest = f"the newest checkpoint is {checkpoint_name(last)}" if last else "there is no checkpoint yet"
        raise NumericsError(
            f"{len(refused)} steps in a row up to step {step} had a {causes}. Lower pretrain.optimizer.lr, lengthen "
            f"the warm-up, or use precision fp32; their samples stand in {self._report_file}, {newest}"
        )

    @property
    def is_healthy(self) -> bool:
        """Whether the last update was applied: a diverging model must not push out the last good checkpoint."""
        return not self._refused_in_a_row

    def forget(self) -> None:
        """Empty the window, where the loss may jump for a good reason: at the boundary of a phase."""
        self._window = Window(self._config.spike_window_steps)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for ``restore``: JSON values, all numbers exact."""
        window = {"losses": list(self._window.losses), "grad_norms": list(self._window.grad_norms)}
        return {**window, "num_refused": self.num_refused, "refused_in_a_row": list(self._refused_in_a_row)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``."""
        self.forget()
        for loss, norm in zip(state["losses"], state["grad_norms"], strict=True):
            self._window.add(loss, norm)
        self.num_refused, self._refused_in_a_row = state["num_refused"], list(state["refused_in_a_row"])


def _grad_norm(model: Any) -> float:
    import torch

    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
