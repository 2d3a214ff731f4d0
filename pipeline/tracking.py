"""Metrics of a training stage: a local JSONL file as the source of truth, Weights & Biases beside it.

Weights & Biases may be absent, unreachable or broken; training never notices.
"""

import json
import netrc
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.artifact import write_atomic

_INIT_TIMEOUT_S = 20.0
_FINISH_TIMEOUT_S = 20.0
_WANDB_HOST = "api.wandb.ai"


class MetricsLog:
    """One JSON object a line, each with its "step"; rewound to the step that a run resumes from."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [line for step, line in _complete_lines(path) if step < resume_step]
        write_atomic(path, "".join(line + "\n" for line in kept).encode())
        self.last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        """Values of the last step before the one to resume from."""
        self._file = path.open("a")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append the values of one step."""
        self._file.write(json.dumps(dict(values), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring what was written to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush to disk and close."""
        self.sync()
        self._file.close()


def _complete_lines(path: Path) -> list[tuple[int, str]]:
    """(step, line) up to the first line that is not whole; a kill or a power cut may leave half of one."""
    if not path.exists():
        return []
    lines: list[tuple[int, str]] = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        if not line.endswith("\n"):
            break
        lines.append((step, line.rstrip("\n")))
    return lines


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
        self._warn = warn
        self._run: Any = None
        mode = os.environ.get("WANDB_MODE") or ("online" if is_logged_in() else "offline")
        details = {"id": run_id, "name": f"{group}/{run_id}", "group": group, "config": dict(config)}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._run = self._start(mode, directory, details)
        except Exception as error:  # noqa: BLE001 - an outage of a tracker must never stop training
            self._give_up(error)

    def _start(self, mode: str, directory: Path, details: dict[str, Any]) -> Any:
        """Open the run; offline if it cannot be opened online."""
        import wandb

        settings = wandb.Settings(init_timeout=_INIT_TIMEOUT_S, console="off", silent=True, x_disable_stats=True)
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
            reason = " ".join(str(error).split())
            self._warn(f"Weights & Biases cannot be reached, continuing offline: {type(error).__name__}: {reason}")
            wandb.teardown()  # it would go on holding the run's id
            return self._start("offline", directory, details)
        run.define_metric("train/*", step_metric="train/step")
        return run

    def _give_up(self, error: BaseException) -> None:
        self._run = None
        self._warn(f"Weights & Biases is off for the rest of this stage: {type(error).__name__}: {error}")

    def log(self, values: Mapping[str, Any]) -> None:
        """Send the values of one step."""
        if self._run is None:
            return
        try:
            self._run.log({f"train/{key}": value for key, value in values.items()})
        except Exception as error:  # noqa: BLE001 - as above
            self._give_up(error)

    def finish(self) -> None:
        """Close the run, for at most a bounded time."""
        if self._run is None:
            return
        thread = threading.Thread(target=self._finish_quietly, daemon=True)
        thread.start()
        thread.join(_FINISH_TIMEOUT_S)
        if thread.is_alive():
            self._warn("Weights & Biases did not finish in time; sync the offline run later with: wandb sync")

    def _finish_quietly(self) -> None:
        try:
            self._run.finish()
        except Exception as error:  # noqa: BLE001 - as above
            self._give_up(error)


class Tracker:
    """The local log and, if wanted, Weights & Biases; rank 0 only."""

    def __init__(self, log: MetricsLog, wandb_run: WandbRun | None) -> None:
        self._log = log
        self._wandb_run = wandb_run

    def write(self, values: Mapping[str, Any]) -> None:
        """Record the values of one step."""
        self._log.write(values)
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
