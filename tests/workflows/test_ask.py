"""Tasks of a recipe, and of a checkpoint without one: asked for by settings, run through the command line."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.adaptation_checkpoint import make_checkpoint
from pipeline.errors import UserError
from tests.cluster.test_jobs import Dashboard, dashboard
from tests.support.executors import RAY_LIMIT_S
from tests.support.questions import choices, texts, write
from tests.support.tiny_run import write_text
from tests.workflows.conftest import Dlm
from workflows import runs
from workflows.recipes.ask import ask
from workflows.step import Workflow
from workflows.store import Store

__all__ = ["dashboard"]

ON_RAY = (pytest.mark.ray, pytest.mark.timeout(RAY_LIMIT_S))


def test_tasks_that_are_given_are_added_to_a_recipe_and_nothing_else_changes(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl", seed=0, num_docs=3)
    file = write(tmp_path / "q.jsonl", choices())
    settings = [("corpus.source", str(text))]
    before = {step.name: step for step in runs.plan_recipe("mdlm_tiny", settings).steps}
    asked = ("tasks.tasks.which", {"kind": "multiple_choice", "file": str(file)})
    plan = runs.plan_recipe("mdlm_tiny", [*settings, asked])
    after = {step.name: step for step in plan.steps}
    assert after.keys() - before.keys() == {"tasks"}
    assert [name for name, step in before.items() if step.fingerprint != after[name].fingerprint] == ["report"]
    assert after["tasks"].inputs == {"weights": "convert", "tokenizer": "tokenizer"}
    assert after["report"].inputs == {**before["report"].inputs, "tasks": "tasks"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=ON_RAY)])
def test_a_checkpoint_is_asked_by_one_command(executor: str, dlm: Dlm, store: Store, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "given")
    tasks = {
        "which": {"kind": "multiple_choice", "file": str(write(tmp_path / "which.jsonl", choices()))},
        "how": {"kind": "text", "file": str(write(tmp_path / "how.jsonl", texts()))},
        "free": {"kind": "samples", "num_samples": 3, "length": 8},
    }
    settings = {
        "import_checkpoint.path": tmp_path / "given",
        "import_checkpoint.proof": "tensors",
        "import_scorer.path": tmp_path / "given",
        "import_scorer.proof": "tensors",
        "tasks.track": "false",
        "tasks.tasks": json.dumps(tasks),
    }
    words = [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
    done = dlm("run", "ask", "--executor", executor, "--run-id", "r1", *words)
    assert done.code == 0, done.stderr
    found = json.loads((runs.committed_outputs(store, store.run("r1"))["tasks"].path / "results.json").read_text())
    assert {name: table["n"] for name, table in found["tasks"].items()} == {"which": 14, "how": 9, "free": 3}
    acc = found["tasks"]["which"]["metrics"]["acc"]
    shown = done.stdout.splitlines()[-1].removeprefix("all figures of tasks").strip()
    assert json.loads(Path(shown).read_text()) == found
    assert f"acc {acc['value']:.4f} ({acc['interval'][0]:.4f} to {acc['interval'][1]:.4f}) share, 14 q" in done.stdout
    assert found["tasks"]["free"]["metrics"]["gen_nll"]["value"] > 0
    page = Path(dlm("report", "r1").stdout.strip().splitlines()[-1]).read_text(encoding="utf-8")
    assert "<h3>which</h3>" in page


def test_a_checkpoint_without_questions_and_questions_without_one_are_refused(dlm: Dlm, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "given")
    done = dlm("run", "ask", "--set", f"import_checkpoint.path={tmp_path / 'given'}")
    assert (done.code, done.stdout) == (2, "")
    assert "tasks.tasks is empty; give tasks, as in --set tasks.tasks.NAME=" in done.stderr
    file = write(tmp_path / "q.jsonl", texts())
    done = dlm("run", "ask", "--set", f'tasks.tasks.how={{"kind": "text", "file": "{file}"}}')
    assert done.code == 2
    assert "import_checkpoint.path is empty" in done.stderr


NO_SCORER = r"left out: import_scorer\.path is empty: .*--set import_scorer\.path="


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        (
            "quickstart",
            [("tasks.num_shards", 4)],
            r"^tasks\.num_shards is 4, but .*: tasks\.tasks is empty; give tasks,",
        ),
        ("quickstart", [("tasks.track", False)], r"^tasks\.track is False, but the step tasks is left out"),
        ("ask", [("scorer_tokenizer.vocab_size", 500)], rf"^scorer_tokenizer\.vocab_size is 500, but .*{NO_SCORER}"),
        ("ask", [("import_scorer.proof", "tensors")], rf"^import_scorer\.proof is 'tensors', but .*{NO_SCORER}"),
    ],
)
def test_settings_of_a_step_that_nobody_asked_for_are_refused(
    recipe: str, settings: list[tuple[str, Any]], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        runs.plan_recipe(recipe, settings)


def test_settings_of_a_step_that_nobody_asked_for_may_say_what_the_recipe_says() -> None:
    assert runs.plan_recipe("quickstart", [("tasks.track", True)]) == runs.plan_recipe("quickstart", [])


def scored() -> Workflow:
    """A recipe of one's own, whose optional step is given what the other leaves to its user."""
    own = ask()
    steps = (
        replace(s, config=replace(s.config, path="/scorer")) if s.name == "import_scorer" else s for s in own.steps
    )
    return replace(own, steps=tuple(steps))


