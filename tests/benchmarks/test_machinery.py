"""What all benchmarks share: probes and refusals, the report, interleaving, text, memory of a child."""

import itertools
import json
import mmap
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import command, machine
from benchmarks.child import in_child, peak_anonymous_bytes, peak_bytes
from benchmarks.command import Measured, Options, RefusedError, run, table
from benchmarks.interleave import interleave, median_ratio
from benchmarks.machine import Probe, doubts
from benchmarks.process import run_program
from benchmarks.text import read_documents, read_text

QUIET = Probe(
    matmul_gflops=300.0, matmul_gflops_one_thread=160.0, fork_join_us=13.0, fork_join_p95_us=16.0, num_threads=2
)
STALLED = replace(QUIET, fork_join_p95_us=machine.MAX_FORK_JOIN_P95_US + 1)
SHARED = replace(QUIET, matmul_gflops=0.9 * machine.MIN_THREAD_SCALING * 2 * QUIET.matmul_gflops_one_thread)
SLOWER = replace(QUIET, matmul_gflops=QUIET.matmul_gflops / machine.MAX_RATE_CHANGE / 1.01)
MIB = 1 << 20


def _measure(options: Options) -> Measured:
    return Measured(table="a table", ratios={"speed_vs_peer": 2 / 3}, figures={"quick": options.quick})


# Probes


def test_probe_of_this_machine_finds_rates_and_latencies_in_order():
    before = torch.get_num_threads()
    found = machine.probe()
    assert 0 < found.fork_join_us <= found.fork_join_p95_us
    assert found.matmul_gflops > 0
    assert found.num_threads == torch.get_num_threads() == before
    assert found.thread_scaling == pytest.approx(found.matmul_gflops / found.matmul_gflops_one_thread / before)


def test_quiet_probes_raise_no_doubt():
    slightly_slower = replace(QUIET, matmul_gflops=QUIET.matmul_gflops / machine.MAX_RATE_CHANGE * 1.01)
    assert doubts([QUIET, slightly_slower]) == []


@pytest.mark.parametrize(
    ("probes", "measured", "expected"),
    [
        ([QUIET, STALLED], "probe 2: starting and joining 2 threads took 101 us", "at most 100"),
        ([SHARED], "probe 1: 2 threads multiply matrices at 173 GFLOP/s and one at 160", "at least 0.6 of 2 times"),
        ([QUIET, SLOWER], "went between 238 and 300 GFLOP/s", "at most 1.25"),
        ([SLOWER, QUIET], "went between 238 and 300 GFLOP/s", "at most 1.25"),
    ],
)
def test_doubt_says_what_was_measured_and_what_was_expected(probes, measured, expected):
    (doubt,) = doubts(probes)
    assert measured in doubt
    assert expected in doubt


def test_description_of_the_machine_names_no_host_and_no_path():
    described = machine.describe()
    assert described["torch"] == torch.__version__
    assert described["cores"] >= 1
    assert "/" not in json.dumps(described)


# The report


def test_run_on_a_quiet_machine_prints_the_report_as_its_last_line(capsys):
    assert run("toy", _measure, [], lambda: QUIET) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert lines[:-1] == ["a table"]
    assert list(report) == ["benchmark", "ratios", "figures", "machine"]
    assert report["benchmark"] == "toy"
    assert report["ratios"] == {"speed_vs_peer": 0.667}
    assert report["figures"] == {"quick": False}
    assert len(report["machine"]["probes"]) == 2


