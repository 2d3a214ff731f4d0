"""The GPUs of a machine: as the driver lists them, and as torch can use them.

torch is asked in a process of its own, ``python -m cluster.gpus``: a broken driver hangs whoever calls it.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

_SMI_S, _TORCH_S = 20.0, 60.0
_QUERY = "name,memory.total,driver_version,mig.mode.current"
_MESSAGE_CHARS = 300


@dataclass(frozen=True)
class DriverGpu:
    """A GPU that the driver lists."""

    name: str
    memory_mib: int
    driver: str
    has_mig: bool
    """Whether it is divided into instances."""


@dataclass(frozen=True)
class TorchGpu:
    """A device that torch lists; the error of using it, if there was one."""

    name: str
    error: str = ""


@dataclass(frozen=True)
class GpusFound:
    """What a machine has."""

    listed: tuple[DriverGpu, ...] = ()
    listing_error: str = ""
    """Why the driver could not be asked, where there are devices of it."""
    torch_build: str = ""
    cuda: str = ""
    """That torch was built for; empty for none."""
    usable: tuple[TorchGpu, ...] = ()
    torch_error: str = ""


def find_gpus() -> GpusFound:
    """Ask the driver and torch."""
    listed, listing_error = _ask_driver()
    if not listed and not listing_error:
        return GpusFound()  # torch takes seconds to say the same
    env = {name: value for name, value in os.environ.items() if not _hides_devices(name)}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "cluster.gpus"]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_TORCH_S, check=False)
    except subprocess.TimeoutExpired:
        return GpusFound(listed, listing_error, torch_error=f"torch did not list its devices within {_TORCH_S:.0f} s")
    answer = next((line for line in done.stdout.splitlines() if line.startswith("{")), "")
    if not answer:
        words = done.stderr.strip().splitlines()
        error = words[-1][:_MESSAGE_CHARS] if words else f"exit code {done.returncode}"
        return GpusFound(listed, listing_error, torch_error=error)
    value = json.loads(answer)
    usable = tuple(TorchGpu(**one) for one in value.pop("usable"))
    return GpusFound(listed, listing_error, usable=usable, **value)


def visible_gpus() -> int:
    """GPUs that a process started now would find, by what the driver lists and the environment leaves of it."""
    listed = len(_ask_driver()[0])
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not listed or chosen is None:
        return listed
    return min(listed, sum(bool(one.strip()) and one.strip() != "-1" for one in chosen.split(",")))


def _hides_devices(name: str) -> bool:
    """Ray sets this for workers that asked for no GPU."""
    return name == "CUDA_VISIBLE_DEVICES" and "RAY_JOB_ID" in os.environ


def _ask_driver() -> tuple[tuple[DriverGpu, ...], str]:
    tool = shutil.which("nvidia-smi")
    has_devices = Path("/dev/nvidiactl").exists()
    if tool is None:
        return (), "nvidia-smi is not installed" if has_devices else ""
    command = [tool, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S, check=False)
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi did not answer within {_SMI_S:.0f} s"
    if done.returncode:
        words = (done.stdout + done.stderr).strip().splitlines()
        return (), (words[-1] if words else f"nvidia-smi ended with {done.returncode}")[:_MESSAGE_CHARS]
    return tuple(_parsed(line) for line in done.stdout.splitlines() if line.strip()), ""


def _parsed(line: str) -> DriverGpu:
    name, memory_mib, driver, mig = (part.strip() for part in line.split(","))
    return DriverGpu(name, int(memory_mib) if memory_mib.isdigit() else 0, driver, mig == "Enabled")


def main() -> None:
    """Print what torch can use, as JSON."""
    import torch

    usable: list[TorchGpu] = []
    for number in range(torch.cuda.device_count() if torch.version.cuda else 0):
        try:
            name = torch.cuda.get_device_name(number)
            torch.ones(8, device=f"cuda:{number}").sum().item()
            usable.append(TorchGpu(name))
        except RuntimeError as error:
            usable.append(TorchGpu(f"cuda:{number}", str(error).splitlines()[0][:_MESSAGE_CHARS]))
    error = ""
    if torch.version.cuda and not usable:
        try:
            torch.cuda.init()
        except RuntimeError as reason:
            error = str(reason).splitlines()[0][:_MESSAGE_CHARS]
    found = GpusFound(
        torch_build=torch.__version__, cuda=torch.version.cuda or "", usable=tuple(usable), torch_error=error
    )
    value = {key: item for key, item in asdict(found).items() if key not in ("listed", "listing_error")}
    print(json.dumps(value), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
