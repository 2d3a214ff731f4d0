"""Jobs of a Ray cluster: one for each attempt of a run, whose driver is the coordinator.

Nothing here retries a job: an attempt that is lost is followed by another one, which goes on from the store.
"""

import contextlib
import json
import logging
import os
import shlex
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cluster.auth import AuthError, find_token, redacted, require_token
from cluster.shapes import STABLE, ray_version

JobStatus = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
OVER: frozenset[JobStatus] = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})
_DASHBOARD_PORT = 8265
_CONNECT_S = 5.0
_TRIES = 3
_TAKEN = "already exists"
_STARTING, _STARTING_S = "No available agent", 60.0
"""What a cluster answers that has just been started, and how long it may."""
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

    def submit(
        self,
        job_id: str,
        command: Sequence[str],
        code: Path,
        env: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> Job:
        """Hand a command over, to be run in a directory with the content of the archive ``code``.

        It runs on a stable node where the cluster has nodes that are labelled so.  A job of that id that is there
        already is returned as it is: asking twice starts one.
        """
        deadline = time.monotonic() + _STARTING_S
        while (known := self.find(job_id)) is None:
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
                if not (is_taken or _STARTING in str(error)) or time.monotonic() >= deadline:
                    raise
                time.sleep(1.0)
        return known

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
        text = redacted(str(error))
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
            raise SilentError(f"the cluster at {url} does not answer: {text}") from error
        raise ClusterError(f"the cluster at {url} refused: {text}") from error
