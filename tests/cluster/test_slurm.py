"""The Slurm script: shellcheck, what its directives ask for, and runs of it with commands that stand in for Slurm's."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.manifests.slurm import Slurm, slurm_script
from cluster.shapes import DRAIN_S, ClusterShape, Head, WorkerGroup, resume_command

GROUP = WorkerGroup("nodes", 2, 8, 64, gpus=4, gpu_kind="h100")
SHAPE = ClusterShape("dlm", "s3://bucket/store", (GROUP,), labels={"team": "x"})
SLURM = Slurm("/opt/dlm", "/home/me/.ray/auth_token", partition="gpu,more", account="lab", time_limit="2-00:00:00")
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
STARTED_S = 20.0


def _directives(script: str) -> list[str]:
    return re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE)


def _shellcheck(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SHELLCHECK, *options, "-"], input=text, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("elastic", [False, True])
def test_shellcheck_finds_nothing(elastic: bool) -> None:
    group = dataclasses.replace(GROUP, min_count=1, max_count=2) if elastic else GROUP
    shape = dataclasses.replace(SHAPE, store="/it's/store;x", workers=(group,))
    checked = _shellcheck(slurm_script(shape, SLURM, "run-1"))
    assert (checked.returncode, checked.stdout) == (0, "")
    assert _shellcheck("#!/bin/sh\necho $unset\n").returncode == 1


def test_what_is_asked_of_slurm() -> None:
    asked = _directives(slurm_script(SHAPE, SLURM, "run-1"))
    assert asked == [
        "job-name=dlm", "nodes=2", "ntasks-per-node=1", "cpus-per-task=8", "gpus-per-node=h100:4", "mem=61035M",
        "partition=gpu,more", "account=lab", "time=2-00:00:00", "exclusive", "requeue", "signal=B:TERM@300",
        "open-mode=append", "output=dlm-%j.log",
    ]  # fmt: skip


def test_what_is_asked_of_slurm_for_an_elastic_group_without_gpus() -> None:
    group = WorkerGroup("nodes", 4, 8, 64, min_count=2, max_count=4)
    shape = dataclasses.replace(SHAPE, workers=(group,))
    asked = _directives(slurm_script(shape, Slurm("/opt/dlm", "/token"), "run-1"))
    assert "nodes=2-4" in asked
    assert "no-kill" in asked  # a node that is lost takes the others with it otherwise
    assert not [option for option in asked if option.startswith(("gpus", "partition", "account", "time"))]


def test_directives_stand_before_the_first_command() -> None:
    lines = slurm_script(SHAPE, SLURM, "run-1").splitlines()
    commands = [place for place, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(place for place, line in enumerate(lines) if line.startswith("#SBATCH")) < commands[0]


@pytest.mark.parametrize(
    ("shape", "slurm", "message"),
    [
        ({"workers": ()}, {}, r"^workers is \[\]: a Slurm job has nodes of one kind"),
        ({"workers": (GROUP, dataclasses.replace(GROUP, name="more"))}, {}, r"^workers is \['nodes', 'more'\]"),
        ({"workers": (dataclasses.replace(GROUP, count=0),)}, {}, r"^workers\.nodes\.count is 0"),
        ({"workers": (dataclasses.replace(GROUP, min_count=1, max_count=4),)}, {}, r"^workers\.nodes\.count is 2: .*4"),
        ({"workers": (dataclasses.replace(GROUP, is_spot=True),)}, {}, r"^workers\.nodes\.is_spot is True"),
        ({"head": Head(cpus=8)}, {}, "^head is "),
        ({"image": "dlm:1"}, {}, "^image is 'dlm:1'"),
        ({"shm_gb": 4}, {}, "^shm_gb is 4"),
        ({}, {"environment": "venv"}, r"^slurm\.environment is 'venv': an absolute path"),
        ({}, {"token_path": ""}, r"^slurm\.token_path is ''"),
        ({}, {"token_path": "/a\n/b"}, r"^slurm\.token_path is "),
        ({}, {"partition": "a b"}, r"^slurm\.partition is 'a b'"),
        ({}, {"account": "a\n#SBATCH --x"}, r"^slurm\.account is "),
        ({}, {"time_limit": "two days"}, r"^slurm\.time_limit is 'two days'"),
        ({}, {"max_requeues": -1}, r"^slurm\.max_requeues is -1"),
    ],
)
def test_what_slurm_cannot_have_is_refused(shape: dict[str, Any], slurm: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slurm_script(dataclasses.replace(SHAPE, **shape), dataclasses.replace(SLURM, **slurm), "run-1")


# runs of it: commands on the path stand in for Slurm's, for Ray and for dlm

_COMMANDS = {
    "bin/scontrol": 'echo "scontrol $*" >>"$LOG"\n[ "$1" = show ] && printf "node-a\\nnode-b\\n" || true',
    "bin/srun": """echo "srun $*" >>"$LOG"
while [ "${1#--}" != "$1" ]; do
  case "$1" in --nodelist=*) export ON_NODE="${1#*=}" ;; esac
  shift
