"""``dlm doctor``: whether a machine, or every node of a cluster, can carry runs, before one is begun."""

import importlib
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cluster import all_reduce
from cluster.all_reduce import Backend, Gang, Measured
from cluster.auth import is_loopback
from cluster.everywhere import Machine, Machines, Question
from cluster.jobs import OVER, Jobs
from cluster.preflight import (
    Check,
    Survey,
    admission_check,
    agreement_checks,
    dashboard_check,
    listening_hosts,
    survey,
    without_secrets,
)
from pipeline.errors import UserError
from pipeline.storage import CACHE_ENV
from workflows.snapshot import OWN_PACKAGES, code_digest, code_zip
from workflows.store_checks import local_root, store_checks

_SURVEY_S, _PORT_S = 120.0, 20.0
_GANG_S = all_reduce.JOIN_S + 30.0
_JOB_S = 600.0
_POLL_S = 1.0
_DASHBOARD_PORT = 8265
_OPENING = '{\n "checks": ['
"""How the JSON of a job begins, among the lines that Ray adds to its log."""
_LOG_LINES = 5
_ENTRIES = ("dlm_core.models.transformer", "pipeline.stage", "workflows.worker", "cluster.gang")
"""Modules through which everything that runs on a node is reached."""
_PORTS = (
    "open all ports between the nodes, and name the network between them: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME (ip "
    "addr shows it); NCCL_DEBUG=INFO tells more"
)


def examine(machines: Machines, url: str, is_reduced: bool) -> list[Check]:
    """All checks, on all machines; ``is_reduced`` with an all-reduce between them."""
    checks = _node_checks(machines)
    surveyed, answering = _survey_checks(machines, url)
    checks += surveyed
    if answering:  # who was silent once is not waited for again
        checks += store_checks(machines, answering, url)
        if is_reduced:
            checks += all_reduce_checks(machines, answering)
    return list(without_secrets(checks))


# --- the nodes --------------------------------------------------------------------------------------------------------


def _node_checks(machines: Machines) -> list[Check]:
    """What there is altogether, and the dashboard."""
    found = machines.machines
    if machines.dashboard is None:
        return [dashboard_check(found[0].name, listening_hosts(_DASHBOARD_PORT), _DASHBOARD_PORT)]
    cpus, gpus = sum(machine.cpus for machine in found), sum(machine.gpus for machine in found)
    checks = [
        Check(
            "nodes", "all", "ok", f"{_counted(len(found), 'node')}, {_counted(cpus, 'core')}, {_counted(gpus, 'GPU')}"
        )
    ]
    checks += [
        Check("nodes", machine.name, "warning", "is about to be taken away", "nothing new is started there")
        for machine in found
        if machine.is_leaving
    ]
    host, port = machines.dashboard
    return [*checks, dashboard_check("all", [host], port), admission_check("all", machines.gcs)]


