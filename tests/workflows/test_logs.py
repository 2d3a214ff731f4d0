"""``dlm logs``: which there are, the one that tells most, following, secrets."""

import json
import queue
import threading
import time

import pytest

from pipeline.storage import Place
from tests.support.fabricated import begin, end, fabricate_run, fabricate_turn, failure, usage
from tests.support.toy_workflow import fabricate, toy_plan
from workflows import store as stores
from workflows.commands import logs
from workflows.commands.logs import find_logs, most_telling
from workflows.runs import create_run
from workflows.store import RunPlace

TEXT = "".join(f"line {number}\n" for number in range(100))


def chosen(run: RunPlace) -> str:
    return "/".join(str(most_telling(find_logs(run)).place).rsplit("/", 4)[1:])


def test_logs_of_a_failed_gang_begin_with_the_rank_that_failed_first(store):
    run = fabricate_run(store, toy_plan())
    fabricate_turn(run, 1, "source", log_0="fine", done=None)
    fabricate_turn(
        run, 1, "total", log_0="a", log_1="b", failure_0=failure("infra", time=2.0), failure_1=failure(time=1.0, rank=1)
    )
    assert chosen(run) == "001/total/000001/rank-1.log"


def test_logs_of_a_failure_that_was_made_good_are_not_the_ones(store):
    run = fabricate_run(store, toy_plan())
    fabricate_turn(run, 1, "aside", "000001", log_0="a", failure_0=failure())
    fabricate_turn(run, 1, "aside", "000002", log_0="a", done=None)
    fabricate_turn(run, 1, "source", log_0="at work", usage_0=usage(1.0))
    assert chosen(run) == "001/source/000001/rank-0.log"
    fabricate_turn(run, 2, "aside", "000003", log_0="a", done=None)
    assert chosen(run) == "002/aside/000003/rank-0.log"


