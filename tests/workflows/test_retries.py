"""What follows a failure: a retry after a while, or the end of the step."""

import pytest

from pipeline.errors import ErrorClass
from workflows import retries
from workflows.retries import RETRIES, Retries, Retry, backoff_s
from workflows.worker import PREEMPTED, Failure


def failure(error_class: ErrorClass, kind: str = "Error") -> Failure:
    return Failure(error_class, kind, "it went wrong", "", 0, 0.0)


@pytest.mark.parametrize(
    ("error_class", "allowed"),
    [
        ("user", 0), ("code", 0), ("numerics", 0), ("poison", 0), ("unschedulable", 0), ("memory", 1),
        ("transient", 5), ("infra", 20),
    ],
)  # fmt: skip
def test_each_class_has_its_own_budget(error_class: ErrorClass, allowed: int):
    state = Retries()
    for number in range(1, allowed + 1):
        after = state.after(failure(error_class), 0.0)
        assert isinstance(after, Retry)
        assert after.number == number
    assert state.after(failure(error_class), 0.0) == failure(error_class)
    assert RETRIES.get(error_class, 0) == allowed


def test_budgets_are_apart_from_each_other():
    state = Retries()
    for _ in range(5):
        assert isinstance(state.after(failure("transient"), 0.0), Retry)
        assert isinstance(state.after(failure("infra"), 0.0), Retry)
    assert isinstance(state.after(failure("transient"), 0.0), Failure)
    assert isinstance(state.after(failure("infra"), 0.0), Retry)


def test_progress_begins_every_budget_anew():
    state = Retries()
    for done in range(1, 100):
        assert isinstance(state.after(failure("transient"), 10.0 * done), Retry)


def test_three_failures_at_the_same_point_are_poison_whatever_the_budget():
    state = Retries()
    assert isinstance(state.after(failure("infra"), 500.0), Retry)
    assert isinstance(state.after(failure("transient"), 500.0), Retry)
    after = state.after(failure("infra"), 500.0)
    assert isinstance(after, Failure)
    assert after.error_class == "poison"
    assert after.message == "failed 3 times at the same point (500 done): it went wrong"


def test_same_point_is_poison_also_where_machines_fail_in_between_before_the_training_comes_there_again():
    state = Retries()
    for done in (1500.0, 1200.0, 1500.0, 1004.0):  # it goes on from the checkpoint of step 1000
        assert isinstance(state.after(failure("infra"), done), Retry)
    after = state.after(failure("infra"), 1500.0)
    assert isinstance(after, Failure)
    assert after.error_class == "poison"


def test_machines_lost_near_each_other_in_a_long_training_are_no_poison():
    state = Retries()
    for done in (500_000.0, 500_010.0, 500_003.0, 499_990.0, 500_009.0):
        assert isinstance(state.after(failure("infra"), done), Retry)


def test_point_that_was_passed_is_no_poison():
    state = Retries()
    for done in (500.0, 500.0, 501.0, 500.0):
        assert isinstance(state.after(failure("infra"), done), Retry)


def test_failures_before_any_progress_are_not_poison():
    state = Retries()
    assert all(isinstance(state.after(failure("infra"), 0.0), Retry) for _ in range(20))


def test_node_that_is_taken_away_is_charged_to_nobody_and_tried_again_at_once():
    state = Retries()
    for _ in range(50):
        assert state.after(failure("infra", PREEMPTED), 500.0) == Retry(0, 0.0)
        assert state.after_shard("s", failure("infra", PREEMPTED)) == Retry(0, 0.0)
    assert state == Retries()


def test_shard_is_poison_at_its_third_failure_and_others_are_not():
    state = Retries()
    assert isinstance(state.after_shard("a", failure("code")), Retry)
    assert isinstance(state.after_shard("a", failure("infra")), Retry)
    assert isinstance(state.after_shard("b", failure("infra")), Retry)
    after = state.after_shard("a", failure("memory"))
    assert isinstance(after, Failure)
    assert (after.error_class, after.message) == ("poison", "shard a failed 3 times: it went wrong")


@pytest.mark.parametrize("error_class", ["user", "numerics", "stopped"])
def test_final_failure_of_a_shard_ends_the_step_at_once_under_its_own_class(error_class: ErrorClass):
    after = Retries().after_shard("a", failure(error_class))
    assert isinstance(after, Failure)
    assert (after.error_class, after.message) == (error_class, "shard a: it went wrong")


def test_backoff_doubles_up_to_a_minute_and_no_two_wait_equally_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retries, "BACKOFF_S", 1.0)
    for count, longest_s in enumerate([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0], 1):
        waits = [backoff_s(count) for _ in range(200)]
        assert longest_s / 2 <= min(waits) < 0.6 * longest_s
        assert 0.9 * longest_s < max(waits) <= longest_s
        assert len(set(waits)) > 100
