"""What the nodes of a Ray cluster have, how much of it is free, and which are about to be taken away.

Ray tells some of this to its own libraries only; whatever is asked of its private side is asked here.
"""

import argparse
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.executor import Call, Shortage

_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Node:
    """One living node that is not about to be taken away."""

    node_id: str
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float


def draining_nodes() -> set[str]:
    """Ids of the nodes that will be taken away."""
    import ray._private.state

    return set(ray._private.state.state.get_draining_nodes() or {})


def nodes() -> list[Node]:
    """The nodes that calls can be started on."""
    import ray
    import ray._private.state

    free = ray._private.state.available_resources_per_node()
    draining = draining_nodes()
    found: list[Node] = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in draining:
            has, left = node["Resources"], free.get(node["NodeID"], {})
            found.append(
                Node(
                    node["NodeID"],
                    has.get("CPU", 0.0),
                    has.get("GPU", 0.0),
                    left.get("CPU", 0.0),
                    left.get("GPU", 0.0),
                )
            )
    return found


def has_gpus(found: Sequence[Node]) -> bool:
    """Whether any node has a GPU."""
    return any(node.gpus for node in found)


class Demand:
    """Room for all ranks of a gang, asked of the autoscaler if the cluster has one: a placement group that waits.

    What several gangs ask for adds up.  ``ray.autoscaler.sdk.request_resources`` would keep one value for the whole
    cluster, past its end, and count what others already use.
    """

    def __init__(self, name: str) -> None:
        """``name`` is its own: by it ``withdraw_demand`` finds what was left."""
        self._name = name
        self._group: Any = None
        self._asked: tuple[int, float, float] | None = None

    def ask(self, ranks: int, cpus: float, gpus: float) -> None:
        """Ask for so many processes, instead of what was asked for before."""
        if self._asked == (ranks, cpus, gpus):
            return
        from ray.util import placement_group

        self.withdraw()
        each = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
        self._group = placement_group([each] * ranks, strategy="PACK", name=self._name)
        self._asked = (ranks, cpus, gpus)

    def is_met(self, ranks: int, cpus: float, gpus: float) -> bool:
        """Whether just this was asked for and is there; it is held then, until it is withdrawn."""
        from ray.util import placement_group_table

        return self._asked == (ranks, cpus, gpus) and placement_group_table(self._group).get("state") == "CREATED"

    def withdraw(self) -> None:
        """Ask no longer."""
        from ray.util import remove_placement_group

        if self._group is not None:
            remove_placement_group(self._group)
            self._group = self._asked = None


def withdraw_demand(name: str) -> None:
    """Withdraw what a process asked for that was killed: Ray itself would wait for the end of the job."""
    from ray.util import get_placement_group, remove_placement_group

    try:
        left = get_placement_group(name)
    except ValueError:  # Ray's word for none of that name: it was withdrawn
        return
    remove_placement_group(left)


def ranks_that_fit(found: Sequence[Node], cpus: float, gpus: float, *, free: bool) -> int:
    """How many processes with so many cores and GPUs the nodes hold, with what is free or with all they have."""

    def on(node: Node) -> int:
        have = [(node.free_cpus if free else node.cpus, cpus), (node.free_gpus if free else node.gpus, gpus)]
        return min((int(has / wanted + 1e-9) for has, wanted in have if wanted > 0), default=10**6)

    return sum(on(node) for node in found)


def shortage(call: Call, found: Sequence[Node]) -> Shortage | None:
    """Why a call cannot begin on these nodes; None if nothing is missing."""
    ranks = call.gang_sizes[0] if call.gang_sizes else 1
    gpus = float(call.wants_gpus or has_gpus(found)) if call.gang_sizes else call.gpus
    each = _amount(call.cpus, gpus)
    wants = f"{ranks} workers with {each} each" if ranks > 1 else each
    if ranks_that_fit(found, call.cpus, gpus, free=False) < ranks:
        total = _amount(sum(node.cpus for node in found), sum(node.gpus for node in found))
        most = max(found, key=lambda node: (node.gpus, node.cpus), default=None)
        largest = f", {_amount(most.cpus, most.gpus)} on the largest" if most and len(found) > 1 else ""
        where = "1 node" if len(found) == 1 else f"{len(found)} nodes"
        return Shortage(f"wants {wants}; the cluster has {total} on {where}{largest}", is_beyond=True)
    if ranks_that_fit(found, call.cpus, gpus, free=True) < ranks:
        left = _amount(sum(node.free_cpus for node in found), sum(node.free_gpus for node in found))
        return Shortage(f"wants {wants}; free are {left}", is_beyond=False)
    return None


def _amount(cpus: float, gpus: float) -> str:
    cores = f"{cpus:g} core{'' if cpus == 1 else 's'}"
    return f"{cores} and {gpus:g} GPU{'' if gpus == 1 else 's'}" if gpus else cores


def drain_notice(watched: Collection[str]) -> Callable[[], str]:
    """Tells whether one of these nodes will be taken away, looking once a second at most."""
    next_s, told = 0.0, ""

    def notice() -> str:
        nonlocal next_s, told
        now = time.monotonic()
        if not told and now >= next_s:
            next_s = now + _LOOK_EVERY_S
            if leaving := draining_nodes() & set(watched):
                told = f"node {min(leaving)[:12]} is being taken away"
        return told

    return notice


def remove_placement_groups(*, of_the_dead: bool) -> None:
    """Free what placement groups hold, all or those whose creator has died: Ray itself waits for the end of the job."""
    import ray._private.state
    from ray._raylet import PlacementGroupID
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # pyright: ignore
    from ray.util import remove_placement_group
    from ray.util.placement_group import PlacementGroup

    # The public table does not tell who made a group, nor whether that lives.
    for record in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(record)
        if group.state != PlacementGroupTableData.REMOVED and (group.creator_actor_dead or not of_the_dead):
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def wait_for_nodes(count: int, within_s: float) -> int:
    """How many nodes there are, once they are so many or the time is over."""
    deadline = time.monotonic() + within_s
    while (found := len(nodes())) < count and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Wait for the nodes of the cluster that this machine is part of; says so if fewer come: a run may do with them."""
    from cluster.connect import connect

    parser = argparse.ArgumentParser(prog="python -m cluster.nodes", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--wait-for", type=int, required=True, metavar="NODES")
    parser.add_argument("--within", type=float, required=True, metavar="SECONDS")
    given = parser.parse_args(words)
    connect()
    found = wait_for_nodes(given.wait_for, given.within)
    if found < given.wait_for:
        told = f"{found} of {given.wait_for} nodes are there after {given.within:g} s: the run begins with these"
        print(told, file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
