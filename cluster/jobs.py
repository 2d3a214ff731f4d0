"""Jobs of a Ray cluster: one for each attempt of a run, whose driver is the coordinator.

Nothing here retries a job: an attempt that is lost is followed by another one, which goes on from the store.
"""

import contextlib
import json
import logging
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.auth import AuthError, find_token, redacted, require_token
from cluster.shapes import STABLE, ray_version

JobStatus = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
OVER: frozenset[JobStatus] = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})
_DASHBOARD_PORT = 8265
_AGENT_PORT = 52365
_CONNECT_S = 5.0
_TOLD_AFTER_S = 3.0
_TRIES = 3
_TAKEN = "already exists"
_STARTING, _STARTING_S = "No available agent", 30.0
"""What a cluster answers that has just been started, each time after ten seconds, and how long it may."""
_ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Ray's client prefers these to the address that it is given."""
_OWN_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray tells a driver about its job."""


class ClusterError(RuntimeError):
    """A cluster that cannot be reached, or does not do what is asked.  The message says what to do."""


class SilentError(ClusterError):
    """A cluster that does not answer: what it was asked to do it may have done."""


@dataclass(frozen=True)
class Job:
    """A job that was handed over."""

    job_id: str
    status: JobStatus
    message: str = ""


def dashboard_url(address: str) -> str:
    """http://host:port of a cluster's dashboard.  ClusterError for an address of another kind."""
    scheme, separator, _ = address.partition("://")
    if separator and scheme not in ("http", "https"):
        raise ClusterError(
            f"--address {address}: jobs are submitted to the dashboard, http://HOST:{_DASHBOARD_PORT}, not to an "
            f"address of {scheme}://"
        )
    url = urlsplit(address if separator else f"http://{address}")
    try:
        port = url.port or _DASHBOARD_PORT
    except ValueError:
        port = 0
    if not url.hostname or not port or url.path.strip("/") or url.query:
        raise ClusterError(f"--address {address} is no address of a dashboard; write http://HOST:{_DASHBOARD_PORT}")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return f"{url.scheme}://{host}:{port}"


