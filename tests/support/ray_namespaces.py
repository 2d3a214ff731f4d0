"""A Ray cluster whose nodes are network namespaces of this machine, each with an address of its own.

They share the file system but for Ray's own directory, as machines with a shared disk do.  Needs to be root.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tests.support.ray_cluster import ROOT, cluster_env
from tests.support.ray_token import TOKEN
from tests.support.toy_workflow import wait_until

_PORT, _DASHBOARD_PORT = 6399, 8299
_OBJECT_STORE = 80 * 2**20


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def can_make_namespaces() -> bool:
    """Whether this machine lets us make network namespaces and bridges."""
    name = f"dlmtry{secrets.token_hex(2)}"
    try:
        _ip("link", "add", name, "type", "bridge")
        _ip("link", "del", name)
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@dataclass
class Machine:
    """A namespace with a node of Ray."""

    name: str
    address: str
    process: "subprocess.Popen[bytes] | None" = None

    def start_ray(self, head: "Machine", cpus: float) -> None:
        """Start a node: the head if it is this one."""
        where = (
            ["--head", "--port", str(_PORT), "--dashboard-host", self.address, "--dashboard-port", str(_DASHBOARD_PORT)]
            if head is self
            else ["--address", f"{head.address}:{_PORT}"]
        )
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        options = ["--node-ip-address", self.address, "--num-cpus", str(cpus)]
        options += ["--object-store-memory", str(_OBJECT_STORE)]
        own_ray = 'mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && exec "$@"'
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, "unshare", "-m", "sh", "-c", own_ray, "sh", *ray, *options, *where],
            env={**cluster_env(), "RAY_health_check_failure_threshold": "3", "RAY_health_check_timeout_ms": "2000"},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def pids(self) -> set[int]:
        """Processes in the namespace."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return set(map(int, found.stdout.split()))

    def lose_power(self) -> None:
        """Kill everything on it."""
        for _ in range(3):
            for pid in self.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
            time.sleep(0.2)
        if self.process is not None:
            self.process.wait()

    def cut_off(self) -> None:
        """Pull the cable: everything on it goes on, alone."""
        _ip("netns", "exec", self.name, "ip", "link", "set", "eth0", "down")


@dataclass
class Machines:
    """Namespaces on one bridge."""

    dashboard: str
    machines: list[Machine] = field(default_factory=list)
    """The head first."""

    def machine_of(self, pid: int) -> Machine:
        """Where a process runs."""
        return next(machine for machine in self.machines if pid in machine.pids())

    def alive(self) -> int:
        """Nodes that the head believes to be alive."""
        request = urllib.request.Request(f"{self.dashboard}/api/v0/nodes", headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=5.0) as answer:
            rows = json.load(answer)["data"]["result"]["result"]
        return sum(row["state"] == "ALIVE" for row in rows)


@contextmanager
def machines(*cpus: float) -> Iterator[Machines]:
    """A cluster of a machine for each number of cores, the head first."""
    tag = secrets.token_hex(2)
    subnet = f"10.{77 + int(tag[:1], 16)}.{int(tag[1:3], 16)}"
    bridge, made = f"dlm{tag}", Machines(f"http://{subnet}.1:{_DASHBOARD_PORT}")
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{subnet}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number, _ in enumerate(cpus, 1):
            machine = Machine(f"{bridge}n{number}", f"{subnet}.{number}")
            made.machines.append(machine)
            outside = f"v{tag}{number}"
            _ip("netns", "add", machine.name)
            _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", machine.name)
            _ip("link", "set", outside, "master", bridge)
            _ip("link", "set", outside, "up")
            within = ("netns", "exec", machine.name, "ip")
            _ip(*within, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip(*within, "link", "set", device, "up")
        for number, (machine, num_cpus) in enumerate(zip(made.machines, cpus, strict=True)):
            machine.start_ray(made.machines[0], num_cpus)
            wait_until(lambda number=number: _alive_or_zero(made) > number, f"node {number} is there", 90.0)
        yield made
    finally:
        for machine in made.machines:
            machine.lose_power()
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", machine.name)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", bridge)


def _alive_or_zero(made: Machines) -> int:
    try:
        return made.alive()
    except OSError:
        return 0
