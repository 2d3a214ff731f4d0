"""The benchmark of orchestration: every side computes the same graph; keys are of the layout that is worse for us."""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest

from benchmarks import orchestration
from benchmarks.command import Options, RefusedError, run
from benchmarks.orchestration import CHAIN, CHAINS, SHARDS, START, Size, Times
from benchmarks.orchestration_peers import metaflow_source
from benchmarks.orchestration_sides import BARE_RAY, BASE, BODIES, OURS, PEERS, Graph, Side, install, python_of

RAY_LIMIT_S = 180
GRAPHS = {START: Graph(), CHAIN: Graph(1, 2), CHAINS: Graph(2, 1), SHARDS: Graph(num_shards=3)}
SIZE = Size(GRAPHS, num_rounds=2)
KEYS = {"extra_over_ray_s", "cached_rerun_s"}


def _fake(
    *,
    all_results: bool,
    wrong: int = 0,
    more: int = 0,
    executed: tuple[int, int] = (0, 0),
    says: str = "done",
    hangs_s: float = 0.0,
) -> Side:
    """A side that writes the numbers it should, with faults.

    Args:
        executed: bodies more than there should be, in the first run and in the second.
        hangs_s: of a fan-out, when all shards but one are done.
    """

    def command(graph: Graph, folder: Path) -> list[str]:
        is_again = (folder / "0.log").exists()
        bodies = executed[1] if is_again else graph.num_results + executed[0]
        others = graph.num_results - 1 + more * is_again if all_results else 0
        lines = [f"file = open({BODIES!r}, 'a'); file.write('1\\n' * {bodies})"]
        if graph.num_shards and hangs_s:
            lines = [f"open({BODIES!r}, 'a').write('1\\n' * {graph.num_shards - 1})", "import subprocess, sys"]
            lines += [f"subprocess.call([sys.executable, '-S', '-c', 'import time; time.sleep({hangs_s})  # child'])"]
        lines += [f"open('value-{number}.txt', 'w').write('0')" for number in range(others)]
        lines += [f"open('value.txt', 'w').write('{graph.value + wrong}')", f"print({says!r})"]
        return [sys.executable, "-S", "-c", "; ".join(lines)]

    return Side(command, command, "cached", "done") if all_results else Side(command)


def _own(*words: str) -> argparse.Namespace:
    return orchestration.own_options().parse_args(words)


def test_graphs_are_of_the_asked_size_in_both_layouts():
    full = orchestration.FULL.graphs
    assert [full[name].num_results for name in (CHAIN, CHAINS)] == [100, 100]
    assert full[SHARDS].num_shards == 1000
    assert full[START].num_results == 2
    assert full[CHAIN].value == 100
    assert full[CHAINS].value == 7 * 15 + 1
    assert full[SHARDS].value == sum(range(1000))
    assert orchestration.FULL.num_rounds >= 3


@pytest.mark.parametrize(("graph", "more"), [(Graph(), 0), (Graph(1, 3), 0), (Graph(2, 2), 1)])
def test_flow_of_metaflow_has_a_step_a_stage_and_an_end_after_a_join(graph, more):
    source = metaflow_source.stages(graph.num_chains, graph.length)
    compile(source, "flow.py", "exec")
    assert source.count("@step") == graph.num_results + more
    assert "range(7)" in metaflow_source.shards(7)


def test_every_side_is_timed_with_every_graph_in_every_round_but_for_the_fan_out_of_a_peer(tmp_path, monkeypatch):
    monkeypatch.setattr(orchestration, "FAR", math.inf)  # programs of some milliseconds may differ by any factor
    sides = {OURS: _fake(all_results=True), BARE_RAY: _fake(all_results=True), "prefect": _fake(all_results=False)}
    times = orchestration.measure_sides(sides, SIZE, tmp_path)
    assert list(times) == list(sides)
    for name, found in times.items():
        number = 1 if name == "prefect" else 2
        assert {what: len(s) for what, s in found.first.items()} == dict.fromkeys(GRAPHS, 2) | {SHARDS: number}
        assert all(s > 0 for seconds in found.first.values() for s in seconds)
        assert {len(s) for s in found.again.values()} == ({0} if name == "prefect" else {2})
    ratios = orchestration.ratios_of(times, SIZE)
    assert ratios.keys() == KEYS | {"prefect"}
    shown = orchestration._table(times, sides, {"dagster": "why not"}, SIZE)
    whole, with_start, without_start, again = (part.splitlines() for part in shown.split("\n\n")[:4])
    for part in (whole, with_start, without_start, again):
        assert [line.split("  ")[0] for line in part[2:]] == list(sides)
    assert [line.split()[-1] for line in whole[2:]] == ["2", "2", "2"]
    assert [line.split()[-1] for line in again[2:]] == ["cached", "cached", "nothing"]
    assert "dagster is absent: why not" in shown


