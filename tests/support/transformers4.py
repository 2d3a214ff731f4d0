"""transformers 4.57 beside the installed one: a folder to put in front of PYTHONPATH."""

import fcntl
import subprocess
import sys
from pathlib import Path

WANTED = ("transformers>=4.57,<4.58", "huggingface_hub<1", "tokenizers<0.23")


def install(folder: Path) -> Path:
    """The folder, with transformers 4.57 in it; installed by the first who asks.  It has no torch of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / ".installed"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of pytest may want it at once
        if not done.exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), *WANTED]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            done.touch()
    return folder
