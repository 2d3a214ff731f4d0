"""Metrics of a training stage: a local JSONL file as the source of truth, beside it lines to read and Weights & Biases.

Weights & Biases may be absent, unreachable or broken; training never notices.

Every row is sent as soon as it is written, and none twice: a resumed training goes on after the last row that Weights
& Biases has of it, wherever its checkpoint stands.  Rows that a kill lost on their way are sent again from the local
file; steps that are trained again after a kill give the rows that were sent.  (Holding rows back until a checkpoint
makes them final would need no look at what arrived, but show a training live only once in a checkpoint interval, and
still lose those that a killed process had not passed on.)
"""

import json
import netrc
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.artifact import write_atomic
from pipeline.wandb_file import next_step

_INIT_TIMEOUT_S = 20.0
_FINISH_TIMEOUT_S = 20.0
_FINISH_SLACK_S = 5.0
"""Beyond what wandb promises for itself."""
_WANDB_HOST = "api.wandb.ai"
_AXIS = "train/step"
_LINE_EVERY_S = 1.0
"""Quick steps give no line each: a log in a bucket goes up whole each time, and the metrics have every step."""


class MetricsLog:
    """One JSON object a line, each with its "step"; rewound to the step that a run resumes from."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.missing: list[range] = []
        """Steps before the one to resume from that have no line: the file was cut or lost by others."""
        write_atomic(path, self._kept(path, resume_step))
        self._path = path
        self._file = path.open("a")
        self._closing = threading.Lock()

    def _kept(self, path: Path, resume_step: int) -> Iterator[bytes]:
        next_step = 0
        for values, line in whole_lines(path, resume_step):
            if values["step"] > next_step:
                self.missing.append(range(next_step, values["step"]))
            next_step = values["step"] + 1
            yield line.encode()
        if next_step < resume_step:
            self.missing.append(range(next_step, resume_step))

    def write(self, values: Mapping[str, Any]) -> None:
        """Append the values of one step."""
        self._file.write(json.dumps(dict(values), allow_nan=False) + "\n")
        self._file.flush()

    def rows(self, first_step: int) -> Iterator[dict[str, Any]]:
        """What was written of ``first_step`` and the steps after it."""
        with self._path.open() as file:
            rows = (json.loads(line) for line in file)
            yield from (row for row in rows if row["step"] >= first_step)

    def sync(self) -> None:
        """Bring what was written to the disk, where a log that was closed is already; any thread may ask for it."""
        with self._closing:
            if not self._file.closed:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush to disk and close."""
        self.sync()
        with self._closing:
            self._file.close()