SCORED = f"{__name__}:{scored.__name__}"
WITHOUT_SCORER = ("import_scorer.path", "")


def test_a_setting_may_leave_out_a_step_that_the_recipe_gives_what_it_needs() -> None:
    assert runs.plan_recipe(SCORED, [WITHOUT_SCORER]).steps == runs.plan_recipe("ask", []).steps


def test_a_setting_of_a_step_that_another_setting_leaves_out_is_refused() -> None:
    asked = ("scorer_tokenizer.vocab_size", 500)
    assert runs.configured(SCORED, [asked]).steps
    with pytest.raises(UserError, match=rf"^scorer_tokenizer\.vocab_size is 500, but .*{NO_SCORER}"):
        runs.configured(SCORED, [WITHOUT_SCORER, asked])
    with pytest.raises(UserError, match=rf"^import_scorer\.proof is 'tensors', but .*{NO_SCORER}"):
        runs.configured(SCORED, [WITHOUT_SCORER, ("import_scorer.proof", "tensors")])


def test_tasks_that_a_resume_would_add_are_told_to_need_a_run_of_their_own(dlm: Dlm, store: Store) -> None:
    runs.create_run(store, runs.plan_recipe("quickstart", []), "local", "r1")
    asked = 'tasks.tasks.which={"kind": "text", "file": "how.jsonl"}'
    done = dlm("resume", "r1", "--set", asked)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == (
        "error: tasks.tasks.which cannot be set in this run, which was made without the step tasks. Start a new run "
        "with it, which makes again only what changes: dlm run quickstart --executor local --set "
        f"{shlex.quote(asked)} --store {store.root.path}\n"
    )
    assert "unknown setting taks.tasks.which" in dlm("resume", "r1", "--set", asked.replace("tasks", "taks", 1)).stderr


PROBLEM = dict.fromkeys(("task_id", "prompt", "canonical_solution", "test"), "") | {"entry_point": "f"}


def test_permission_to_run_programs_without_namespaces_is_an_option_of_run_and_resume(
    dlm: Dlm, store: Store, tmp_path: Path
) -> None:
    text = write_text(tmp_path / "text.jsonl", seed=0, num_docs=20)
    words = [
        "--executor",
        "local",
        "--only",
        "corpus",
        "--set",
        f"corpus.source={text}",
        "--set",
        "corpus.held_out_fraction=0.5",
    ]
    file = write(tmp_path / "q.jsonl", [PROBLEM])
    words += ["--set", f'tasks.tasks.programs={{"kind": "code", "file": "{file}"}}']

    def permitted(run_id: str) -> bool:
        return runs.frozen_plan(store.run(run_id)).step("tasks").config["allow_unsandboxed"]

    for run_id, option in (("r1", []), ("r2", ["--allow-unsandboxed"])):
        done = dlm("run", "mdlm_tiny", "--run-id", run_id, *words, *option)
        assert done.code == 0, done.stderr
        assert permitted(run_id) == bool(option)
    done = dlm("resume", "r1", "--only", "corpus", "--allow-unsandboxed")
    assert done.code == 0, done.stderr
    assert permitted("r1")
    assert runs.command_of(store.run("r2")).endswith("--set tasks.allow_unsandboxed=true")


def test_permission_to_run_programs_without_namespaces_goes_with_a_job(
    dashboard: Dashboard, dlm: Dlm, store: Store, tmp_path: Path
) -> None:
    text = write_text(tmp_path / "text.jsonl", seed=0, num_docs=20)
    file = write(tmp_path / "q.jsonl", [PROBLEM])
    words = ["mdlm_tiny", "--set", f"corpus.source={text}"]
    words += ["--set", f'tasks.tasks.programs={{"kind": "code", "file": "{file}"}}']
    for run_id, option in (("r1", []), ("r2", ["--allow-unsandboxed"])):
        done = dlm("submit", *words, "--run-id", run_id, "--address", dashboard.url, *option)
        assert done.code == 0, done.stderr
        assert f"workflows.supervise {run_id}" in dashboard.asked["entrypoint"]
        run = store.run(run_id)
        assert runs.frozen_plan(run).step("tasks").config["allow_unsandboxed"] == bool(option)
        assert ("tasks.allow_unsandboxed=true" in run.plan()["settings"]) == bool(option)


def test_permission_to_run_programs_where_none_are_run_is_refused(dlm: Dlm, store: Store) -> None:
    done = dlm("run", "toy", "--executor", "local", "--allow-unsandboxed")
    assert (done.code, done.stdout) == (2, "")
    assert "--allow-unsandboxed: no step runs programs that a model wrote; leave it out" in done.stderr
    assert store.runs() == []
