import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlm_core.models.presets import PRESETS
from tests.support.toy_stages.trouble import executions
from tests.support.toy_workflow import fabricate, toy_plan, toy_workflow
from tests.workflows.conftest import Dlm, Done
from workflows import cli, runs
from workflows.commands.common import store_option
from workflows.lease import acquire_lease, find_holder
from workflows.store import Store, open_writable_store

ROOT = Path(__file__).parents[2]


def run_toy(dlm: Dlm, log: Path, *settings: str) -> Done:
    """``dlm run toy`` as run r1 in subprocesses."""
    sets = [f"{step.name}.log={log}" for step in toy_workflow().steps]
    words = [word for setting in (*sets, *settings) for word in ("--set", setting)]
    return dlm("run", "toy", "--executor", "local", "--run-id", "r1", *words)


def assert_refused(done: Done, *words: str, code: int = 2) -> None:
    assert done.code == code, done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


# --- what the user did wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "quickstar"], ["quickstar", "did you mean quickstart? One of your own is given as module:function"]),
        (["run", "nothing"], ["nothing", "quickstart"]),
        (["plan", "toy", "--set", "sauce.number=2"], ["sauce.number", "source"]),
        (["plan", "toy", "--set", "source.nummer=2"], ["source.nummer", "did you mean number"]),
        (["plan", "toy", "--set", "source.number=two"], ["source.number", "two", "integer"]),
        (["plan", "toy", "--set", "source.number=-1"], ["source", "number is -1"]),
        (["run", "toy", "--set", "source.trouble=some"], ["source.trouble", "some"]),
        (["plan", "toy", "--set", "source.number"], ["source.number", "PATH=VALUE"]),
        (["plan", "toy", "--set", "source=3"], ["source.FIELD=VALUE"]),
        (["run", "toy", "--executor", "slurm"], ["slurm", "ray or local"]),
        (["run", "toy", "--run-id", "../x"], ["../x", "run id"]),
        (["resume", "r9"], ["r9", "none in this store"]),
        (["resume", "../../etc"], ["run id"]),
        (["status", "r9"], ["r9", "none in this store"]),
        (["status"], ["no run", "dlm run"]),
        (["report"], ["no run", "dlm run"]),
        (["frobnicate"], ["frobnicate"]),
        (["plan"], ["recipe"]),
        (["plan", "toy", "--set", 'source={"number": 2'], ["--set source", "no JSON", "column"]),
        (["plan", "toy", "--set", "double.numbr=2"], ["double.numbr", "did you mean number"]),
        (["plan", "quickstart", "--set", "pretrain.batch_seqs=2"], ["micro_batch_seqs or global_batch_seqs"]),
        (["plan", "quickstart", "--set", "pretrain.seq_len=2"], ["there is packing.seq_len"]),
        (["plan", "quickstart", "--set", "trainer.vocab_size=2"], ["there is tokenizer.vocab_size"]),
        (["run", "toy", "--from", "totl"], ["--from totl", "did you mean total?", "source, double, aside, total"]),
        (["run", "toy", "--from", "total"], ["--from total", "not there yet: source, double, aside"]),
        (["run", "toy", "--only", "double", "--until", "total"], ["--only", "--until"]),
        (["run", "toy", "--only", "double"], ["--only double", "source"]),
        (["run", "toy", "--until", "source", "--from", "total"], ["source does not come after total"]),
        (["plan", "nowhere.recipes:small"], ["nowhere", "no module"]),
        (["plan", "tests.support.toy_workflow:smal"], ["smal", "no function"]),
        (["plan", "tests.support.toy_workflow:toy_plan"], ["must return", "Workflow"]),
        (["plan", "tests.support.bad_workflows:circle"], ["cycle", "source"]),
        (["plan", "tests.support.bad_workflows:stageless"], ["tests.support.toy_stages.nothing", "no module"]),
        (["plan", "tests.support.bad_workflows:sourceless"], ["no step 'somewhere'", "double"]),
        (["plan", "tests.support.bad_workflows:short_of_inputs"], ["takes inputs", "value"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].islower() and len(value[0]) < 9 else "",
)
def test_cli_refuses_with_code_2_and_a_message(dlm, store, arguments, words):
    assert_refused(dlm(*arguments), *words)
    assert not (store.root.path / "runs").exists()


