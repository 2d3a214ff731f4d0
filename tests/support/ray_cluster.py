"""A Ray cluster of several nodes on this machine, in a process of its own, so that any part of it can be lost.

``python -m tests.support.ray_cluster HEAD_CPUS CPUS,CPUS,...`` starts it with the token in RAY_AUTH_TOKEN, prints
``{"dashboard", "gcs", "raylets"}`` as JSON and obeys lines: ``kill N`` a node without a word, ``add CPUS``, ``quit``.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.ray_token import TOKEN
from tests.support.toy_workflow import wait_until

ROOT = Path(__file__).parents[2]
_STORE_BYTES = 80 * 2**20


@dataclass
class Running:
    """A cluster and the process that holds it."""

    process: "subprocess.Popen[str]"
    dashboard: str
    gcs: str
    raylets: list[int]
    """Process ids, the head's first."""

    def tell(self, line: str) -> Any:
        """Have a command carried out; what it answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return _answer(self.process)

    def node_of(self, pid: int) -> int:
        """The number of the node that a process runs on; 0 is the head."""
        parents = {parent.pid for parent in psutil.Process(pid).parents()}
        return next(number for number, raylet in enumerate(self.raylets) if raylet in parents)

    def processes(self) -> list[psutil.Process]:
        """Everything that belongs to the cluster."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def lose(self) -> None:
        """Kill all of it at once, as a machine that loses power."""
        for process in [psutil.Process(self.process.pid), *self.processes()]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def _answer(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise AssertionError(f"the cluster has ended with {process.wait()}")


def cluster_env(token: str = TOKEN) -> dict[str, str]:
    """The environment of whoever talks to the cluster."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    home = Path(tempfile.gettempdir()) / "dlm-tests-home"  # a token in the user's own would be found
    home.mkdir(exist_ok=True)
    return {
        **clean,
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }


@contextmanager
def ray_cluster(head_cpus: float, *node_cpus: float) -> Iterator[Running]:
    """A cluster that is gone afterwards, whatever is left of it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.ray_cluster", str(head_cpus), ",".join(map(str, node_cpus))],
        cwd=ROOT,
        env=cluster_env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    found: list[psutil.Process] = []
    try:
        running = Running(process, **_answer(process))
        yield running
    finally:
        if process.poll() is None:
            found = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        for child in found:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        wait_until(lambda: not any(_is_alive(child) for child in found), "the cluster is gone", 30.0)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    """Hold a cluster."""
    from ray.cluster_utils import Cluster

    head_cpus, nodes_cpus = float(sys.argv[1]), [float(cpus) for cpus in sys.argv[2].split(",") if cpus]
    # Left alone, a head takes the same port for its agent as the head of any other cluster on the machine.
    common = {"object_store_memory": _STORE_BYTES, "dashboard_agent_listen_port": 0}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": head_cpus, "include_dashboard": True, "dashboard_port": 0, **common},
    )
    nodes: list[Any] = [cluster.head_node, *(cluster.add_node(num_cpus=cpus, **common) for cpus in nodes_cpus)]

    def say() -> None:
        url = cluster.head_node.address_info["webui_url"]
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        sys.stdout.write(json.dumps({"dashboard": f"http://{url}", "gcs": cluster.address, "raylets": raylets}) + "\n")
        sys.stdout.flush()

    say()
    for line in sys.stdin:
        match line.split():
            case ["kill", number]:
                node = nodes[int(number)]
                for child in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
                    child.kill()
                cluster.remove_node(node, allow_graceful=False)
                sys.stdout.write("{}\n")
            case ["add", cpus]:
                nodes.append(cluster.add_node(num_cpus=float(cpus), **common))
                say()
            case ["id", number]:
                sys.stdout.write(json.dumps({"id": nodes[int(number)].node_id}) + "\n")
            case _:
                return
        sys.stdout.flush()


if __name__ == "__main__":
    main()
