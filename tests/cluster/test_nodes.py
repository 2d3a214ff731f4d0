"""What nodes hold, and what is said where they hold too little."""

from pathlib import Path

import pytest

from cluster import gang
from cluster import nodes as module
from cluster.executor import Call
from cluster.nodes import Demand, Node, has_gpus, ranks_that_fit, shortage


def node(cpus: float, gpus: float = 0.0, free_cpus: float | None = None, free_gpus: float | None = None) -> Node:
    free = (cpus if free_cpus is None else free_cpus, gpus if free_gpus is None else free_gpus)
    return Node("n", cpus, gpus, *free)


def call(sizes: tuple[int, ...] = (), cpus: float = 1.0, wants_gpus: bool = False) -> Call:
    return Call("k", "m:f", {}, Path(), cpus, sizes, {}, wants_gpus)


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "ranks"),
    [
        ([node(4), node(4)], 1.0, 0.0, 8),
        ([node(4), node(4)], 3.0, 0.0, 2),
        ([node(8, 2), node(8, 2)], 1.0, 1.0, 4),
        ([node(1, 8)], 1.0, 1.0, 1),
        ([node(4, 4, free_cpus=4, free_gpus=1)], 1.0, 1.0, 1),
        ([node(1.0)], 0.1, 0.0, 10),
        ([], 1.0, 0.0, 0),
    ],
)
def test_ranks_fit_node_by_node(nodes: list[Node], cpus: float, gpus: float, ranks: int):
    assert ranks_that_fit(nodes, cpus, gpus, free=True) == ranks


def test_shortage_says_what_is_wanted_and_what_there_is():
    found = shortage(call((8,)), [node(16, 4), node(4)])
    assert found is not None
    assert found.is_beyond
    assert found.reason == (
        "wants 8 workers with 1 core and 1 GPU each; the cluster has 20 cores and 4 GPUs on 2 nodes, "
        "16 cores and 4 GPUs on the largest"
    )


def test_shortage_of_what_others_hold_is_another():
    found = shortage(call((2, 4)), [node(4, 4, free_cpus=4, free_gpus=1)])
    assert found is not None
    assert not found.is_beyond
    assert found.reason == "wants 2 workers with 1 core and 1 GPU each; free are 4 cores and 1 GPU"
    assert shortage(call((1, 4)), [node(4, 4, free_cpus=4, free_gpus=1)]) is None


def test_gang_that_was_on_gpus_does_not_make_do_with_cores():
    cores = [node(64)]
    assert not has_gpus(cores)
    assert shortage(call((4,)), cores) is None
    found = shortage(call((4,), wants_gpus=True), cores)
    assert found is not None
    assert found.reason == "wants 4 workers with 1 core and 1 GPU each; the cluster has 64 cores on 1 node"


class Asked(Demand):
    """A demand that asks nobody, and is met after so many looks."""

    def __init__(self, met_after: int = 10**6) -> None:
        super().__init__("test")
        self.said: list[tuple[int, float, float] | None] = []
        self._looks_left = met_after

    def ask(self, ranks: int, cpus: float, gpus: float) -> None:
        if self._asked != (ranks, cpus, gpus):
            self._asked = (ranks, cpus, gpus)
            self.said.append(self._asked)

    def is_met(self, ranks: int, cpus: float, gpus: float) -> bool:
        self._looks_left -= 1
        return self._asked == (ranks, cpus, gpus) and self._looks_left < 0

    def withdraw(self) -> None:
        if self._asked is not None:
            self._asked = None
            self.said.append(None)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch):
    """Waits for room on these nodes, with patience for a demand that will be met; tells what was asked, too."""

    def wait(
        nodes: list[Node], sizes: tuple[int, ...], *, wants_gpus: bool = False, may_grow: bool = True, met_after=10**6
    ):
        demand = Asked(met_after)
        monkeypatch.setattr(gang, "nodes", lambda: nodes)
        monkeypatch.setattr(gang, "_MORE_WAIT_S", 0.2 if met_after == 10**6 else 60.0)
        monkeypatch.setattr(gang, "_LOOK_EVERY_S", 0.05)
        return gang._wait_for_room(sizes, 1.0, wants_gpus, may_grow, demand), demand.said

    return wait


def test_largest_gang_that_fits_is_started_at_once_if_it_is_all(room):
    assert room([node(8)], (2, 4, 8)) == ((8, False), [])
    assert room([node(4, 4)], (2, 4)) == ((4, True), [])


def test_fewer_ranks_wait_for_more_and_ask_for_nodes_meanwhile(room):
    assert room([node(5)], (2, 4, 8)) == ((4, False), [(8, 1.0, 0.0)])
    assert room([node(4, 2)], (1, 2, 4)) == ((2, True), [(4, 1.0, 1.0)])


def test_room_that_the_demand_holds_is_the_gangs_although_it_looks_taken(room):
    taken = [node(8, free_cpus=0)]
    assert room(taken, (4, 8), met_after=2) == ((8, False), [(8, 1.0, 0.0)])
    assert room([node(8, free_cpus=4)], (4, 8), met_after=2) == ((8, False), [(8, 1.0, 0.0)])


def test_demand_follows_the_kind_of_ranks_and_is_not_met_by_another_kind(room, monkeypatch):
    looks = iter([[node(1, free_cpus=0)], [node(1, free_cpus=0)]])
    cores_and_gpus = [node(8, 8, free_gpus=0)]
    demand = Asked(met_after=3)
    monkeypatch.setattr(gang, "nodes", lambda: next(looks, cores_and_gpus))
    monkeypatch.setattr(gang, "_LOOK_EVERY_S", 0.01)
    assert gang._wait_for_room((8,), 1.0, False, True, demand) == (8, True)
    assert demand.said == [(8, 1.0, 0.0), (8, 1.0, 1.0)]


def test_gang_that_is_cancelled_while_it_waits_takes_its_demand_back(monkeypatch, tmp_path):
    demand = Asked()

    def cancelled(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gang, "nodes", lambda: [node(1)])
    monkeypatch.setattr(gang, "Demand", lambda name: demand)
    monkeypatch.setattr(gang.time, "sleep", cancelled)
    with pytest.raises(KeyboardInterrupt):
        gang.run_gang("m:f", {}, (8,), 1.0, str(tmp_path), wants_gpus=True, may_grow=True)
    assert demand.said == [(8, 1.0, 1.0), None]


def test_fewer_ranks_do_not_wait_where_there_will_never_be_more(room):
    assert room([node(5)], (2, 4, 8), may_grow=False) == ((4, False), [])


def test_nodes_that_are_to_join_are_waited_for_and_those_that_do_not_come_are_not(monkeypatch: pytest.MonkeyPatch):
    joined = iter([1, 2, 3])
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(module, "nodes", lambda: [node(1)] * next(joined))
    assert module.wait_for_nodes(3, 30.0) == 3
    monkeypatch.setattr(module, "nodes", lambda: [node(1)])
    assert module.wait_for_nodes(3, 0.05) == 1