def test_cli_with_a_file_for_a_store_is_refused(dlm, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    assert_refused(dlm("list", "--store", str(path)), "--store", str(path))
    assert_refused(dlm("list", "--store", str(path / "below")), "--store", str(path / "below"))


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_cli_with_an_unwritable_store_is_refused(dlm, tmp_path):
    tmp_path.chmod(0o500)
    assert_refused(dlm("run", "toy", "--store", str(tmp_path)), "cannot be written")


def test_cli_run_id_of_another_run_is_refused_naming_what_differs(dlm, store):
    runs.create_run(store, toy_plan(), "local", "r1")
    other = ["--set", "double.number=4", "--set", "total.workers=3"]
    done = dlm("run", "toy", "--run-id", "r1", *other)
    assert_refused(done, "dlm resume r1", "executor: 'local' there, 'ray' now", "double.config.number: 1 there, 4 now")
    assert "total.config.workers: 2 there, 3 now" in done.stderr
    assert [run.run_id for run in store.runs()] == ["r1"]


def test_cli_the_same_command_with_the_same_run_id_goes_on_with_the_run(dlm, store, log):
    for _ in range(2):
        assert run_toy(dlm, log).code == 0
    assert set(executions(log).values()) == {1}
    assert json.loads(dlm("status", "--json").stdout)["attempts"] == 2


def test_cli_resume_of_a_run_at_work_ends_with_code_5(dlm, store):
    run = runs.create_run(store, toy_plan(), "local", "r1")
    acquire_lease(run.lease_dir, "run r1")
    assert_refused(dlm("resume", "r1"), f"process {os.getpid()}", code=5)


# --- looking without touching ---------------------------------------------------------------------------------------


def test_cli_models_lists_every_preset_with_its_counts(dlm):
    shown = dlm("models").stdout
    rows = {row["name"]: row for row in json.loads(dlm("models", "--json").stdout)}
    assert rows.keys() == PRESETS.keys()
    assert all(name in shown for name in PRESETS)
    sparse = rows["llada-moe-7b-a1b"]
    assert (sparse["num_params"], sparse["num_active_params"]) == (7_356_880_896, 1_397_823_488)
    assert (sparse["num_experts"], sparse["top_k"], sparse["mask_token_id"]) == (64, 8, 156_895)
    head = 2 * sparse["vocab_size"] * sparse["d_model"]  # training computes half of it
    assert sparse["training_flops_per_token"] == 3 * (sparse["inference_flops_per_token"] - head // 2)
    blocks = rows["llada2-mini"]
    assert (blocks["mask_family"], blocks["block_size"], blocks["masked_share"]) == ("block_diffusion", 32, 0.5)
    assert blocks["training_flops_per_token"] > 3 * blocks["inference_flops_per_token"]
    assert (rows["dream-7b"]["num_experts"], rows["dream-7b"]["target_offset"]) == (0, 1)
    assert "7.36 B" in shown
    assert "8 of 64" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "quickstart"],
        ["recipes"],
        ["models"],
        ["list"],
        ["status", "r1"],
        ["--help"],
        ["logs", "r1"],
        ["explain", "r1"],
        ["verify", "r1"],
        ["cost", "r1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_cli_imports_neither_torch_nor_ray_to_look(store, arguments):
    runs.create_run(store, toy_plan(), "local", "r1")
    code = (
        "import sys; from workflows.cli import main\n"
        f"sys.argv = ['dlm', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    env = {**os.environ, "DLM_STORE": str(store.root.path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr


def test_cli_plan_of_quickstart_with_more_steps_names_what_would_run(dlm, store, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be")
    fabricate(store, runs.plan_recipe("quickstart", [("corpus.source", str(text))]))
    settings = ["--set", f"corpus.source={text}", "--set", "pretrain.num_steps=123"]
    done = dlm("plan", "quickstart", *settings, "--json")
    actions = {action["step"]: action["action"] for action in json.loads(done.stdout)}
    assert [step for step, action in actions.items() if action == "run"] == [
        "pretrain", "convert", "evaluate", "generate", "report",
    ]  # fmt: skip
    table = dlm("plan", "quickstart", *settings).stdout
    assert "-> 123" in table
    assert "input will be rebuilt: weights (convert)" in table


def test_cli_plan_changes_nothing_in_the_store(dlm, store):
    fabricate(store, toy_plan(), "source")
    before = sorted(store.root.path.rglob("*"))
    assert dlm("plan", "toy").code == 0
    assert sorted(store.root.path.rglob("*")) == before


def test_cli_where_there_is_no_store_says_so_and_makes_none(dlm, store):
    whole = (["list"], ["list", "--json"], ["verify", "--all"], ["gc"], ["gc", "--dry-run"])
    for arguments in whole:
        done = dlm(*arguments)
        assert_refused(done, f"there is no store at {store.root.path}; name one with --store")
        assert done.stdout == ""
    assert_refused(dlm("resume", "r1"), "there is no run 'r1'")
    assert not store.root.path.exists()


def test_cli_of_an_empty_store_lists_nothing(dlm, store):
    store.mark()
    assert json.loads(dlm("list", "--json").stdout) == []
    assert dlm("list").code == 0


def test_cli_recipes_are_listed_with_their_steps(dlm):
    found = {recipe["name"]: recipe["steps"] for recipe in json.loads(dlm("recipes", "--json").stdout)}
    assert found["toy"] == ["source", "double", "aside", "total"]
    assert "quickstart" in found
    assert "quickstart" in dlm("recipes").stdout


# --- runs -----------------------------------------------------------------------------------------------------------


def test_cli_run_then_status_list_and_a_second_run(dlm, store, log):
    done = run_toy(dlm, log)
    assert done.code == 0, done.stderr
    status = json.loads(dlm("status", "--json").stdout)
    assert (status["run_id"], status["status"], status["attempts"]) == ("r1", "succeeded", 1)
    assert {step["step"]: step["status"] for step in status["steps"]} == dict.fromkeys(
        ["source", "double", "aside", "total"], "committed"
    )
    (listed,) = json.loads(dlm("list", "--json").stdout)
    assert listed == status
    assert "succeeded" in dlm("status", "r1").stdout
    assert "r1" in dlm("list").stdout
    before = executions(log)
    again = dlm("resume", "r1")
    assert again.code == 0
    assert executions(log) == before


def test_cli_run_with_a_failing_stage_ends_with_code_3_and_can_be_resumed(dlm, store, log):
    done = run_toy(dlm, log, "source.trouble=user")
    assert done.code == 3
    assert "source failed: source does not like its settings" in done.stderr
    assert "dlm resume r1" in done.stderr
    assert "Traceback" not in done.stderr
    status = json.loads(dlm("status", "r1", "--json").stdout)
    assert status["status"] == "failed"
    assert status["steps"][0]["detail"] == "source does not like its settings"
    assert dlm("resume", "r1").code == 0
    assert executions(log)["source"] == 2


def test_cli_run_with_a_defective_stage_shows_where_it_broke(dlm, store, log):
    done = run_toy(dlm, log, "source.trouble=code")
    assert done.code == 3
    assert "RuntimeError: source has a defect" in done.stderr
    assert str(store.root.path / "runs" / "r1" / "work") in done.stderr


def test_cli_resume_after_the_outside_data_changed_ends_with_code_4(dlm, store, log, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("before")
    runs.create_run(store, toy_plan(log, source__path=str(path)), "local", "r1")
    path.write_text("afterwards")
    assert_refused(dlm("resume", "r1"), "source", "external.bytes was 6, is now 10", "dlm run toy", code=4)
    assert executions(log) == {}


def test_cli_names_the_command_for_a_new_run_with_what_the_old_one_was_given(dlm, store, log, tmp_path):
    path = tmp_path / "a file"
    path.write_text("before")
    logs = [word for step in toy_workflow().steps for word in ("--set", f"{step.name}.log={log}")]
    given = ["--set", f"source.path={path}", "--set", "total.trouble=user", *logs, "--executor", "local"]
    failed = dlm("run", "toy", "--run-id", "r1", *given)
    assert failed.code == 3
    again = f"dlm run toy --executor local --set 'source.path={path}' --set total.trouble=user {' '.join(logs)}"
    assert f"with the same data and settings: dlm resume r1 --store {store.root.path}" in failed.stderr
    assert f"with other data or settings:     {again} --store {store.root.path} [--set PATH=VALUE]" in failed.stderr
    path.write_text("afterwards")
    assert_refused(dlm("resume", "r1"), again, code=4)


def test_cli_on_a_damaged_artifact_ends_with_code_3_naming_what_to_delete(dlm, store):
    plan = toy_plan()
    fabricate(store, plan)
    place = store.artifact("toy-source", plan.step("source").fingerprint)
    committed = place.committed()
    assert committed is not None
    (committed.path / "value.txt").unlink()
    assert_refused(dlm("plan", "toy"), f"delete {place.directory.path}", code=3)


def test_cli_plan_settings_lists_every_setting_as_it_would_be_set(dlm):
    lines = dlm("plan", "quickstart", "--settings", "--set", "pretrain.num_steps=7").stdout.splitlines()
    assert "pretrain.num_steps=7" in lines
    assert 'corpus.source.text.paths=["stdlib"]' in lines


def test_cli_plan_settings_are_printed_even_where_they_do_not_fit_and_then_the_error(dlm):
    done = dlm("plan", "quickstart", "--settings", "--set", "pretrain.workers=3", "--set", "pretrain.num_steps=0")
    assert done.code == 2
    lines = done.stdout.splitlines()
    assert {"pretrain.workers=3", "pretrain.num_steps=0", "packing.seq_len=128"} <= set(lines)
    assert "num_steps is 0" in done.stderr
    done = dlm("plan", "quickstart", "--settings", "--set", "corpus.source=/nowhere")
    assert (done.code, "corpus.source" in done.stdout, "/nowhere" in done.stderr) == (2, True, True)


def test_cli_plan_diff_prints_every_field_with_both_values(dlm, store):
    fabricate(store, toy_plan())
    lines = dlm("plan", "toy", "--diff", "--set", "double.number=5").stdout.splitlines()
    assert lines[0].startswith("source: cached")
    place = next(n for n, line in enumerate(lines) if line.startswith("double: run, changed since run test: number"))
    assert lines[place + 1] == "  config.number: 1 -> 5"
    (action,) = [
        a for a in json.loads(dlm("plan", "toy", "--set", "double.number=5", "--json").stdout) if a["changes"]
    ][:1]
    assert action["changes"] == {"config.number": [1, 5]}
    assert_refused(dlm("plan", "toy", "--diff", "--settings"), "--diff", "--settings")


def test_cli_plan_diff_compares_with_the_newest_of_those_that_are_alike(dlm, store, tmp_path):
    data = tmp_path / "data"
    setting = ("--set", f"source.path={data}")
    for size, started_at in ((10, 1.0), (20, 3.0), (30, 2.0)):
        data.write_text("x" * size)
        fabricate(store, toy_plan(source__path=str(data)), "source", started_at=started_at)
    data.write_text("x" * 40)
    lines = dlm("plan", "toy", "--diff", *setting).stdout.splitlines()
    assert lines[1] == "  external.bytes: 20 -> 40"


def test_cli_plan_warns_of_what_is_hardly_ever_meant(dlm):
    few = dlm("plan", "quickstart", "--set", "pretrain.num_steps=50")
    assert few.code == 0
    assert "pretrain.optimizer.lr_schedule.warmup_steps is 50, and num_steps 50: the learning rate" in few.stderr
    assert dlm("plan", "quickstart", "--set", "pretrain.num_steps=51").stderr == ""
    closed = dlm("plan", "quickstart", "--set", "pretrain.adaptation.anneal_steps=2001")
    assert "pretrain.adaptation.anneal_steps is 2001, and num_steps 2000: attention never opens fully" in closed.stderr
    assert dlm("plan", "quickstart", "--set", "pretrain.adaptation.anneal_steps=2000").stderr == ""


def test_cli_run_on_this_machine_tells_of_more_workers_than_cores(dlm, log, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    crowded = run_toy(dlm, log, "total.workers=4")
    assert crowded.code == 0
    assert "warning: total.workers is 4, and this machine has 1 core: they take turns" in crowded.stderr
    assert "--set total.workers=2" in crowded.stderr
    assert "warning" not in dlm("resume", "r1", "--set", "total.workers=2").stderr


# --- stores that cannot be used ---------------------------------------------------------------------------------------


def test_cli_with_a_read_only_store_is_refused_even_for_root(dlm, store, monkeypatch):
    store.root.path.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert_refused(dlm("run", "toy"), "cannot be written; choose another directory")


def test_cli_with_a_full_store_ends_with_code_3_saying_so(dlm, store, monkeypatch):
    dlm("run", "toy", "--until", "nothing")  # marks the store

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pipeline.storage.create_file", full)
    assert_refused(dlm("run", "toy"), "no space is left in the store", code=3)
    assert store.runs() == []


@pytest.mark.parametrize(("schema", "word"), [(99, "use a newer dlm"), (0, "the version of dlm that made it")])
def test_cli_with_a_store_of_another_schema_is_refused_saying_which_dlm_reads_it(dlm, store, schema, word):
    store.mark()
    (store.root.path / "store.json").write_text(json.dumps({"schema_version": schema, "id": "x"}))
    for arguments in (["run", "toy"], ["list"], ["plan", "toy"]):
        assert_refused(dlm(*arguments), f"schema version {schema}", word)


@pytest.mark.parametrize(
    "run_id", ["", "../x", "a/b", "/etc", "..", ".x", "-x", "a b", "a\nb", "a\\b", "x" * 129, "ü", "~x"]
)
def test_cli_run_ids_with_path_characters_are_refused_by_every_command_that_takes_one(dlm, store, run_id):
    commands = [["run", "toy", f"--run-id={run_id}"], ["plan", "toy", f"--freeze={run_id}"], ["resume", "--", run_id]]
    if run_id:  # the newest one, where it may be left out
        commands.append(["status", "--", run_id])
    for arguments in commands:
        assert_refused(dlm(*arguments), "is no run id")
    submitted = dlm("submit", "toy", f"--run-id={run_id}", "--address", "http://127.0.0.1:1")
    assert_refused(submitted, "is no run id")
    assert not (store.root.path / "runs").exists()


def test_plan_is_frozen_as_a_run_that_nothing_works_on_until_it_is_resumed(dlm: Dlm, store: Store) -> None:
    done = dlm("plan", "toy", "--set", "source.number=5", "--freeze", "first")
    assert (done.code, "nothing works on it yet" in done.stderr) == (0, True)
    run = store.run("first")
    assert runs.frozen_plan(run).step("source").config["number"] == 5
    assert (list(run.events()), find_holder(run.lease_dir)) == ([], None)
    same = dlm("plan", "toy", "--set", "source.number=5", "--freeze", "first")
    assert same.code == 0
    assert same.stderr.startswith("run first was written down before, with this plan: dlm status first")
    other = dlm("plan", "toy", "--freeze", "first")
    assert other.code == 2
    assert "there is a run 'first' already, and it is another one" in other.stderr
    how = dlm("plan", "toy", "--set", "source.number=5", "--set", "total.workers=1", "--freeze", "first")
    assert how.code == 2
    assert "there is a run 'first' already, and it works with other settings of how it runs" in how.stderr
    assert dlm("plan", "toy", "--freeze", "second", "--settings").code == 2
    assert [made.run_id for made in store.runs()] == ["first"]


def test_package_of_the_current_directory_does_not_take_the_place_of_an_installed_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "typer.py").write_text("raise SystemExit('not this one')")
    (tmp_path / "mine.py").write_text("from tests.support.toy_workflow import toy_workflow as toy")
    env = os.environ | {"PYTHONPATH": str(ROOT), "DLM_STORE": store.url}
    command = [sys.executable, "-m", "workflows.cli", "plan", "mine:toy"]

    def plan(**more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command, cwd=tmp_path, env=env | more, capture_output=True, text=True, timeout=50)

    assert plan().stderr == "not this one\n", "so does Python"
    planned = plan(PYTHONSAFEPATH="1")
    assert (planned.returncode, "never run" in planned.stdout) == (0, True), planned.stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    cli.main(lambda: None)
    assert sys.path[-1] == str(tmp_path)


def test_command_to_copy_names_the_store_unless_it_is_the_default_one_and_a_lost_working_directory_is_none(
    store, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert store_option(open_writable_store("dlm-store")) == ""
    assert store_option(store) == f" --store {store.url}"
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert store_option(store) == f" --store {store.url}"
    monkeypatch.chdir(tmp_path)  # what is restored is asked for its name