done
exec "$@\"""",
    "bin/getent": '[ "$*" = "ahostsv4 node-a" ] && cat "$WORK/known-on-$ON_NODE"',
    "bin/hostname": '[ "$*$ON_NODE" = "--all-ip-addressesnode-a" ] && cat "$WORK/addresses"',
    "venv/bin/ray": """case "$1" in
  start)
    trap 'echo "ray ended" >>"$LOG"; [ -e "$WORK/drains" ] || exit 0' TERM
    drain="$RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    echo "ray $RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH $drain ${RAY_AUTH_TOKEN-unset} $*" >>"$LOG"
    [ ! -e "$WORK/no-head" ] || exit 1
    touch "$WORK/started"
    while :; do sleep 0.05; done ;;
  health-check) echo "$*" >>"$WORK/looked"; [ -e "$WORK/started" ] ;;
esac""",
    "venv/bin/dlm": '[ "$*" = "status run-1 --store $DLM_STORE --json" ] && cat "$WORK/status"',
    "venv/bin/python": """if [ "$2" = cluster.nodes ]; then
  until [ "$(grep -c "^ray token" "$LOG")" = 2 ]; do sleep 0.05; done
  echo "nodes $RAY_ADDRESS $*" >>"$LOG"
  exit
fi
echo "driver $RAY_ADDRESS $DLM_STORE ${PYTHONSAFEPATH-unsafe} $*" >>"$LOG"
trap 'echo "driver saved" >>"$LOG"; sleep 0.3; exit 75' TERM
touch "$WORK/driving"
[ ! -e "$WORK/wait" ] || while :; do sleep 0.05; done
exit "$(cat "$WORK/code")\"""",
}