def _counted(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def _survey_checks(machines: Machines, url: str) -> tuple[list[Check], list[Machine]]:
    """What the machines have, and which of them answered."""
    is_in_cluster = machines.dashboard is not None
    root = local_root(url)
    asked = [
        Question(machine, look_around, (machine.name, str(root or ""), is_in_cluster)) for machine in machines.machines
    ]
    checks: list[Check] = []
    versions: dict[str, dict[str, str]] = {}
    codes: dict[str, str] = {}
    answering: list[Machine] = []
    for reply in machines.ask(asked, _SURVEY_S):
        name = reply.machine.name
        if reply.value is None:
            checks.append(_silent(name, reply.error))
        else:
            answering.append(reply.machine)
            found, codes[name] = reply.value
            checks += found.checks
            versions[name] = found.versions
    return [*checks, *agreement_checks(versions), *_same_code(codes)], answering


def _silent(node: str, error: str) -> Check:
    if "ModuleNotFoundError" in error or "ImportError" in error:
        todo = "install dlm there, or run dlm doctor --address http://HOST:8265, which sends the code along"
        return Check("code", node, "failure", f"cannot be imported: {error}", todo)
    return Check("answer", node, "failure", error, "look whether the node is alive and not overloaded (ray status)")


def look_around(node: str, root: str, is_in_cluster: bool) -> tuple[Survey, str]:
    """What this machine has, and the digest of the code that it would run."""
    cache = Path(os.environ.get(CACHE_ENV) or "~/.cache/dlm").expanduser()
    folders = {**({"store": Path(root)} if root else {}), "temporary": Path(tempfile.gettempdir()), "cache": cache}
    found = survey(node, folders, is_in_cluster)
    code, digest = _code_check(node)
    return Survey((code, *found.checks), found.versions), digest


def _code_check(node: str) -> tuple[Check, str]:
    for module in _ENTRIES:
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            todo = "install what is missing, or send the code along: --address http://HOST:8265"
            return Check("code", node, "failure", f"{module} cannot be imported: {error}", todo), ""
    digest = code_digest(OWN_PACKAGES)[:12]
    return Check("code", node, "ok", f"{digest} in {Path(__file__).parents[1]}"), digest


def _same_code(digests: dict[str, str]) -> list[Check]:
    kinds = sorted({digest for digest in digests.values() if digest})
    if len(kinds) < 2:
        return []
    told = "; ".join(f"{kind} on {', '.join(node for node, d in digests.items() if d == kind)}" for kind in kinds)
    return [Check("same code", "all", "failure", told, "update dlm on all nodes, or send the code along (dlm submit)")]


# --- the network between them -----------------------------------------------------------------------------------------


def all_reduce_checks(machines: Machines, found: Sequence[Machine]) -> list[Check]:
    """A rank a node with gloo, two on a single one; with NCCL a rank a GPU where there are any."""
    each = 2 if len(found) == 1 else 1
    checks = [_all_reduce(machines, "gloo", {machine: each for machine in found})]
    with_gpus = {machine: machine.gpus for machine in found if machine.gpus}
    if busy := [machine.name for machine in with_gpus if not machine.has_free_gpus]:
        told = f"not tried: GPUs of {', '.join(busy)} are in use"
        checks.append(Check("all-reduce (nccl)", "all", "warning", told, "run this again once they are free"))
    elif with_gpus:
        checks.append(_all_reduce(machines, "nccl", with_gpus))
    return checks


def _all_reduce(machines: Machines, backend: Backend, ranks: dict[Machine, int]) -> Check:
    head = next(iter(ranks))
    name, node = f"all-reduce ({backend})", "all" if len(ranks) > 1 else head.name
    (port,) = machines.ask([Question(head, all_reduce.free_port)], _PORT_S)
    if port.value is None:
        return Check(name, node, "failure", port.error, _PORTS)
    gang = Gang(backend, sum(ranks.values()), head.host, port.value)
    asked: list[Question[Measured | None]] = []
    first, is_in_cluster = 0, machines.dashboard is not None
    for machine, count in ranks.items():
        gpus = count if backend == "nccl" else 0
        asked.append(Question(machine, all_reduce.run_ranks, (gang, first, count, is_in_cluster), gpus))
        first += count
    replies = machines.ask(asked, _GANG_S)
    # of ranks that wait and one that failed, the one that failed says why
    if errors := sorted((r for r in replies if r.error), key=lambda r: "not through" in r.error):
        return Check(name, node, "failure", f"{errors[0].machine.name}: {errors[0].error}", _PORTS)
    measured = next(reply.value for reply in replies if reply.value is not None)
    return Check(name, node, "ok", str(measured))


# --- as a job ---------------------------------------------------------------------------------------------------------


def examine_as_job(address: str, url: str, is_reduced: bool, tell: Callable[[str], None]) -> list[Check]:
    """Have a job of the cluster at an address do it; what it found.  ClusterError if it cannot be reached.

    ``tell`` gets a line if the cluster takes long to take the job.
    """
    root = local_root(url)
    if root is not None and not is_loopback(address) and not Path(url).is_absolute():
        raise UserError(f"--store {url} is relative; give the path that all nodes see")
    jobs = Jobs(address)
    job_id = f"doctor-{secrets.token_hex(6)}"
    python = sys.executable if is_loopback(address) else "python"
    flags = ["--store", str(root or url), "--address", "auto", "--json"]
    flags.append("--all-reduce" if is_reduced else "--no-all-reduce")
    with tempfile.TemporaryDirectory(prefix="dlm-doctor-") as folder:
        code = Path(folder, "code.zip")
        code.write_bytes(code_zip(OWN_PACKAGES))
        jobs.submit(job_id, [python, "-m", "workflows.cli", "doctor", *flags], code, {}, {"doctor": "dlm"}, tell)
        status = _wait(partial(_status, jobs, job_id), _JOB_S)
    text = jobs.log(job_id)
    if status not in OVER:
        jobs.stop(job_id)
        todo = "look whether the cluster has room for a job: dlm doctor wants no core, but a node that starts processes"
        return [_of_job(job_id, f"was {status.lower()} after {_JOB_S:.0f} s", text, todo)]
    return parsed_checks(text) or [_of_job(job_id, f"ended as {status.lower()}", text, "its log says why")]


def _status(jobs: Jobs, job_id: str) -> str:
    job = jobs.find(job_id)
    return job.status if job else "PENDING"


def _wait(status: Callable[[], str], within_s: float) -> str:
    deadline = time.monotonic() + within_s
    while (found := status()) not in OVER and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return found


def _of_job(job_id: str, what: str, log: str, todo: str) -> Check:
    last = " | ".join(line.strip() for line in log.strip().splitlines()[-_LOG_LINES:])
    return Check("job", "all", "failure", f"{job_id} {what}: {last}", todo)


def parsed_checks(log: str) -> list[Check]:
    """The checks that a job printed; none if it did not come that far."""
    start = log.rfind(_OPENING)
    if start < 0:
        return []
    value: dict[str, Any] = json.JSONDecoder().raw_decode(log, start)[0]
    return [Check(**check) for check in value["checks"]]


def has_failed(checks: Sequence[Check]) -> bool:
    """Whether any check failed; warnings are none."""
    return any(check.status == "failure" for check in checks)
