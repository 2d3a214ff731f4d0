"""The image: its commands, its build argument, and what it is made of.  Nothing here builds it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.manifests.__main__ import DOCKERFILE

SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def _instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line]


def test_shellcheck_finds_nothing_in_the_image() -> None:
    runs = [body for name, body in _instructions() if name == "RUN"]
    assert len(runs) == 5
    for body in runs:
        command = [SHELLCHECK, "--shell=sh", "--exclude=SC2154", "-"]  # build arguments are variables
        checked = subprocess.run(command, input=body, capture_output=True, text=True, timeout=30)
        assert (checked.returncode, checked.stdout) == (0, ""), body


@pytest.mark.parametrize(("accelerator", "index"), [("cuda", "cu130"), ("cpu", "cpu"), ("rocm", None), ("", None)])
def test_the_accelerator_of_the_image_is_a_build_argument(accelerator: str, index: str | None, tmp_path: Path) -> None:
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    pip.chmod(0o755)
    assert ("ARG", "ACCELERATOR=cuda") in _instructions()
    (body,) = [body for name, body in _instructions() if name == "RUN" and "$ACCELERATOR" in body]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ACCELERATOR": accelerator}
    done = subprocess.run(["sh", "-c", body], env=env, capture_output=True, text=True, timeout=30)
    if index is None:
        assert done.returncode == 2
        assert f"ACCELERATOR is '{accelerator}': cuda or cpu is needed" in done.stderr
    else:
        (torch,) = re.findall(r"^torch==.*$", Path("constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
        assert done.stdout == f"install --index-url https://download.pytorch.org/whl/{index} {torch}\n"


def test_the_image_has_what_the_package_is_made_of_and_no_more() -> None:
    copied = [part for name, body in _instructions() if name == "COPY" for part in body.split()[:-1]]
    assert all(Path(name).exists() for name in copied)
    packages = re.findall(r'"(\w+)\*"', Path("pyproject.toml").read_text(encoding="utf-8"))
    assert {"dlm_core", "pipeline", "workflows", "cluster"} == set(packages) <= set(copied)
    assert {"constraints.txt", "pyproject.toml"} <= set(copied)


def test_the_image_runs_as_nobody_special_and_asks_for_a_token() -> None:
    instructions = _instructions()
    users = [body for name, body in instructions if name == "USER"]
    assert users == ["1000:1000"]
    after = instructions[instructions.index(("USER", users[0])) :]
    assert not [body for name, body in after if name == "RUN" and "install" in body]
    settings = " ".join(body for name, body in instructions if name == "ENV")
    assert "RAY_AUTH_MODE=token" in settings
    assert not re.search(r"(TOKEN|KEY|SECRET|PASSWORD)=", settings)


def test_the_image_has_what_ray_up_calls_in_its_containers() -> None:
    from ray.autoscaler._private import command_runner

    called = Path(command_runner.__file__).read_text(encoding="utf-8")
    assert "rsync -e" in called, "over docker exec: on the other side is the rsync of the container"
    runs = " ".join(body for name, body in _instructions() if name == "RUN")
    (packages,) = re.findall(r"apt-get install -y --no-install-recommends ([^&]*)&&", runs)
    assert {"rsync", "openssh-client"} <= set(packages.split())
    (installed,) = re.findall(r"pip install -c constraints.txt (.*?)$", runs.partition("useradd")[0], re.MULTILINE)
    assert "boto3" in installed.split()