@pytest.mark.parametrize("probes", [[STALLED], [QUIET, STALLED]])
def test_run_with_a_probe_far_off_reports_nothing(capsys, probes):
    remaining = iter(probes)
    assert run("toy", _measure, [], lambda: next(remaining)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "took 101 us" in printed.err


def test_quick_run_with_a_probe_far_off_reports_its_doubts(capsys):
    assert run("toy", _measure, ["--quick"], lambda: STALLED) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["figures"] == {"quick": True}
    assert len(report["machine"]["doubts"]) == 2


def test_run_of_a_measurement_that_refuses_reports_nothing(capsys):
    def refuse(options: Options) -> Measured:
        raise RefusedError("the paths differ")

    assert run("toy", refuse, [], lambda: QUIET) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "benchmarks.toy: the paths differ" in printed.err


def test_saved_report_is_the_printed_one(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    assert run("toy", _measure, ["--save"], lambda: QUIET) == 0
    saved = json.loads((tmp_path / "results" / "toy.json").read_text())
    assert saved == json.loads(capsys.readouterr().out.splitlines()[-1])


def test_lists_of_numbers_stand_on_one_line_of_a_saved_report_and_nothing_else_changes():
    report = {
        "a": [1, -2.5e-7, None, True],
        "b": [[1, 2], [3]],
        "c": ["x,   y", "[ 1 ]"],
        "d": {"e": [], "f": [{"g": 1}]},
    }
    saved = command.legible(report)
    assert json.loads(saved) == report
    assert '"a": [1, -2.5e-07, null, true]' in saved
    assert '"b": [\n    [1, 2],\n    [3]\n  ]' in saved


def test_saving_a_quick_run_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("toy", _measure, ["--quick", "--save"], lambda: QUIET)
    assert stopped.value.code == 2
    assert "--save: a quick run is not a measurement" in capsys.readouterr().err


def test_table_aligns_names_left_and_numbers_right():
    assert table(["path", "ms"], [["a", "5"], ["long name", "1234"]]).splitlines() == [
        "path         ms",
        "---------  ----",
        "a             5",
        "long name  1234",
    ]


# Interleaving


def test_interleave_gives_every_round_to_every_variant_in_rotated_order():
    calls: list[tuple[str, int]] = []
    variants = {name: lambda number, name=name: calls.append((name, number)) for name in "abc"}
    times_s = interleave(variants, 4)
    assert [name for name, _ in calls] == list("abcbcacababc")
    assert [number for _, number in calls] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert {name: len(times) for name, times in times_s.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(time > 0 for times in times_s.values() for time in times)


def test_interleave_reads_the_clock_it_is_given_around_every_variant():
    ticks = itertools.count()
    times = interleave({"a": lambda _: next(ticks), "b": lambda _: None}, 2, clock=lambda: next(ticks))
    assert times == {"a": [2, 2], "b": [1, 1]}


def test_median_ratio_above_one_means_ours_takes_less():
    assert median_ratio([3.0, 100.0, 1.0], [2.0, 1.0, 1.5]) == 2.0


# Text


def test_text_of_a_folder_is_its_files_in_sorted_order(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"second")
    (tmp_path / "a.py").write_bytes(b"first ")
    (tmp_path / "a.bin").write_bytes(b"unread")
    assert read_text([tmp_path], 9) == b"first sec"
    assert read_text([tmp_path / "b.txt", tmp_path / "a.py"], 12) == b"secondfirst "


def test_text_by_default_is_the_standard_library():
    assert len(read_text([], 100_000)) == 100_000


def test_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"12345")
    with pytest.raises(ValueError, match="has 5 bytes of text; 6 are needed"):
        read_text([tmp_path], 6)


def test_text_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file or folder '.*absent'"):
        read_text([tmp_path / "absent"], 1)


def _write(folder: Path, **contents: bytes) -> Path:
    for name, content in contents.items():
        (folder / f"{name}.py").write_bytes(content)
    return folder


def test_documents_are_files_once_without_the_blank_and_the_undecodable(tmp_path):
    _write(tmp_path, one=b"text", two="é".encode(), again=b"text", blank=b" \n", latin="é".encode("latin-1"))
    found = list(read_documents([tmp_path], 6))
    assert sorted(found) == ["text", "é"]
    assert list(read_documents([tmp_path], 6)) == found


def test_documents_end_with_the_one_that_is_enough(tmp_path):
    _write(tmp_path, a=b"12345", b=b"54321", c=b"11111")
    assert len(list(read_documents([tmp_path], 6))) == 2


def test_documents_that_are_too_few_are_refused(tmp_path):
    _write(tmp_path, a=b"12345", b=b"12345")
    with pytest.raises(ValueError, match="has 5 bytes of documents; 6 are needed"):
        list(read_documents([tmp_path], 6))


def test_documents_by_default_come_from_the_library_and_from_packages():
    found = list(read_documents([], 2_000_000))
    assert sum(len(text.encode()) for text in found) >= 2_000_000
    assert len(set(found)) == len(found)


# Children


def _peak_of_two_tensors(mebibytes: int) -> int:
    return peak_bytes(lambda: torch.ones(mebibytes * MIB // 8).add(1).add_(1))


def _faults_of_a_tensor_like_many_before() -> int:
    for _ in range(30):  # the heap settles after some: an aligned block asks for more than one leaves behind
        torch.ones(16 * MIB)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * MIB)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_peak_counts_what_is_live_at_once_and_not_what_was_before():
    peak = in_child(_peak_of_two_tensors, 64, heap=False)
    assert 64 * MIB <= peak < 80 * MIB


def test_kept_heap_reuses_pages_that_plain_malloc_faults_in_again():
    num_pages = 64 * MIB // resource.getpagesize()
    assert in_child(_faults_of_a_tensor_like_many_before) < num_pages / 10
    assert (
        in_child(_faults_of_a_tensor_like_many_before, heap=False) >= num_pages / 520
    )  # with huge pages one fault brings 512


def _peak_of_a_mapped_file_and_a_tensor(path: Path, mebibytes: int) -> int:
    def work() -> None:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert sum(mapped[:: resource.getpagesize()]) == 0
        tensor = torch.ones(mebibytes * MIB // 4)
        time.sleep(0.1)  # for the samples
        del tensor

    return peak_anonymous_bytes(work)


def test_anonymous_peak_counts_tensors_and_no_mapped_file(tmp_path):
    path = tmp_path / "zeros"
    with path.open("wb") as handle:
        handle.truncate(256 * MIB)
    peak = in_child(_peak_of_a_mapped_file_and_a_tensor, path, 64, heap=False)
    assert 63 * MIB <= peak < 80 * MIB  # the kernel counts the pages of a thread in batches


# Programs


def test_program_costs_what_its_descendants_cost(tmp_path):
    work = f"{sys.executable} -c 'import time\nwhile time.process_time() < 1.5: pass'"
    costs = [run_program("os:system", command, log=tmp_path / "log") for command in ("true", work)]
    assert costs[1].cpu_s - costs[0].cpu_s == pytest.approx(1.5, abs=0.3)
    assert costs[1].wall_s > 1.5


def test_program_that_fails_is_refused_with_its_log(tmp_path):
    with pytest.raises(
        RefusedError, match=r"os:listdir ended with exit code 1:(.|\n)*No such file or directory: 'absent'"
    ):
        run_program("os:listdir", "absent", log=tmp_path / "log")


def test_program_is_given_its_environment(tmp_path):
    run_program("os:system", "echo $DLM_TEST", log=tmp_path / "log", env={"DLM_TEST": "passed on"})
    assert (tmp_path / "log").read_text() == "passed on\n"