def test_logs_without_a_choice_are_listed_before_the_end_of_the_one(dlm, store):
    run = fabricate_run(store, toy_plan())
    folder = fabricate_turn(run, 1, "source", log_0=TEXT, failure_0=failure())
    fabricate_turn(run, 1, "double-2", log_0="fine", done=None)
    shown = dlm("logs").stdout
    listed, _, text = shown.partition(f"==> {folder}/rank-0.log <==\n")
    assert [line.split() for line in listed.splitlines() if line] == [
        ["attempt", "step", "part", "rank", "turn"],
        ["1", "double", "double-2", "0", "done", "000001"],
        ["1", "source", "source", "0", "failed", "000001"],
    ]
    assert text == "".join(f"line {number}\n" for number in range(50, 100))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--step", "double"], "two\n"),
        (["--step", "double-1"], "one\n"),
        (["--rank", "1"], "r1\n"),
        (["--attempt", "1", "--step", "total", "--rank", "0"], "r0\n"),
        (["--step", "source", "--lines", "2"], "line 98\nline 99\n"),
        (["--step", "source", "--lines", "1000"], TEXT),
    ],
    ids=str,
)
def test_logs_of_a_step_a_part_a_rank_or_an_attempt(dlm, store, arguments, expected):
    run = fabricate_run(store, toy_plan())
    fabricate_turn(run, 1, "total", log_0="r0\n", log_1="r1\n", failure_0=failure())
    fabricate_turn(run, 1, "source", log_0=TEXT, done=None)
    fabricate_turn(run, 2, "double-1", log_0="one\n", done=None)
    fabricate_turn(run, 2, "double-2", log_0="two\n", failure_0=failure())
    done = dlm(
        "logs", "r1", *(["--attempt", "1"] if "--rank" in arguments or "source" in arguments else []), *arguments
    )
    assert done.code == 0, done.stderr
    assert done.stdout.partition("<==\n")[2] == expected
    assert "attempt  step" not in done.stdout, "what was chosen is not listed"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "sorce"], ["sorce", "did you mean source?"]),
        (["--rank", "4"], ["--rank is 4", "rank 0"]),
        (["--attempt", "3"], ["--attempt is 3", "attempt 1"]),
    ],
)
def test_logs_that_are_not_there_are_refused_with_those_that_are(dlm, store, arguments, words):
    fabricate_turn(fabricate_run(store, toy_plan()), 1, "source", log_0=TEXT)
    done = dlm("logs", "r1", *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert all(word in done.stderr for word in words), done.stderr


def test_run_without_logs_says_so(dlm, store):
    fabricate_run(store, toy_plan())
    assert "no logs yet" in dlm("logs").stdout


def test_log_without_a_line_says_so(dlm, store):
    fabricate_turn(fabricate_run(store, toy_plan()), 1, "source", log_0="", done=None)
    assert dlm("logs").stdout.endswith("rank-0.log <==\n(empty)\n")


def test_end_of_a_long_log_is_whole_lines(store, tmp_path):
    text = "".join(f"{number} {'ü' * 1000}\n" for number in range(300)) + "last"
    (tmp_path / "log").write_text(text)
    tail, size = logs.tail_of(Place(stores.open_storage(str(tmp_path)), "log"), 150)
    assert tail == "".join(line + "\n" for line in text.split("\n")[-150:-1]) + "last"
    assert size == len(text.encode())


def test_logs_hide_secrets_also_those_of_several_lines(dlm, store, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdefgh12345")
    monkeypatch.setenv("HUB_TOKEN", "first-line-of-key\nsecond-line-of-key")
    text = "login abcdefgh12345 ok\nfirst-line-of-key\nsecond-line-of-key\nrest\n"
    fabricate_turn(fabricate_run(store, toy_plan()), 1, "source", log_0=text, done=None)
    for arguments in (["logs"], ["logs", "-n", "2"], ["logs", "-f"], ["logs", "-f", "-n", "2"]):
        shown = dlm(*arguments).stdout
        assert "rest" in shown
        assert not any(secret in shown for secret in ("abcdefgh12345", "first-line-of", "second-line-of"))


def test_run_whose_first_log_is_still_to_come_is_waited_for(dlm, store):
    run = create_run(store, toy_plan(), "local", "r1")

    def write() -> None:
        time.sleep(0.7)
        lease = begin(run, [])
        fabricate_turn(run, 1, "source", log_0="here\n", done=None)
        lease.release()

    thread = threading.Thread(target=write)
    thread.start()
    followed = dlm("logs", "r1", "-f")
    thread.join()
    assert "waiting for the first log" in followed.stderr
    assert followed.stdout.endswith("here\n")


def test_step_whose_first_log_is_still_to_come_is_waited_for_unless_the_run_ends(dlm, store):
    run = create_run(store, toy_plan(), "local", "r1")
    lease = begin(run, [])
    fabricate_turn(run, 1, "source", log_0="of another\n", done=None)

    def write() -> None:
        time.sleep(0.7)
        fabricate_turn(run, 1, "total", log_0="here\n", done=None)

    thread = threading.Thread(target=write)
    thread.start()
    followed = dlm("logs", "r1", "--step", "total", "-f")
    thread.join()
    assert followed.stderr.splitlines() == [
        "waiting for the first log of total in run r1, which is running",
        "total is done",
    ]
    assert followed.stdout.endswith("here\n")
    lease.release()
    end(run, 1, "stopped")
    refused = dlm("logs", "r1", "--step", "double", "-f")
    assert (refused.code, "double" in refused.stderr) == (2, True)


def test_run_that_ended_without_a_log_is_not_waited_for(dlm, store):
    end(fabricate_run(store, toy_plan(), []), 1, "stopped")
    assert "no logs yet" in dlm("logs", "r1", "-f").stdout


@pytest.mark.parametrize(
    ("ends_with", "why"),
    [
        ("done", "source is done"),
        ("failure", "source has ended: failed; the run goes on"),
        ("run", "run r1 has ended: stopped"),
        ("killed", "run r1 has ended: interrupted"),
    ],
)
def test_followed_log_is_printed_as_it_grows_until_the_call_ends(dlm, store, monkeypatch, ends_with, why):
    monkeypatch.setenv("WANDB_API_KEY", "abcdefgh12345")
    run = create_run(store, toy_plan(), "local", "r1")
    lease = begin(run, [])
    folder = fabricate_turn(run, 1, "source", log_0="old\nhalf ").path

    def go_on() -> None:
        with (folder / "rank-0.log").open("ab") as log:
            for text in (b"a line\nabcdef", b"gh12345 is \xc3", b"\xbc\nno end"):
                time.sleep(0.4)
                log.write(text)
                log.flush()
        time.sleep(0.4)
        if ends_with == "run":
            end(run, 1, "stopped")
        elif ends_with == "failure":
            (folder / "failure-0.json").write_text(json.dumps(failure()))
            time.sleep(0.4)
            event = {"time": 1.0, "attempt": 1, "kind": "step_failed", "step": "source", "failure": failure()}
            (run.directory / "events" / "001-000900.json").write(json.dumps(event).encode())
        elif ends_with == "done":
            (folder / "done.json").write_text("null")
        if ends_with in ("run", "killed"):
            lease.release()

    thread = threading.Thread(target=go_on)
    thread.start()
    followed = dlm("logs", "r1", "--step", "source", "-f")
    thread.join()
    assert followed.code == 0
    assert followed.stdout.partition("<==\n")[2] == "old\nhalf a line\n*** is ü\nno end\n"
    assert followed.stderr == f"{why}\n"


def test_followed_log_of_a_run_that_is_cancelled_ends_with_the_run(dlm, store):
    run = create_run(store, toy_plan(), "local", "r1")
    lease = begin(run, [])
    folder = fabricate_turn(run, 1, "source", log_0="one\n")

    def cancel() -> None:
        time.sleep(0.4)
        (folder / "failure-0.json").write(json.dumps(failure("stopped")).encode())
        event = {"time": 1.0, "attempt": 1, "kind": "step_stopped", "step": "source", "message": "3 steps are done"}
        (run.directory / "events" / "001-000900.json").write(json.dumps(event).encode())
        time.sleep(0.8)  # other steps save what they have
        end(run, 1, "cancelled")
        lease.release()

    thread = threading.Thread(target=cancel)
    thread.start()
    followed = dlm("logs", "r1", "--step", "source", "-f")
    thread.join()
    assert followed.stderr == "run r1 has ended: cancelled\n"


def test_logs_of_a_step_that_was_made_before_are_not_waited_for(dlm, store):
    fabricate(store, toy_plan(), "source")
    lease = begin(create_run(store, toy_plan(), "local", "r1"), [("step_cached", "source", {})])
    followed = dlm("logs", "r1", "--step", "source", "-f")
    lease.release()
    assert followed.stderr == "source is cached (from run test) and writes no log in run r1\n"
    assert followed.stdout == "run r1 has written no logs yet\n"


def test_wait_for_a_first_word_or_for_the_next_try_is_told_once(dlm, store, monkeypatch):
    monkeypatch.setattr(logs, "_TOLD_AFTER_S", 0.3)
    run = create_run(store, toy_plan(), "local", "r1")
    lease = begin(run, [("step_queued", "source", {"reason": "wants 8 GPUs"})])
    folder = fabricate_turn(run, 1, "source", log_0="")
    told, lines = queue.Queue[str](), list[str]()
    monkeypatch.setattr(logs, "say", told.put)

    def go_on() -> None:
        lines.append(told.get(timeout=60.0))
        (folder / "rank-0.log").write(b"one\n")
        (folder / "failure-0.json").write(json.dumps(failure("infra")).encode())
        lines.append(told.get(timeout=60.0))
        second = fabricate_turn(run, 1, "source", "000002", log_0="two\n")
        (second / "done.json").write(b"null")

    thread = threading.Thread(target=go_on)
    thread.start()
    dlm("logs", "r1", "--step", "source", "-f")
    thread.join()
    lease.release()
    where = "source is queued (wants 8 GPUs), run r1 running"
    lines += [told.get_nowait() for _ in range(told.qsize())]
    assert lines == [
        f"source has written nothing yet; {where}",
        f"waiting for what source writes next; {where}",
        "source is done",
    ]


@pytest.mark.parametrize("is_resumed", [False, True])
def test_followed_log_goes_on_with_the_next_try_of_the_same_call_and_rank(dlm, store, is_resumed):
    run = create_run(store, toy_plan(), "local", "r1")
    lease = begin(run, [])
    first = fabricate_turn(run, 1, "total", log_0="other\n", log_1="one\n")

    def go_on() -> None:
        time.sleep(0.6)
        (first / "failure-1.json").write(json.dumps(failure("infra", rank=1)).encode())
        time.sleep(0.6)
        if is_resumed:
            lease.release()
            begin(run, [])
        fabricate_turn(run, 1 + is_resumed, "source", "000002", log_1="of another step\n")
        second = fabricate_turn(run, 1 + is_resumed, "total", "000002", log_0="other again\n", log_1="two\n")
        time.sleep(0.6)
        (second / "done.json").write(b"null")

    thread = threading.Thread(target=go_on)
    thread.start()
    followed = dlm("logs", "r1", "--step", "total", "--rank", "1", "-f")
    thread.join()
    assert followed.code == 0
    place = f"{run.work_dir(1 + is_resumed, 'total')}/000002/rank-1.log"
    assert followed.stdout.partition("<==\n")[2] == f"one\n==> {place} <==\ntwo\n"
    assert followed.stderr == "total is done\n"


def test_followed_log_of_one_attempt_ends_with_that(dlm, store):
    run = fabricate_run(store, toy_plan(), [])
    lease = begin(run, [])
    fabricate_turn(run, 1, "source", log_0="one\n", failure_0=failure())
    fabricate_turn(run, 2, "source", "000002", log_0="two\n")
    followed = dlm("logs", "r1", "--attempt", "1", "-f")
    lease.release()
    assert followed.stdout.partition("<==\n")[2] == "one\n"
    assert followed.stderr == "attempt 1 has ended; the run goes on in attempt 2\n"


def test_logs_of_an_object_store_are_read_and_followed(dlm, objects):
    run = create_run(objects, toy_plan(), "local", "r1")
    lease = begin(run, [])
    folder = fabricate_turn(run, 1, "source", log_0="one\n")
    fabricate_turn(run, 1, "double-1", log_0="fine\n", done=None)
    assert "double-1" in dlm("logs", "--store", "memory://b/s").stdout

    def go_on() -> None:
        time.sleep(0.5)
        (folder / "rank-0.log").write(b"one\ntwo\n")
        time.sleep(0.5)
        (folder / "done.json").write(b"null")

    thread = threading.Thread(target=go_on)
    thread.start()
    followed = dlm("logs", "-f", "--step", "source", "--store", "memory://b/s")
    thread.join()
    lease.release()
    assert followed.stdout.partition("<==\n")[2] == "one\ntwo\n"


def test_part_that_was_asked_to_stop_is_listed_as_stopped(store):
    run = fabricate_run(store, toy_plan())
    fabricate_turn(run, 1, "total", log_0="a", log_1="b", failure_0=failure("stopped"), failure_1=failure("user"))
    there = find_logs(run)
    assert [(log.rank, log.told) for log in there if log.turn.step == "total"] == [(0, "stopped"), (1, "failed")]
