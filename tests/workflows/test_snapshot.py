import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.support.toy_stages.trouble import ToyConfig
from tests.support.toy_workflow import STAGES, toy_plan
from workflows import runs, snapshot
from workflows.plan import make_plan
from workflows.step import Step, Workflow
from workflows.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a user's own on the path."""
    folder = tmp_path / "on_path" / "someones"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("__init__.py", "data.txt", "__pycache__/x.pyc", ".git/config"):
        (folder / name).write_text(name)
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def frozen(store: Store) -> dict:
    return json.loads((store.run("r1").directory / "run.json").read_bytes())


def names(data: bytes) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(data)).namelist()


# --- code -----------------------------------------------------------------------------------------------------------


def test_snapshot_holds_what_was_written_and_nothing_that_was_made(package):
    assert names(snapshot.code_zip(("someones",))) == ["someones/__init__.py", "someones/data.txt"]


def test_snapshot_has_the_same_bytes_whenever_it_is_taken_and_other_bytes_for_other_code(package):
    first = snapshot.code_zip(("someones",))
    os.utime(package / "data.txt", (1, 1))
    (package / "data.txt").chmod(0o600)
    snapshot.code_zip.cache_clear()
    assert snapshot.code_zip(("someones",)) == first
    (package / "data.txt").write_text("changed")
    snapshot.code_zip.cache_clear()
    assert snapshot.code_zip(("someones",)) != first


def test_snapshot_of_packages_with_data_in_them_is_refused(package, monkeypatch):
    monkeypatch.setattr(snapshot, "_AT_MOST_BYTES", 10)
    with pytest.raises(UserError, match=r"someones hold .* more than 10"):
        snapshot.code_zip.__wrapped__(("someones",))


def test_run_names_its_code_which_the_store_holds_once(store):
    for run_id in ("r1", "r2"):
        runs.create_run(store, toy_plan(), "local", run_id)
    code = frozen(store)["code"]
    (file,) = (store.root.path / "code").iterdir()
    assert file.name == f"{code['sha256']}.zip"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == code["sha256"]
    assert code["packages"] == ["cluster", "dlm_core", "pipeline", "tests", "workflows"]
    found = names(file.read_bytes())
    assert {"workflows/plan.py", "dlm_core/schedules.py", "tests/support/toy_workflow.py"} <= set(found)
    assert not [name for name in found if name.endswith(".pyc")]


def test_run_of_a_recipe_by_import_path_names_its_package_and_the_command_for_another(store):
    recipe = "tests.support.toy_workflow:toy_workflow"
    plan = runs.plan_recipe(recipe, [])
    run = runs.create_run(store, plan, "local", "r1")
    assert "tests" in frozen(store)["code"]["packages"]
    assert runs.command_of(run) == f"dlm run {recipe} --executor local"
    ours = replace(runs.plan_recipe("ar_tiny", []), recipe="tests.support.x:y")
    assert snapshot.packages_of(ours) == (
        "cluster", "dlm_core", "pipeline", "tests", "workflows",
    )  # fmt: skip


def test_code_that_changed_under_a_run_is_a_warning(store, monkeypatch):
    run = runs.create_run(store, toy_plan(), "local", "r1")
    assert runs.code_change(run) == ""
    monkeypatch.setattr(snapshot, "code_digest", lambda packages: "0" * 64)
    warning = runs.code_change(run)
    assert "the code has changed since run r1" in warning
    assert frozen(store)["code"]["sha256"][:12] in warning


def test_code_that_cannot_be_found_any_more_is_a_warning_too(store):
    run = runs.create_run(store, replace(toy_plan(), recipe="tests.support.toy_workflow:toy_workflow"), "local", "r1")
    value = frozen(store)
    value["code"]["packages"].append("nowhere_to_be_found")
    (run.directory / "run.json").write(json.dumps(value).encode())
    assert "package nowhere_to_be_found is not there any more" in runs.code_change(run)


# --- git, command, user -----------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def state_of(checkout: Path) -> dict | None:
    """What a copy of the module says in a checkout of its own."""
    code = "import json; from workflows import snapshot; print(json.dumps(snapshot.git_state()))"
    env = {**os.environ, "PYTHONPATH": f"{checkout}:{ROOT}"}
    return json.loads(
        subprocess.run([sys.executable, "-c", code], cwd=checkout, env=env, capture_output=True, check=True).stdout
    )


def test_git_state_tells_commit_branch_and_changes_and_is_absent_outside_a_checkout(tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for package in ("workflows", "cluster", "pipeline"):
        subprocess.run(["cp", "-r", str(ROOT / package), str(checkout / package)], check=True)
    assert state_of(checkout) is None
    git(checkout, "init", "-q", "-b", "trunk")
    assert state_of(checkout) is None  # somebody's checkout, which this code is no part of
    (checkout / ".gitignore").write_text("__pycache__\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "all")
    commit = git(checkout, "rev-parse", "HEAD")
    assert state_of(checkout) == {"commit": commit, "branch": "trunk", "is_dirty": False, "diff_sha256": ""}
    (checkout / "workflows" / "plan.py").write_bytes((ROOT / "workflows" / "plan.py").read_bytes() + b"\n# changed\n")
    dirty = state_of(checkout)
    assert dirty is not None
    changes = subprocess.run(["git", "-C", str(checkout), "diff", "--binary", "HEAD"], capture_output=True, check=True)
    expected = hashlib.sha256(changes.stdout).hexdigest()
    assert (dirty["is_dirty"], dirty["diff_sha256"], dirty["commit"]) == (True, expected, commit)


def test_git_state_is_absent_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert snapshot.git_state.__wrapped__() is None


def test_run_says_who_gave_which_command_without_secrets(store, monkeypatch):
    monkeypatch.setenv("SOMETHING_TOKEN", "abcdefgh1234")
    command = ["dlm", "run", "toy", "--store", "s3://key:pass@bucket/x", "--run-id", "abcdefgh1234"]
    runs.create_run(store, toy_plan(), "local", "r1", command=command)
    value = frozen(store)
    assert value["command"] == ["dlm", "run", "toy", "--store", "s3://***@bucket/x", "--run-id", "***"]
    assert "abcdefgh1234" not in json.dumps(value)
    assert value["user"].partition("@")[2] == os.uname().nodename
    assert value["dlm"]
    assert value["plan"]["environment"]["python"]


@pytest.mark.parametrize("text", ["sk-abcdefgh1234", "https://me:pass@example.org/data"])
def test_run_with_a_secret_in_a_setting_is_refused_naming_it_and_not_the_secret(store, monkeypatch, text):
    monkeypatch.setenv("WANDB_API_KEY", "sk-abcdefgh1234")
    steps = (Step("source", f"{STAGES}.source", ToyConfig(log=f"x {text} y")),)
    with pytest.raises(UserError, match=r"source\.log holds a secret") as error:
        runs.create_run(store, make_plan(Workflow("w", "", steps), {}), "local", "r1")
    assert text not in str(error.value)
    assert not (store.root.path / "runs").exists()


def test_setting_that_is_named_like_a_secret_is_refused(store):
    plan = toy_plan()
    plan.steps[0].config["api_key"] = "12345"
    with pytest.raises(UserError, match=r"source\.api_key holds a secret"):
        snapshot.refuse_secrets(plan)
    snapshot.refuse_secrets(runs.plan_recipe("ar_tiny", []))  # tokenizer.mask_token is none