def whole_lines(path: Path, stop_step: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Values and text of each line, of steps before ``stop_step`` and in their order; nothing if there is no file.

    Left out is what is no whole line of the next steps: a kill or a power cut may leave half of one.
    """
    if not path.exists():
        return
    next_step = 0
    with path.open(errors="replace", newline="\n") as file:
        for line in file:
            try:
                values = json.loads(line)
                step = values["step"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
            if isinstance(step, int) and next_step <= step < stop_step and line.endswith("\n"):
                next_step = step + 1
                yield values, line


def told(steps: Sequence[range], most: int = 5) -> str:
    """Stretches of steps as a person writes them."""
    some = [f"{s[0]} to {s[-1]}" if len(s) > 1 else f"{s[0]}" for s in steps[:most]]
    return ", ".join(some) + (f" and {len(steps) - most} more stretches" if len(steps) > most else "")


def is_logged_in() -> bool:
    """Whether a key for Weights & Biases is at hand: WANDB_API_KEY, or an entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(_WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbRun:
    """A Weights & Biases run that can fail without consequences; the reason goes to ``warn``, once.

    One run a training stage, with the stage's fingerprint as its stable id, so that all attempts draw one curve;
    one group a workflow run.  Offline unless the user is logged in or WANDB_MODE says otherwise.
    """

    def __init__(
        self,
        directory: Path,
        run_id: str,
        group: str,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._warn_of = warn
        self._run: Any = None
        self.next_step = 0
        """The first step of which it has no row."""
        mode = os.environ.get("WANDB_MODE") or ("online" if is_logged_in() else "offline")
        details = {"id": run_id, "name": f"{group}/{run_id}", "group": group, "config": dict(config)}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._run = self._start(mode, directory, details)
            self.next_step = next_step(directory, run_id, _AXIS) if self._run.offline else self._run.starting_step
        except Exception as error:  # noqa: BLE001 - an outage of a tracker must never stop training
            self._give_up(error)

    def _start(self, mode: str, directory: Path, details: dict[str, Any]) -> Any:
        """Open the run; offline if it cannot be opened online."""
        import wandb

        settings = wandb.Settings(
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=_FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            console="off",
            silent=True,
            x_disable_stats=True,
        )
        try:
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "dlm"),
                resume="allow",
                mode=mode,  # pyright: ignore[reportArgumentType]
                dir=str(directory),
                settings=settings,
                **details,
            )
        except Exception as error:  # whatever it raises, the local files can still be written
            if mode == "offline":
                raise
            self._warn("Weights & Biases cannot be used online, continuing offline", error)
            wandb.teardown()  # it would go on holding the run's id
            return self._start("offline", directory, details)
        run.define_metric("train/*", step_metric=_AXIS)
        return run

    def _give_up(self, error: BaseException) -> None:
        self._run = None
        self._warn("Weights & Biases is off for the rest of this stage", error)

    def _warn(self, what: str, error: BaseException) -> None:
        reason = " ".join(str(error).split())
        if key := os.environ.get("WANDB_API_KEY"):
            reason = reason.replace(key, "[the API key]")
        self._warn_of(f"{what}: {type(error).__name__}: {reason}")

    def log(self, values: Mapping[str, Any]) -> None:
        """Send the values of one step, unless they were sent before a resume."""
        step: int = values["step"]
        if self._run is None or step < self.next_step:
            return
        try:
            self._run.log({f"train/{key}": value for key, value in values.items()}, step=step, commit=True)
            self.next_step = step + 1
        except Exception as error:  # noqa: BLE001 - as above
            self._give_up(error)

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Set values of the run as a whole."""
        if self._run is None:
            return
        try:
            self._run.summary.update(dict(values))
        except Exception as error:  # noqa: BLE001 - as above
            self._give_up(error)

    def finish(self) -> None:
        """Close the run, for at most a bounded time."""
        if self._run is None:
            return
        thread = threading.Thread(target=self._finish_quietly, daemon=True)
        thread.start()
        thread.join(_FINISH_TIMEOUT_S + _FINISH_SLACK_S)
        if thread.is_alive():
            self._unfinished(TimeoutError(f"after {_FINISH_TIMEOUT_S + _FINISH_SLACK_S:.0f} s"))

    def _finish_quietly(self) -> None:
        try:
            self._run.finish()
        except Exception as error:  # noqa: BLE001 - as above
            self._unfinished(error)

    def _unfinished(self, error: BaseException) -> None:
        self._warn("Weights & Biases did not take everything; send it what is on the disk with: wandb sync", error)


class StepLines:
    """Lines for whoever reads along: of a step at most every second, of one that was validated and of the last."""

    def __init__(self, num_steps: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._num_steps, self._clock_s = num_steps, clock_s
        self._next_s = 0.0

    def tell(self, values: Mapping[str, Any]) -> None:
        """Print what a step measured, if it is due."""
        is_wanted = values["step"] + 1 == self._num_steps or any(key in values for key in _VALIDATED)
        if is_wanted or self._clock_s() >= self._next_s:
            self._next_s = self._clock_s() + _LINE_EVERY_S
            print(step_line(values, self._num_steps), flush=True)  # noqa: T201


_VALIDATED = {"val_nelbo": "NELBO", "val_nll": "loss"}


def step_line(values: Mapping[str, Any], num_steps: int) -> str:
    """The figures of a step that a person follows, as "20/300 steps  loss 6.3798 nats/token  …"."""
    parts = [f"{values['step'] + 1:,}/{num_steps:,} steps", _nats("loss", values["loss"])]
    if values["grad_norm"] is not None:
        parts.append(f"gradient norm {values['grad_norm']:.3g}")
    parts += [f"lr {values['lr']:.3g}", f"{values['tokens_per_s']:,.0f} tokens/s"]
    for key, name in _VALIDATED.items():
        if key in values:
            parts.append(_nats(f"validation {name}", values[key], values.get(f"{key}_mc_se")))
    return "  ".join(parts)


def _nats(name: str, value: float | None, error: float | None = None) -> str:
    if value is None:
        return f"{name} not finite"
    return f"{name} {value:.4f}{'' if error is None else f' ± {error:.4f}'} nats/token"


class Tracker:
    """The local log, lines to read along and, if wanted, Weights & Biases; rank 0 only."""

    def __init__(self, log: MetricsLog, wandb_run: WandbRun | None, lines: StepLines | None = None) -> None:
        self._log = log
        self._wandb_run = wandb_run
        self._lines = lines
        if wandb_run is not None:
            for row in log.rows(wandb_run.next_step):
                wandb_run.log(row)

    def write(self, values: Mapping[str, Any]) -> None:
        """Record the values of one step."""
        self._log.write(values)
        if self._lines is not None:
            self._lines.tell(values)
        if self._wandb_run is not None:
            self._wandb_run.log(values)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()