@pytest.mark.parametrize(
    ("side", "words"),
    [
        (_fake(all_results=True, wrong=1), r"ours: 2 results, the largest \[3\]; expected Graph"),
        (_fake(all_results=True, more=1), r"ours: 3 results"),
        (_fake(all_results=True, executed=(0, 2)), r"ours: 4 bodies were executed in two runs; expected 2, each once"),
        (_fake(all_results=True, executed=(-1, 0)), r"ours: 1 bodies were executed in one run; expected 2, each once"),
        (_fake(all_results=True, says="nothing"), r"the log of the second run says nowhere 'done'"),
        (_fake(all_results=False), r"ours: 1 results"),
        (Side(lambda graph, folder: [sys.executable, "-c", "1 / 0"]), r"ours ended with exit code 1:\n[^\0]*ZeroDiv"),
    ],
)
def test_side_that_computes_something_else_is_refused(tmp_path, side, words):
    with pytest.raises(RefusedError, match=words):
        orchestration.measure_sides({OURS: side}, SIZE, tmp_path)


@pytest.mark.parametrize(("slow", "fast"), [("prefect", OURS), (OURS, "prefect")])
def test_peer_that_is_far_off_in_the_first_round_is_not_run_again_and_the_table_says_so(
    tmp_path, monkeypatch, slow, fast
):
    def timed(name: str, *given: object) -> orchestration._Timed:
        return orchestration._Timed(5.0 if name == slow else 1.0, None)

    monkeypatch.setattr(orchestration, "_time_graph", timed)
    sides = {slow: _fake(all_results=True), fast: _fake(all_results=True)}
    times = orchestration.measure_sides(sides, SIZE, tmp_path)
    assert {name: found.num_rounds for name, found in times.items()} == {OURS: 2, "prefect": 1}
    times[BARE_RAY] = times[OURS]
    shown = orchestration._table(times, {**sides, BARE_RAY: _fake(all_results=True)}, {}, SIZE)
    assert "not run again, 2 times as long or as short as ours in the first round: prefect" in shown


def test_peer_that_is_far_off_in_one_layout_alone_is_run_again():
    ours, far, near = _times(1.0, 1.0, 1.0), _times(9.0, 2.1, 2.1), _times(9.0, 9.0, 1.9)
    assert orchestration._is_far(far, ours)
    assert not orchestration._is_far(near, ours)
    assert not orchestration._is_far(ours, near)


def test_fan_out_of_a_peer_is_stopped_with_its_children_and_counts_by_what_it_has_done(tmp_path):
    sides = {
        OURS: _fake(all_results=True),
        BARE_RAY: _fake(all_results=True),
        "prefect": _fake(all_results=False, hangs_s=60.0),
    }
    size = dataclasses.replace(SIZE, num_rounds=1, fan_out_limit_s=1.0)
    times = orchestration.measure_sides(sides, size, tmp_path)
    found = times["prefect"]
    assert found.stopped == {SHARDS: 2}
    assert 1.0 <= found.first[SHARDS][0] < 30
    assert found.whole_s(SHARDS, GRAPHS[SHARDS]) == [found.first[SHARDS][0] / 2]
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [words for words in commands if b"time.sleep(60.0)  # child" in words]
    shown = orchestration._table(times, sides, {}, size)
    assert "prefect was stopped after 1 s, 2 of 4 done (shards)" in shown
    assert [line for line in shown.splitlines() if line.startswith("prefect") and "> 1." in line]


