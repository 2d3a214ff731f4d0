"""Asking every node of a cluster, or this machine alone, and waiting no longer than was said."""

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

from cluster.auth import AUTH_MODE, redacted, require_token
from cluster.connect import connect
from cluster.nodes import draining_nodes

T = TypeVar("T")
_ANSWER_S, _FETCH_S = 5.0, 60.0


@dataclass(frozen=True)
class Machine:
    """One that can be asked."""

    name: str
    host: str
    """The address that others reach it by."""
    cpus: float = 0.0
    gpus: int = 0
    has_free_gpus: bool = True
    """Whether nobody uses any of them."""
    is_leaving: bool = False
    """Whether it is about to be taken away."""


@dataclass(frozen=True)
class Question(Generic[T]):
    """A function and what it gets, for one machine."""

    machine: Machine
    function: Callable[..., T]
    arguments: tuple[Any, ...] = ()
    gpus: int = 0


@dataclass(frozen=True)
class Reply(Generic[T]):
    """What a machine answered, or why it did not."""

    machine: Machine
    value: T | None = None
    error: str = ""


class Machines(Protocol):
    """Where questions are asked."""

    @property
    def machines(self) -> tuple[Machine, ...]:
        """Those that can be asked, the first one being that of this process where it is among them."""
        ...

    @property
    def dashboard(self) -> tuple[str, int] | None:
        """Where the dashboard of a cluster listens."""
        ...

    @property
    def gcs(self) -> str:
        """Address of what holds a cluster together; empty where there is none."""
        ...

    def ask(self, questions: Sequence[Question[T]], within_s: float) -> list[Reply[T]]:
        """Ask all at once; a machine that says nothing in time has a reply that tells so."""
        ...


def _silence(within_s: float) -> str:
    return f"did not answer within {within_s:.0f} s"


class ThisMachine(Machines):
    """No cluster: threads that are left alone when they hang, as a dead network file system makes them."""

    @property
    def machines(self) -> tuple[Machine, ...]:
        """One."""
        return (Machine(socket.gethostname(), "127.0.0.1"),)

    @property
    def dashboard(self) -> None:
        """There is none that belongs to it."""
        return

    @property
    def gcs(self) -> str:
        """There is none."""
        return ""

    def ask(self, questions: Sequence[Question[T]], within_s: float) -> list[Reply[T]]:
        """Each in a thread of its own."""
        replies = [Reply[T](question.machine, error=_silence(within_s)) for question in questions]

        def answer(number: int, question: Question[T]) -> None:
            try:
                replies[number] = Reply(question.machine, question.function(*question.arguments))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
                replies[number] = Reply(question.machine, error=_told(error))

        threads = [threading.Thread(target=answer, args=pair, daemon=True) for pair in enumerate(questions)]
        deadline = time.monotonic() + within_s
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return list(replies)


class ClusterNodes(Machines):
    """The nodes of the Ray cluster that this machine is part of, asked by tasks that need none of its cores."""

    def __init__(self) -> None:
        """Connect.  AuthError without the cluster's token, ClusterError if there is none."""
        if require_token("auto") is not None:
            os.environ.update(AUTH_MODE)
        import ray

        self._ray = ray
        about: Any = connect()
        url = urlsplit(f"//{about.dashboard_url}") if about.dashboard_url else None
        self._dashboard = (url.hostname, url.port) if url and url.hostname and url.port else None
        self._gcs: str = about.address_info["gcs_address"]
        self._ids: dict[str, str] = {}
        self._machines = tuple(self._find())

    def _find(self) -> list[Machine]:
        import ray._private.state

        free = ray._private.state.available_resources_per_node()
        leaving = draining_nodes()
        own = self._ray.get_runtime_context().get_node_id()
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        hosts = [node["NodeManagerHostname"] for node in alive]
        found: list[Machine] = []
        for node in sorted(alive, key=lambda node: (node["NodeID"] != own, node["NodeID"])):
            host, node_id, has = node["NodeManagerHostname"], node["NodeID"], node["Resources"]
            name = host if hosts.count(host) == 1 else f"{host}/{node_id[:6]}"
            self._ids[name] = node_id
            gpus = int(has.get("GPU", 0))
            idle = free.get(node_id, {}).get("GPU", 0.0) >= gpus
            address = node["NodeManagerAddress"]
            found.append(Machine(name, address, has.get("CPU", 0.0), gpus, idle, node_id in leaving))
        return found

    @property
    def machines(self) -> tuple[Machine, ...]:
        """The nodes that were alive at first."""
        return self._machines

    @property
    def dashboard(self) -> tuple[str, int] | None:
        """As the head tells it."""
        return self._dashboard

    @property
    def gcs(self) -> str:
        """Where this process has joined."""
        return self._gcs

    def ask(self, questions: Sequence[Question[T]], within_s: float) -> list[Reply[T]]:
        """Each by a task on its node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        refs: list[Any] = []
        for question in questions:
            there = NodeAffinitySchedulingStrategy(self._ids[question.machine.name], soft=False)
            task = self._ray.remote(question.function).options(
                num_cpus=0, num_gpus=question.gpus, max_retries=0, scheduling_strategy=there, name="doctor"
            )
            refs.append(task.remote(*question.arguments))
        ready, late = self._ray.wait(refs, num_returns=len(refs), timeout=within_s)
        for ref in late:
            self._ray.cancel(ref, force=True)
        return [
            self._reply(question.machine, ref) if ref in ready else Reply[T](question.machine, error=_silence(within_s))
            for question, ref in zip(questions, refs, strict=True)
        ]

    def _reply(self, machine: Machine, ref: Any) -> Reply[Any]:
        from ray.exceptions import RayError

        try:
            return Reply(machine, self._ray.get(ref, timeout=_FETCH_S))
        except (RayError, ImportError) as error:
            return Reply(machine, error=_told(error))


def _told(error: BaseException) -> str:
    """The error in one line; of what was raised on a node, the last line, without the traceback before it."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redacted(f"{type(error).__name__}: {lines[-1] if lines else ''}")
