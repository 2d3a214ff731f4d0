"""Who runs the graph of ``benchmarks.orchestration``, by which commands, and the environments of the peers.

Prefect.  Its defaults: the temporary server that it starts beside the flow, SQLite, tasks in threads, pickled results
in its home, its log.  Ours: ``persist_result``, because by default no result outlives the flow; a cache by inputs and
source, because the default policy has the id of the run in its key as well and so takes nothing over from a run before;
``max_workers``, by default without bound, to as many as there are cores, as on every side; two minutes instead of 20
seconds for its server to start, which times nothing unless it would have failed.

Metaflow.  Its defaults: the local datastore and metadata below the working directory, a process a task, its log, the
checks before a flow.  Ours: ``--max-workers``, by default 16, to as many as there are cores, as on every side;
``--max-num-splits``, by default 100, to what the fan-out has, because a wider one is refused; a user's name, because
it does not start without any.

Dagster.  Its defaults: ``dagster job execute``, whose executor spawns a process an op, file storage, its log.  Ours:
``max_concurrent`` at as many as there are cores, which is the default too.

All have a home of their own and tell nothing to anybody.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.orchestration_peers import metaflow_source
from benchmarks.process import ROOT

NUM_CORES = os.cpu_count() or 1
"""Tasks that run at a time, on every side: as many as an embedded Ray of ours takes."""
PEERS: Mapping[str, tuple[str, ...]] = {
    "prefect": ("prefect==3.8.8", "fastapi<0.140"),  # with a later FastAPI its server does not start
    "metaflow": ("metaflow==2.19.39",),
    "dagster": ("dagster==1.13.29",),
}
"""Name -> what is installed for it."""
DEFAULT_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlm" / "peers"
BODIES = "bodies.txt"
"""Where a run leaves a line for every body that it executes."""
_PROGRAMS = ROOT / "benchmarks" / "orchestration_peers"
_STAMP = "installed.txt"
_LOG_CHARS = 500


@dataclass(frozen=True)
class Graph:
    """A first stage, chains side by side and a last stage; or, with shards, a fan-out over them."""

    num_chains: int = 1
    length: int = 0
    """Stages of a chain."""
    num_shards: int = 0

    @property
    def kind(self) -> str:
        """What the programs call it."""
        return "shards" if self.num_shards else "stages"

    @property
    def num_results(self) -> int:
        """Stages; or shards, and their sum."""
        return self.num_shards + 1 if self.num_shards else self.num_chains * self.length + 2

    @property
    def value(self) -> int:
        """What the end has computed if everything before it ran: a stage adds 1 to the sum of its inputs."""
        if self.num_shards:
            return self.num_shards * (self.num_shards - 1) // 2
        return self.num_chains * (1 + self.length) + 1

    @property
    def env(self) -> dict[str, str]:
        """The sizes, for the programs."""
        sizes = {"CHAINS": self.num_chains, "LENGTH": self.length, "SHARDS": self.num_shards}
        return {f"BENCH_{name}": str(size) for name, size in sizes.items()}


Command = Callable[[Graph, Path], list[str]]
"""What is called for a graph in a directory; it may leave files there that the program needs."""


@dataclass(frozen=True)
class Side:
    """A way to run the graph."""

    command: Command
    again: Command | None = None
    """To be called when the graph is done, so that nothing has to be done again."""
    again_is: str = ""
    """What that is, in a word."""
    again_says: str = ""
    """Words in the log that show that something was taken over."""


def results(folder: Path) -> list[int]:
    """Numbers that were written below a directory: all results of ours and of bare Ray, the end's of the others."""
    return sorted(int(path.read_text()) for path in folder.rglob("value*.txt"))


def num_bodies(folder: Path) -> int:
    """How many bodies of stages and shards have been executed there, whoever wanted them."""
    path = folder / BODIES
    return len(path.read_text().split()) if path.exists() else 0


def env_of(folder: Path) -> dict[str, str]:
    """A home of its own for every program, nothing told to anybody, and a Ray as lean as ours."""
    return {
        "HOME": str(folder),
        "DO_NOT_TRACK": "1",
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "BENCH_CORES": str(NUM_CORES),
        "BENCH_BODIES": str(folder / BODIES),
        "DAGSTER_HOME": str(folder),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "METAFLOW_USER": "benchmark",
        "METAFLOW_HOME": str(folder / "metaflow"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _ours(graph: Graph, folder: Path) -> list[str]:
    recipe = f"benchmarks.orchestration_stages.recipe:{graph.kind}"
    return [sys.executable, "-m", "workflows.cli", "run", recipe, "--store", str(folder / "store")]


def _bare_ray(graph: Graph, folder: Path) -> list[str]:
    return [sys.executable, str(_PROGRAMS / "bare_ray.py"), graph.kind]


OURS, BARE_RAY = "ours", "bare Ray"
BASE: Mapping[str, Side] = {
    OURS: Side(_ours, _ours, "cached", "cached"),
    BARE_RAY: Side(_bare_ray),
}
"""The sides that need no other environment."""


def peer(name: str, python: Path) -> Side:
    """A peer, run by the Python of its environment."""
    if name == "prefect":

        def prefect(graph: Graph, folder: Path) -> list[str]:
            return [str(python), str(_PROGRAMS / "prefect_flow.py"), graph.kind]

        return Side(prefect, prefect, "cached", "Cached(")
    if name == "metaflow":

        def metaflow(graph: Graph, folder: Path, verb: str = "run") -> list[str]:
            source = metaflow_source.shards if graph.num_shards else metaflow_source.stages
            sizes = (graph.num_shards,) if graph.num_shards else (graph.num_chains, graph.length)
            (folder / "flow.py").write_text(source(*sizes))
            limits = ["--max-workers", str(NUM_CORES), "--max-num-splits", str(graph.num_results)]
            return [str(python), "flow.py", verb, *limits]

        return Side(metaflow, lambda graph, folder: metaflow(graph, folder, "resume"), "resume", "Cloning")
    assert name == "dagster", name

    def dagster(graph: Graph, folder: Path) -> list[str]:
        limits = folder / "limits.yaml"
        limits.write_text(f"execution: {{config: {{multiprocess: {{max_concurrent: {NUM_CORES}}}}}}}\n")
        job = ["-f", str(_PROGRAMS / "dagster_job.py"), "-a", graph.kind]
        return [str(python.with_name("dagster")), "job", "execute", *job, "-c", str(limits)]

    return Side(dagster)


def python_of(name: str, folder: Path) -> Path | None:
    """The Python of a peer's environment; None if it is not there, or holds other versions."""
    stamp = folder / name / _STAMP
    is_there = stamp.exists() and stamp.read_text().split() == list(PEERS[name])
    return folder / name / "bin" / "python" if is_there else None


def install(name: str, folder: Path) -> str:
    """Make the environment of a peer; why that failed, or nothing."""
    where = folder / name
    python = str(where / "bin" / "python")
    commands = (
        [sys.executable, "-m", "venv", "--clear", str(where)],
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *PEERS[name]],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr or done.stdout)[-_LOG_CHARS:].strip()
    (where / _STAMP).write_text("\n".join(PEERS[name]))
    return ""
