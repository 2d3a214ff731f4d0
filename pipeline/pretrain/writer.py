"""DeepSpeed's writer of checkpoint files, made safe to fail on one rank.  Imports DeepSpeed: import it late."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

WriteError = OSError | RuntimeError
"""torch.save reports a short write as a RuntimeError."""


class PatientWriter(TorchCheckpointEngine):
    """Keeps the first failure instead of raising it.

    ``save_checkpoint`` ends in a barrier: a rank that left it early would keep the others there until their
    time-out.
    """

    def __init__(self, zipfile_serialization: bool) -> None:
        super().__init__()
        self.zipfile_serialization = zipfile_serialization
        self.problem: WriteError | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a directory."""
        self._attempt(lambda: super(PatientWriter, self).makedirs(path, exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file."""
        self._attempt(lambda: super(PatientWriter, self).save(state_dict, path))

    def _attempt(self, write: Callable[[], None]) -> None:
        if self.problem is not None:
            return
        try:
            write()
        except (OSError, RuntimeError) as error:
            self.problem = error


def install_writer(engine: Any) -> None:
    """Make an engine write with a PatientWriter, and without the executable scripts it would put beside its files."""
    engine.checkpoint_engine = PatientWriter(engine.checkpoint_engine.zipfile_serialization)
    engine._copy_recovery_script = lambda save_path: None


def write_checkpoint(engine: Any, directory: Path, tag: str, client_state: Mapping[str, Any]) -> WriteError | None:
    """Write this rank's files, in step with all other ranks; returns what went wrong here."""
    writer = engine.checkpoint_engine
    writer.problem = None
    engine.save_checkpoint(str(directory), tag=tag, client_state=dict(client_state), save_latest=False)
    return writer.problem
