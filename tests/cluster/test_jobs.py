"""The client of a cluster's jobs, against a dashboard that answers what a test wants."""

import itertools
import json
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from cluster import jobs as jobs_module
from cluster.auth import AuthError
from cluster.jobs import ClusterError, Jobs, dashboard_url
from cluster.shapes import STABLE, ray_version
from tests.support.ray_token import TOKEN

pytestmark = [pytest.mark.filterwarnings("default::ResourceWarning"), pytest.mark.timeout(120)]


class Dashboard(ThreadingHTTPServer):
    """Answers as a dashboard does; remembers what was submitted."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.version = ray_version()
        self.token = TOKEN
        self.jobs: dict[str, dict[str, Any]] = {}
        self.refusals: list[str] = []
        """What the next submissions are refused with."""
        self.lost: list[Literal["asked", "answer", "all"]] = []
        """What gets lost of the next submissions on the way there or back; with all, it is silent from then on."""
        self.is_silent = False
        """Whether it hangs up on whoever asks for its jobs."""
        self.labels: dict[str, str] = {}
        self.agent_port: int | None = 52365
        self.lists_nodes_after_s = 0.0
        """Of the head's job agent: -1 where it has none, None where that is not told."""
        self.asked: dict[str, Any] = {}
        """The last submission."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, code: int, value: Any) -> None:
        body = json.dumps(value).encode() if not isinstance(value, str) else value.encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def _is_let_in(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.server.token}":
            return True
        self._answer(401, "Unauthorized")
        return False

    def do_GET(self) -> None:
        if not self._is_let_in():
            return
        if self.path == "/api/version":
            found = {"version": "4", "ray_version": self.server.version, "ray_commit": "x", "session_name": "s"}
            self._answer(200, found)
        elif self.path.startswith("/api/v0/nodes"):
            node = {
                "node_id": "n", "node_ip": "127.0.0.1", "is_head_node": True, "state": "ALIVE", "state_message": "",
                "node_name": "n", "resources_total": {}, "labels": self.server.labels,
            }  # fmt: skip
            rows = {"result": [node], "total": 1, "num_after_truncation": 1, "num_filtered": 1}
            self._answer(200, {"result": True, "msg": "", "data": {"result": {**rows, "partial_failure_warning": ""}}})
        elif self.path.startswith("/nodes") and self.server.agent_port is not None:
            time.sleep(self.server.lists_nodes_after_s)
            other = {"raylet": {"isHeadNode": False, "dashboardAgentListenPort": 1}}
            head = {"raylet": {"isHeadNode": True, "dashboardAgentListenPort": self.server.agent_port}}
            self._answer(200, {"result": True, "data": {"summary": [other, head]}})
        elif self.path.startswith("/api/jobs") and self.server.is_silent:
            self.close_connection = True
        elif self.path.startswith("/api/jobs"):
            self._answer(200, list(self.server.jobs.values()))
        else:  # is a package there already
            self._answer(404, "")

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, "")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.refusals:
            self._answer(500, self.server.refusals.pop(0))
            return
        lost = self.server.lost.pop(0) if self.server.lost else ""
        if lost == "asked":
            self.close_connection = True
            return
        job_id = asked["submission_id"]
        self.server.jobs[job_id] = {
            "type": "SUBMISSION", "submission_id": job_id, "status": "PENDING", "entrypoint": asked["entrypoint"],
            "message": "", "metadata": asked["metadata"], "runtime_env": asked["runtime_env"],
            "driver_info": None,
        }  # fmt: skip
        self.server.asked = asked
        if lost:
            self.server.is_silent = lost == "all"
            self.close_connection = True
            return
        self._answer(200, {"job_id": job_id, "submission_id": job_id})


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Dashboard]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_ADDRESS", "http://192.0.2.77:1")  # what is asked for counts
    server = Dashboard()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "code.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.py", "")
    return path


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://head:8265", "http://head:8265"),
        ("head:9000", "http://head:9000"),
        ("10.0.0.1", "http://10.0.0.1:8265"),
        ("https://ray.example.org:443", "https://ray.example.org:443"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_address_of_a_dashboard(address: str, url: str):
    assert dashboard_url(address) == url


@pytest.mark.parametrize("address", ["ray://head:10001", "s3://x", "http://", "", "http://h:99999", "http://h:8265/x"])
def test_address_that_is_none_is_refused(address: str):
    with pytest.raises(ClusterError, match="8265"):
        dashboard_url(address)


def test_job_is_handed_over_once_however_often_it_is_asked_for(dashboard: Dashboard, code: Path):
    jobs = Jobs(dashboard.url)
    assert jobs.submit("r1-a1", ["python", "-m", "x", "a b"], code, {"A": "1"}, {"run": "r1"}).status == "PENDING"
    asked = dashboard.asked
    assert asked["entrypoint"] == "python -m x 'a b'"
    assert asked["runtime_env"]["env_vars"] == {"A": "1"}
    assert asked["runtime_env"]["working_dir"].startswith("gcs://")
    assert "entrypoint_label_selector" not in asked
    dashboard.asked = {}
    assert jobs.submit("r1-a1", ["python"], code, {}, {}).job_id == "r1-a1"
    assert not dashboard.asked


def test_job_goes_to_a_stable_node_where_there_are_any(dashboard: Dashboard, code: Path):
    dashboard.labels = {**STABLE, "other": "x"}
    Jobs(dashboard.url).submit("r1-a1", ["python"], code, {}, {})
    assert dashboard.asked["entrypoint_label_selector"] == STABLE


NO_AGENT = "No available agent to submit job, please try again later."


@pytest.mark.parametrize("port", [52365, 0, None])
def test_cluster_that_has_just_started_is_asked_again(dashboard: Dashboard, code: Path, port: int | None):
    dashboard.agent_port = port
    dashboard.refusals = [NO_AGENT] * 2
    assert Jobs(dashboard.url).submit("r1-a1", ["python"], code, {}, {}).job_id == "r1-a1"


def test_cluster_that_is_slow_to_list_its_nodes_is_given_the_job(dashboard: Dashboard, code: Path, monkeypatch):
    monkeypatch.setattr(jobs_module, "_CONNECT_S", 1.0)
    dashboard.lists_nodes_after_s = 2.5
    assert Jobs(dashboard.url).submit("r1-a1", ["python"], code, {}, {}).job_id == "r1-a1"


def test_cluster_whose_job_agent_has_no_port_is_refused_without_waiting(dashboard: Dashboard, code: Path):
    dashboard.agent_port = -1
    with pytest.raises(
        ClusterError, match=r"takes no jobs: the job agent of its head .*runs without its port"
    ) as error:
        Jobs(dashboard.url).submit("r1-a1", ["python"], code, {}, {})
    assert "--dashboard-agent-listen-port PORT (52365 by default)" in str(error.value)
    assert not dashboard.asked


def test_cluster_whose_job_agent_never_answers_is_given_up_in_our_words(dashboard: Dashboard, code: Path, monkeypatch):
    monkeypatch.setattr(jobs_module, "_STARTING_S", 1.5)
    seconds = itertools.count()
    monkeypatch.setattr(jobs_module, "time", SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda s: None))
    dashboard.refusals = [NO_AGENT] * 10
    with pytest.raises(ClusterError, match=r"takes no jobs: .*dashboard_agent\.log.*: No available agent$") as error:
        Jobs(dashboard.url).submit("r1-a1", ["python"], code, {}, {})
    assert str(error.value).count(dashboard.url) == 1
    assert 10 - len(dashboard.refusals) == 2


def test_who_waits_for_a_cluster_is_told_once_and_who_does_not_is_not(dashboard: Dashboard, code: Path, monkeypatch):
    monkeypatch.setattr(jobs_module, "_TOLD_AFTER_S", 3600.0)
    jobs, told = Jobs(dashboard.url), list[str]()
    jobs.submit("r1-a1", ["python"], code, {}, {}, told.append)
    assert told == []
    monkeypatch.setattr(jobs_module, "_TOLD_AFTER_S", 0.2)
    dashboard.refusals = [NO_AGENT] * 2
    jobs.submit("r1-a2", ["python"], code, {}, {}, told.append)
    (line,) = told
    assert f"the cluster at {dashboard.url} has not taken the job yet" in line


@pytest.mark.parametrize(("says", "why"), [(None, "timed out"), (b"\x00\x01\x02", "does not answer as the dashboard")])
def test_address_of_something_else_is_refused_naming_it_once(monkeypatch, tmp_path: Path, says: bytes | None, why: str):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(jobs_module, "_CONNECT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

        def answer() -> None:
            server.accept()[0].close()  # is anybody there
            with server.accept()[0] as client:
                if says is None:
                    time.sleep(2.0)
                else:
                    client.sendall(says)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ClusterError, match=why) as error:
            Jobs(url)
        thread.join()
    assert str(error.value).count(url) == 1
    assert str(error.value).isprintable()


def test_job_that_somebody_else_submits_at_the_same_time_is_found(dashboard: Dashboard, code: Path):
    jobs = Jobs(dashboard.url)
    jobs.submit("r1-a1", ["python"], code, {}, {})
    job, dashboard.jobs = dashboard.jobs, {}
    dashboard.refusals = ["Job with submission_id r1-a1 already exists."]
    threading.Timer(0.5, lambda: dashboard.jobs.update(job)).start()
    assert jobs.submit("r1-a1", ["python"], code, {}, {}).job_id == "r1-a1"


def test_cluster_that_refuses_a_job_says_why(dashboard: Dashboard, code: Path):
    dashboard.refusals = [f"no such thing {TOKEN}."]
    with pytest.raises(ClusterError, match=r"refused: .*no such thing \*\*\*$"):
        Jobs(dashboard.url).submit("r1-a1", ["python"], code, {}, {})


def test_cluster_of_another_ray_is_refused_naming_both(dashboard: Dashboard):
    dashboard.version = "2.58.0"
    with pytest.raises(ClusterError, match=rf"runs Ray 2\.58\.0, this is Ray {ray_version()}"):
        Jobs(dashboard.url)


def test_token_that_is_not_taken_is_told_without_showing_it(dashboard: Dashboard):
    dashboard.token = "another"
    with pytest.raises(AuthError, match="does not take this token") as error:
        Jobs(dashboard.url)
    assert TOKEN not in str(error.value)


def test_token_that_is_missing_is_told_as_missing(dashboard: Dashboard, monkeypatch, tmp_path: Path):
    dashboard.token = "another"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AuthError, match=r"wants a token, and there is none here\. Set RAY_AUTH_TOKEN_PATH"):
        Jobs(dashboard.url)


def test_cluster_that_is_not_there_is_given_up_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(jobs_module, "_TRIES", 2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        start_s = time.monotonic()
        with pytest.raises(ClusterError, match=r"no cluster answers at .*ssh -L"):
            Jobs(f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert time.monotonic() - start_s < 5.0


def test_another_machine_without_a_token_is_not_even_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("it was asked"))
    with pytest.raises(AuthError, match="is not this machine, and there is no Ray token"):
        Jobs("http://192.0.2.77:8265")
