"""What all executors must do, on a cluster of two nodes: the tests of the other executors again."""

import os
from collections.abc import Callable, Iterator

import pytest

from cluster.executor import Executor
from cluster.ray_executor import RayExecutor
from tests.cluster import test_executors
from tests.cluster.test_executors import (  # noqa: F401 - pytest finds them here too
    test_call_that_is_killed_says_so,
    test_call_that_raises_ends_with_a_failure_and_its_traceback_is_kept,
    test_calls_run_with_their_payload_and_their_output_is_kept,
    test_cancelled_call_ends_with_a_failure,
    test_executor_tells_its_cores,
    test_gang_has_ranks_and_one_address,
    test_waiting_for_nothing_returns_nothing,
)
from tests.support.executors import NUM_CPUS, Kept
from tests.support.ray_cluster import cluster_env, ray_cluster
from tests.workflows.test_coordinator import (  # noqa: F401 - as above
    test_gang_with_a_failing_rank_stops_the_others,
    test_gang_with_a_killed_rank_restarts_as_a_whole,
    test_run_commits_every_step_and_the_next_one_executes_nothing,
    test_worker_killed_once_is_retried,
)
from tests.workflows.test_shards import (  # noqa: F401 - as above
    test_map_with_a_killed_shard_executes_only_that_one_again,
    test_map_with_a_shard_that_fails_three_times_names_it_and_keeps_the_others,
    test_one_changed_input_executes_only_its_shard,
)
from workflows import retries

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def on_cluster() -> Iterator[Executor]:
    """An executor that is connected to a cluster, as in a job there."""
    before = dict(os.environ)
    with ray_cluster(2, NUM_CPUS - 2) as cluster:
        os.environ.update(cluster_env())
        executor = RayExecutor(num_cpus=1, address=cluster.gcs)
        try:
            yield executor
        finally:
            executor.close()
            os.environ.clear()
            os.environ.update(before)


def _executor(request: pytest.FixtureRequest, on_cluster: Executor) -> Executor | Callable[[], Executor]:
    """For tests of executors the thing itself, for tests of workflows how to make one."""
    if request.function.__module__ == test_executors.__name__:
        return on_cluster
    return lambda: Kept(on_cluster)


executor = pytest.fixture(_executor)
executor_of_gangs = pytest.fixture(_executor)


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_S", 0.01)