def test_fan_out_that_does_nothing_until_it_is_stopped_is_refused(tmp_path):
    side = Side(lambda graph, folder: [sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    with pytest.raises(RefusedError, match=r"prefect: nothing of Graph\(.*\) was executed in 0\.5 s"):
        orchestration._time_graph("prefect", side, GRAPHS[SHARDS], tmp_path / "work", limit_s=0.5)


def _times(start: float, chain: float, chains: float, again: float = 0.0) -> Times:
    first = {START: [start] * 2, CHAIN: [chain] * 2, CHAINS: [chains] * 2, SHARDS: [start]}
    return Times(first, {name: [again, again] for name in GRAPHS})


def test_keys_are_of_the_layout_that_is_worse_for_us():
    times = {
        OURS: _times(5.0, 5.4, 5.1, again=0.7),  # 4 and 4 stages, 2 and 2 beyond the start
        BARE_RAY: _times(4.0, 4.2, 4.2),
        "prefect": _times(9.0, 9.2, 9.2),
    }
    times[OURS].again[SHARDS][:] = [0.9, 0.9]
    assert orchestration.ratios_of(times, SIZE) == pytest.approx(
        {"extra_over_ray_s": (5.4 - 4.2) / 4, "cached_rerun_s": 0.9, "prefect": 9.2 / 5.4}
    )
    times[BARE_RAY] = _times(7.0, 7.2, 7.2)
    assert orchestration.ratios_of(times, SIZE)["extra_over_ray_s"] == pytest.approx((0.4 - 0.2) / 2)


def test_peers_that_are_not_there_are_told_with_what_to_do(tmp_path):
    asked = _own("--peers", "prefect", "metaflow", "--environments", str(tmp_path))
    (tmp_path / "metaflow").mkdir()
    (tmp_path / "metaflow" / "installed.txt").write_text("metaflow==1.0")
    sides, absent = orchestration._find_peers(Options(quick=False, text=(), own=asked))
    assert not sides
    assert absent.keys() == PEERS.keys()
    assert "add --install" in absent["prefect"]
    assert "add --install" in absent["metaflow"]
    assert absent["dagster"] == "not asked for (--peers)"
    (tmp_path / "metaflow" / "installed.txt").write_text("\n".join(PEERS["metaflow"]))
    sides, absent = orchestration._find_peers(Options(quick=False, text=(), own=asked))
    assert list(sides) == ["metaflow"]
    default = _own("--environments", str(tmp_path))
    assert not orchestration._find_peers(Options(quick=True, text=(), own=default))[0]
    assert list(orchestration._find_peers(Options(quick=False, text=(), own=default))[0]) == ["metaflow"]


def test_peer_that_cannot_be_installed_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "No matching distribution found for metaflow" in install("metaflow", tmp_path)
    assert python_of("metaflow", tmp_path) is None


def test_text_is_refused():
    with pytest.raises(ValueError, match="--text: no text is read here"):
        orchestration.measure(Options(quick=True, text=(Path("x"),), own=_own()))


@pytest.mark.parametrize("graph", [Graph(2, 1), Graph(num_shards=3)])
def test_our_recipe_makes_every_result_once(tmp_path, graph):
    def local(graph: Graph, folder: Path) -> list[str]:
        return [*BASE[OURS].command(graph, folder), "--executor", "local"]

    side = dataclasses.replace(BASE[OURS], command=local, again=local)
    timed = orchestration._time_graph(OURS, side, graph, tmp_path / "work")
    assert timed.again_s is not None
    assert timed.first_s > 0
    assert timed.again_s > 0


@pytest.mark.ray
@pytest.mark.timeout(RAY_LIMIT_S)
@pytest.mark.parametrize("graph", [Graph(2, 1)])
def test_bare_ray_writes_every_result(tmp_path, graph):
    timed = orchestration._time_graph(BARE_RAY, BASE[BARE_RAY], graph, tmp_path / "work")
    assert timed.first_s > 0
    assert timed.again_s is None


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(4 * RAY_LIMIT_S)
def test_quick_run_has_table_and_keys(capsys):
    assert run("orchestration", orchestration.measure, ["--quick"], own=orchestration.own_options()) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["ratios"].keys() == KEYS
    assert 0 < report["ratios"]["cached_rerun_s"] < min(map(min, report["figures"]["wall_s"][OURS].values()))
    assert report["figures"]["absent"].keys() == PEERS.keys()
    assert {line.split("  ")[0] for line in shown[2:4]} == {"ours", "bare Ray"}