class Jobs:
    """The jobs of the cluster at an address."""

    def __init__(self, address: str) -> None:
        """Connect.  AuthError without a token that it takes, ClusterError if it is not there or is another Ray."""
        self.url = dashboard_url(address)
        token = require_token(self.url)
        if token is not None:
            os.environ["RAY_AUTH_MODE"] = "token"
        self._wait_for_port()
        self._require_dashboard()
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)  # it tells each upload
        with _readable(self.url), _no_other_address():
            self._client = JobSubmissionClient(self.url)
            found = self._client.get_version()
            theirs = self._client._do_request("GET", "/api/version").json()["ray_version"]
        if theirs != ray_version():
            raise ClusterError(
                f"the cluster at {self.url} runs Ray {theirs}, this is Ray {ray_version()} (jobs {found}): a gang "
                "would not start. Install the cluster's version here, or update the cluster"
            )

    def _wait_for_port(self) -> None:
        """ClusterError if nobody answers, after a few tries: the client itself would wait without end."""
        url = urlsplit(self.url)
        assert url.hostname is not None
        for attempt in range(_TRIES):
            try:
                socket.create_connection((url.hostname, url.port or 0), _CONNECT_S).close()
                return
            except OSError as error:
                if attempt == _TRIES - 1:
                    raise ClusterError(
                        f"no cluster answers at {self.url} ({error}). Start it, or open a tunnel to its dashboard: "
                        f"ssh -L {url.port}:127.0.0.1:{_DASHBOARD_PORT} HEAD"
                    ) from None
                time.sleep(2**attempt)

    def _require_dashboard(self) -> None:
        """ClusterError if what listens there is something else: the client itself would wait for it without end."""
        import requests

        try:
            requests.get(f"{self.url}/api/version", timeout=_CONNECT_S, allow_redirects=False)
        except requests.RequestException as error:
            raise ClusterError(
                f"what listens at {self.url} does not answer as the dashboard of a Ray cluster: {_cause(error)}. Give "
                f"the address that ray start calls the dashboard's, port {_DASHBOARD_PORT} unless another was chosen; "
                "at the end of a tunnel, look whether the dashboard runs where it leads"
            ) from None

    def submit(
        self,
        job_id: str,
        command: Sequence[str],
        code: Path,
        env: Mapping[str, str],
        metadata: Mapping[str, str],
        tell: Callable[[str], None] = lambda line: None,
    ) -> Job:
        """Hand a command over, to be run in a directory with the content of the archive ``code``.

        It runs on a stable node where the cluster has nodes that are labelled so.  A job of that id that is there
        already is returned as it is: asking twice starts one.  ``tell`` gets a line once this takes long.
        """
        line = (
            f"waiting: the cluster at {self.url} has not taken the job yet; its code is under way, or the job agent of "
            f"its head node does not answer, which is waited for about {_STARTING_S:.0f} s"
        )
        timer = threading.Timer(_TOLD_AFTER_S, tell, [line])
        timer.start()
        try:
            return self._submit(job_id, command, code, env, metadata)
        finally:
            timer.cancel()

    def _submit(
        self, job_id: str, command: Sequence[str], code: Path, env: Mapping[str, str], metadata: Mapping[str, str]
    ) -> Job:
        deadline = time.monotonic() + _STARTING_S
        while (known := self.find(job_id)) is None:
            if self._has_agent() is False:
                raise ClusterError(
                    f"{self._takes_no_jobs()}. It runs without its port, as a rule since another process there has it"
                )
            try:
                with _readable(self.url), _no_other_address():
                    self._client.submit_job(
                        entrypoint=shlex.join(command),
                        submission_id=job_id,
                        runtime_env={"working_dir": str(code), "env_vars": dict(env)},
                        metadata=dict(metadata),
                        entrypoint_label_selector=STABLE if self._has_stable_nodes() else None,
                    )
                return Job(job_id, "PENDING")
            except ClusterError as error:
                is_taken = _TAKEN in str(error)  # by somebody who asked for the same at the same time
                is_starting, is_late = _STARTING in str(error), time.monotonic() >= deadline
                if is_starting and is_late:
                    raise ClusterError(f"{self._takes_no_jobs()}. It was asked to the end: {_STARTING}") from error
                if is_late or not (is_taken or is_starting):
                    raise
                time.sleep(1.0)
        return known

    def _takes_no_jobs(self) -> str:
        return (
            f"the cluster at {self.url} takes no jobs: the job agent of its head node does not answer. Look into "
            "dashboard_agent.log among the logs of the head (/tmp/ray/session_latest/logs); if its port is taken, by "
            "another cluster on that machine for example, start the head with one that is free: ray start --head "
            f"--dashboard-agent-listen-port PORT ({_AGENT_PORT} by default)"
        )

    def _has_agent(self) -> bool | None:
        """Whether the job agent of the head node listens; None if the dashboard does not tell."""
        try:
            with _readable(self.url):
                answer = self._client._do_request("GET", "/nodes?view=summary", timeout=_CONNECT_S)
                if answer.status_code != 200:
                    return None
                nodes = [node.get("raylet", {}) for node in answer.json().get("data", {}).get("summary", [])]
        except SilentError:  # a large cluster takes its time for a list of all its nodes
            return None
        ports = [node.get("dashboardAgentListenPort") for node in nodes if node.get("isHeadNode")]
        return ports[0] > 0 if ports and isinstance(ports[0], int) and ports[0] else None

    def _has_stable_nodes(self) -> bool:
        from ray.util.state import list_nodes

        found: list[Any] = list_nodes(self.url, timeout=int(_CONNECT_S), limit=10_000, detail=True)
        return any(node.state == "ALIVE" and STABLE.items() <= (node.labels or {}).items() for node in found)

    def find(self, job_id: str) -> Job | None:
        """A job by its id."""
        with _readable(self.url):
            for details in self._client.list_jobs():
                if details.submission_id == job_id:
                    return Job(job_id, details.status.value, details.message or "")
        return None

    def of_run(self, run_id: str, store_id: str) -> list[Job]:
        """The jobs that were handed over for a run of a store: another store may have a run of that name."""
        wanted = {"run": run_id, "store": store_id}
        with _readable(self.url):
            return [
                Job(details.submission_id, details.status.value, details.message or "")
                for details in self._client.list_jobs()
                if details.submission_id and wanted.items() <= (details.metadata or {}).items()
            ]

    def stop(self, job_id: str) -> None:
        """End a job and everything that it started."""
        with _readable(self.url):
            self._client.stop_job(job_id)

    def log(self, job_id: str) -> str:
        """What the driver of a job printed."""
        with _readable(self.url):
            return redacted(self._client.get_job_logs(job_id))


def stop_own_job() -> None:
    """Let the job that this process belongs to end as stopped, whatever it exits with; a SIGTERM follows."""
    job_id = json.loads(os.environ.get(_OWN_JOB_VARIABLE, "{}")).get("metadata", {}).get("job_submission_id")
    if job_id is None:
        raise ClusterError("this process belongs to no job of a Ray cluster, so there is none to stop")
    from ray.dashboard.utils import ray_address_to_api_server_url

    Jobs(ray_address_to_api_server_url("auto")).stop(job_id)


@contextlib.contextmanager
def _no_other_address() -> Iterator[None]:
    held = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


@contextlib.contextmanager
def _readable(url: str) -> Iterator[None]:
    """What Ray's client raises, as errors that say what to do."""
    try:
        yield
    except (AuthError, ClusterError):
        raise
    except Exception as error:
        text = redacted(str(error)).rstrip(". \n")
        if type(error).__name__ == "AuthenticationError" or "status code 401" in text or "status code 403" in text:
            token = find_token()
            found = (
                "wants a token, and there is none here"
                if token is None
                else f"does not take this token, {token.source}"
            )
            raise AuthError(
                f"the cluster at {url} {found}. Set RAY_AUTH_TOKEN_PATH to a file with the token that the cluster was "
                "started with"
            ) from None
        if isinstance(error, ConnectionError) or type(error).__module__.startswith(("requests", "urllib3")):
            raise SilentError(f"the cluster at {url} does not answer: {_cause(error)}") from error
        raise ClusterError(f"the cluster at {url} refused: {text}") from error


def _cause(error: BaseException) -> str:
    """What was at the bottom of an error of the network: those above it repeat the address."""
    while below := error.__cause__ or error.__context__:
        error = below
    text = redacted(str(error)).rstrip(". \n")
    return text if text and text.isprintable() else type(error).__name__  # what another protocol says is not