@dataclass
class World:
    """A directory with commands, a token and a script."""

    work: Path
    env: dict[str, str]

    def start(self, **changes: str) -> "subprocess.Popen[str]":
        """Start the script in a session of its own."""
        return subprocess.Popen(
            ["bash", str(self.work / "job.sh")], env=self.env | changes, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, **changes: str) -> tuple[int, str]:
        """Its exit code and what it printed."""
        process = self.start(**changes)
        output, _ = process.communicate(timeout=40)
        assert self.left(process) == []
        return process.returncode, output

    def left(self, process: "subprocess.Popen[str]") -> list[int]:
        """Processes of its session that are still there."""
        listed = subprocess.run(["ps", "-o", "pid=", "--sid", str(process.pid)], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def log(self) -> list[str]:
        """What the commands were called with."""
        return (self.work / "log").read_text(encoding="utf-8").splitlines()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A job of two nodes that resumes run-1."""
    for name, body in _COMMANDS.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        file.chmod(0o755)
    token = tmp_path / "token"
    token.write_text("f00d" * 8, encoding="utf-8")
    token.chmod(0o600)
    (tmp_path / "code").write_text("0", encoding="utf-8")
    (tmp_path / "known-on-node-a").write_text("127.0.1.1 STREAM node-a\n", encoding="utf-8")
    (tmp_path / "known-on-node-b").write_text("10.1.2.3 STREAM node-a\n10.1.2.3 DGRAM\n", encoding="utf-8")
    (tmp_path / "addresses").write_text("\n", encoding="utf-8")
    (tmp_path / "status").write_text('{\n "status": "stopped"\n}\n', encoding="utf-8")
    slurm = Slurm(str(tmp_path / "venv"), str(token), max_requeues=3)
    (tmp_path / "job.sh").write_text(slurm_script(SHAPE, slurm, "run-1"), encoding="utf-8")
    yield World(
        tmp_path,
        {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "WORK": str(tmp_path),
            "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node-[a-b]", "RAY_AUTH_TOKEN": "of another cluster",
        },
    )  # fmt: skip
    shutil.rmtree(tmp_path / "venv")


def test_ray_is_started_on_every_node_and_the_run_is_resumed(world: World) -> None:
    assert world.run() == (0, "")
    log = world.log()
    token = world.work / "token"
    sizes = "--num-cpus=8 --num-gpus=4 --memory=64000000000 --labels=dlm.io/stable=true,dlm.io/gpu=h100,team=x"
    head, worker = (line for line in log if line.startswith("ray token"))
    common = f"ray token {token} {DRAIN_S} unset start"
    assert head == (
        f"{common} --head --node-ip-address=10.1.2.3 --port=6379 --dashboard-host=127.0.0.1 {sizes} "
        "--disable-usage-stats --block"
    )
    assert worker == f"{common} --address=10.1.2.3:6379 {sizes} --disable-usage-stats --block"
    places = [re.findall(r"--nodelist=(\S+)", line) for line in log if line.startswith("srun")]
    assert places == [["node-b"], ["node-a"], ["node-b"]]
    _, _, expected = resume_command("run-1", SHAPE.store).partition("python ")
    assert [line for line in log if line.startswith("driver")] == [f"driver 10.1.2.3:6379 {SHAPE.store} 1 {expected}"]
    assert log.count("ray ended") == 2
    assert not [line for line in log if "requeue" in line]
    assert "f00d" not in "\n".join(log)


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(75, "", True), (75, "2", True), (75, "3", False), (3, "", False), (5, "", False)],
)
def test_only_what_can_go_on_is_requeued(world: World, code: int, restarts: str, requeued: bool) -> None:
    (world.work / "code").write_text(str(code), encoding="utf-8")
    returned, _ = world.run(**({"SLURM_RESTART_COUNT": restarts} if restarts else {}))
    assert returned == code
    assert ("scontrol requeue 77" in world.log()) is requeued
    assert world.log().count("ray ended") == 2


def test_a_run_that_was_cancelled_is_not_requeued(world: World) -> None:
    (world.work / "code").write_text("75", encoding="utf-8")
    (world.work / "status").write_text('{\n "status": "cancelled"\n}\n', encoding="utf-8")
    assert world.run() == (75, "")
    assert "scontrol requeue 77" not in world.log()


def test_a_run_that_was_cancelled_is_not_requeued_however_much_is_told_of_it(world: World) -> None:
    (world.work / "code").write_text("75", encoding="utf-8")
    steps = ' "step": "a step of many"\n' * 20_000
    (world.work / "status").write_text(f'{{\n "status": "cancelled"\n{steps}}}\n', encoding="utf-8")
    assert world.run() == (75, "")
    assert "scontrol requeue 77" not in world.log()


@pytest.mark.parametrize("signals", [1, 3])
def test_a_notice_of_the_end_lets_the_run_save(world: World, signals: int) -> None:
    (world.work / "wait").touch()
    process = world.start()
    _wait_for(world.work / "driving")
    for _ in range(signals):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.1)
    output, _ = process.communicate(timeout=40)
    assert (process.returncode, output) == (75, "interrupted, and put into the queue again\n")
    log = world.log()
    assert log.index("driver saved") < log.index("scontrol requeue 77") < log.index("ray ended")
    assert world.left(process) == []


def _wait_for(file: Path) -> None:
    until_s = time.monotonic() + STARTED_S
    while not file.exists():
        assert time.monotonic() < until_s, f"{file.name} did not come"
        time.sleep(0.02)


def test_a_head_that_does_not_start_ends_the_job(world: World) -> None:
    (world.work / "no-head").touch()
    code, output = world.run()
    assert code == 3
    assert "Ray did not start on node-a (10.1.2.3:6379)" in output
    assert not [line for line in world.log() if line.startswith("driver")]


def test_the_run_begins_once_the_nodes_were_waited_for(world: World) -> None:
    assert world.run()[0] == 0
    kinds = [line.split()[0] for line in world.log()]
    assert kinds.index("nodes") < kinds.index("driver")
    assert "nodes 10.1.2.3:6379 -m cluster.nodes --wait-for 2 --within 180" in world.log()


def test_a_node_that_goes_on_draining_keeps_the_job_no_longer_than_it_may(world: World) -> None:
    (world.work / "drains").touch()
    script = world.work / "job.sh"
    text = script.read_text(encoding="utf-8")
    assert "\nstop_s=20\n" in text
    script.write_text(text.replace("stop_s=20", "stop_s=1"), encoding="utf-8")
    process = world.start()
    process.communicate(timeout=40)
    assert process.returncode == 0
    assert world.log().count("ray ended") == 2


@pytest.mark.parametrize(
    ("known", "own", "address"),
    [
        ("127.0.0.1 STREAM\n10.9.9.9 STREAM\n", "", "10.9.9.9"),
        ("127.0.1.1 STREAM node-a\n", "fd00::5 10.7.7.7 172.17.0.1 \n", "10.7.7.7"),
        ("", "10.7.7.7 \n", "10.7.7.7"),
    ],
)
def test_the_head_has_the_address_that_others_know(world: World, known: str, own: str, address: str) -> None:
    (world.work / "known-on-node-b").write_text(known, encoding="utf-8")
    (world.work / "addresses").write_text(own, encoding="utf-8")
    assert world.run()[0] == 0
    (head,) = (line for line in world.log() if "--head" in line and line.startswith("ray"))
    assert f"--node-ip-address={address} " in head


def test_a_head_without_an_address_is_refused(world: World) -> None:
    (world.work / "known-on-node-b").write_text("", encoding="utf-8")
    (world.work / "addresses").write_text("fd00::5 \n", encoding="utf-8")
    code, output = world.run()
    assert code == 2
    assert "node-a has no IPv4 address" in output
    assert not [line for line in world.log() if line.startswith("ray")]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda work: (work / "token").chmod(0o604), "others may use it: chmod 600"),
        (lambda work: (work / "token").unlink(), "is no file: the Ray token has to be there"),
        (lambda work: (work / "venv/bin/dlm").unlink(), "venv/bin/dlm is no command: slurm.environment"),
    ],
)
def test_what_is_missing_on_the_node_ends_the_job_before_ray_starts(world: World, break_it: Any, message: str) -> None:
    break_it(world.work)
    code, output = world.run()
    assert code == 2
    assert message in output
    assert not (world.work / "log").exists()
