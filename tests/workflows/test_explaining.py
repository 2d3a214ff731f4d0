"""``dlm explain``, what a shell completes, and names that are mistyped."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.fabricated import fabricate_run
from tests.support.toy_workflow import amended, fabricate, toy_plan
from tests.workflows.conftest import Dlm
from workflows import runs
from workflows.amendments import Wishes

ROOT = Path(__file__).parents[2]


def rows_of(dlm: Dlm, *arguments: str) -> dict[str, Any]:
    done = dlm("explain", *arguments, "--json")
    assert done.code == 0, done.stderr
    return {row["step"]: row for row in json.loads(done.stdout)}


def test_every_changed_field_is_shown_against_the_nearest_artifact(dlm, store):
    fabricate(store, toy_plan(source__number=9), "source")
    fabricate(store, toy_plan())
    rows = rows_of(dlm, "toy", "--set", "double.number=5")
    assert (rows["source"]["action"], rows["source"]["from_run"]) == ("cached", "test")
    assert rows["double"]["nearest"]["changes"] == {"config.number": {"from": 1, "to": 5}}
    assert rows["double"]["nearest"]["run_id"] == "test"
    old, new = (toy_plan(**more).step("double").fingerprint for more in ({}, {"double__number": 5}))
    assert rows["total"]["nearest"]["changes"] == {"inputs.value": {"from": old, "to": new}}
    shown = dlm("explain", "toy", "--set", "double.number=5").stdout
    assert "    number: 1 -> 5\n" in shown
    assert f"    input value (step double): {old[:12]} -> {new[:12]}\n" in shown


def test_one_step_of_a_run_is_explained_from_its_frozen_plan(dlm, store):
    fabricate(store, toy_plan())
    fabricate_run(store, toy_plan(total__number=3))
    rows = rows_of(dlm, "r1", "total")
    assert list(rows) == ["total"]
    assert rows["total"]["nearest"]["changes"] == {"config.number": {"from": 1, "to": 3}}
    assert str(store.root.path / "artifacts" / "toy-total") in dlm("explain", "r1", "total").stdout


def test_step_that_was_accepted_as_it_was_shows_what_differs(dlm, store, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("before")
    plan = toy_plan(source__path=str(data))
    run = runs.create_run(store, plan, "local", "r1")
    fabricate(store, plan, "source", "aside")
    assert "accepted as it was" not in dlm("explain", "r1").stdout
    data.write_text("short")
    amended(store, run, Wishes(accept=("source",)))
    rows = rows_of(dlm, "r1")
    assert rows["source"]["action"] == "cached"
    assert {name: row["accepted"] for name, row in rows.items()} == {
        "source": {"external.bytes": {"from": 6, "to": 5}}, "aside": {}, "double": {}, "total": {},
    }  # fmt: skip
    shown = dlm("explain", "r1").stdout
    assert "gone" not in shown
    assert shown.count("accepted as it was") == 1
    assert "\n  accepted as it was, although outside data bytes differs: 6 -> 5\n" in shown
    store.artifact("toy-source", plan.step("source").fingerprint).directory.remove()
    gone = dlm("explain", "r1", "source").stdout
    assert "\n  accepted as it was, although outside data bytes differs: 6 -> 5\n" in gone
    assert "\n  and is gone since: the run goes on only with --rebuild source\n" in gone


def test_step_of_a_run_that_would_come_out_otherwise_now_says_that_a_resume_refuses_it(dlm, store, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("before")
    settings = ["--set", f"source.path={data}"]
    plan = toy_plan(source__path=str(data))
    fabricate_run(store, plan)
    fabricate(store, plan, "source", "aside")
    assert {row["drifted"] for row in rows_of(dlm, "r1").values()} == {None}
    data.write_text("short")
    rows = rows_of(dlm, "r1")
    assert (rows["source"]["action"], rows["source"]["drifted"]["changes"]) == (
        "cached", {"external.bytes": {"from": 6, "to": 5}},
    )  # fmt: skip
    assert [name for name, row in rows.items() if row["drifted"]] == ["source"]
    assert rows_of(dlm, "toy", *settings)["source"]["drifted"] is None  # what is planned now is of now
    told = "\n  drifted   it would come out otherwise now\n    outside data bytes: 6 -> 5\n"
    assert (
        f"{told}    dlm resume refuses that without --accept-drift or --rebuild source\n" in dlm("explain", "r1").stdout
    )
    store.artifact("toy-source", plan.step("source").fingerprint).directory.remove()
    assert f"{told}    dlm resume refuses that without --rebuild source\n" in dlm("explain", "r1").stdout


def test_step_of_a_run_whose_settings_this_code_does_not_take_says_that_it_cannot_go_on(dlm, store):
    plan = toy_plan()
    steps = [dataclasses.replace(s, config=s.config | {"gone": 1}) if s.name == "total" else s for s in plan.steps]
    fabricate_run(store, dataclasses.replace(plan, steps=steps))
    refused = dlm("explain", "r1")
    assert refused.code == 4
    assert "unknown setting total.gone" in refused.stderr
    assert "This code cannot go on with the run; start a new one: dlm run toy" in refused.stderr


def test_outside_file_that_changed_is_named(dlm, store, tmp_path):
    texts = {name: tmp_path / name for name in ("text/old.txt", "text/new.txt", "web/touched.txt")}
    for path in texts.values():
        path.parent.mkdir(exist_ok=True)
        path.write_text("to be or not to be")
        os.utime(path, (time.time() - 1000, time.time() - 1000))
    settings = [("corpus.source", {"text": str(tmp_path / "text" / "*.txt"), "web": str(tmp_path / "web")})]
    plan = runs.plan_recipe("quickstart", settings)
    fabricate(store, plan, "corpus")
    manifest = next(store.root.path.glob("artifacts/corpus/*/attempts/*/manifest.json"))
    value = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**value, "started_at": time.time() - 500}))
    texts["text/new.txt"].write_text("that is the question")
    texts["web/touched.txt"].touch()
    done = dlm("explain", "quickstart", "corpus", "--set", f"corpus.source={json.dumps(settings[0][1])}")
    assert "outside data text.sha256: " in done.stdout
    assert "web.sha256" not in done.stdout
    assert f"written since then: {texts['text/new.txt']} (" in done.stdout
    assert done.stdout.count("written since then") == 1


def test_changed_file_of_a_corpus_is_named_with_its_size_and_hash_then_and_now(dlm, store, tmp_path):
    texts = {name: tmp_path / "text" / f"{name}.txt" for name in ("longer", "other", "gone", "new")}
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"same-{number}.txt").write_text(f"the same {number}")
    for name in ("longer", "other", "gone"):
        texts[name].write_text(f"{name}, that is the question")
    source = ["--set", f"corpus.source={tmp_path / 'text'}", "--set", "corpus.held_out_fraction=0.5"]
    done = dlm("run", "quickstart", "--executor", "local", "--only", "corpus", *source)
    assert done.code == 0, done.stderr
    then = {name: path.read_bytes() for name, path in texts.items() if path.exists()}
    touched = texts["other"].stat()
    texts["longer"].write_text("longer, that was the question")
    texts["other"].write_text("other, that is the questiom")
    os.utime(texts["other"], ns=(touched.st_atime_ns, touched.st_mtime_ns))
    texts["gone"].unlink()
    texts["new"].write_text("question")
    done = dlm("explain", "quickstart", "corpus", *source)
    sha256 = {
        name: " -> ".join(
            hashlib.sha256(content).hexdigest()[:12] for content in (then[name], texts[name].read_bytes())
        )
        for name in ("longer", "other")
    }
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("    file ")]
    (name,) = {line.split(":")[0].removeprefix("file ") for line in lines}
    assert lines == [
        f"file {name}: gone.txt: gone, it had 26 bytes",
        f"file {name}: longer.txt: 28 -> 29 bytes, sha256 {sha256['longer']}",
        f"file {name}: new.txt: new, 8 bytes",
        f"file {name}: other.txt: 27 bytes as before, sha256 {sha256['other']}",
    ]
    assert "written since then" not in done.stdout
    (row,) = rows_of(dlm, "quickstart", "corpus", *source).values()
    assert [file["size_bytes"] for file in row["nearest"]["files"]] == [[26, None], [28, 29], [None, 8], [27, 27]]
    damaged = next(store.root.path.glob("artifacts/corpus/*/shards/*.json"))
    damaged.write_text("{")
    done = dlm("explain", "quickstart", "corpus", *source)
    assert done.code == 0, done.stderr
    assert ": new, " not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "toi"], ["no recipe or run 'toi'", "did you mean toy?"]),
        (["explain", "toy", "sourse"], ["no step 'sourse'", "did you mean source?"]),
        (["explain", "run-on"], ["did you mean run-one?"]),
        (["explain", "run-one", "--set", "source.number=3"], ["frozen", "recipe"]),
        (["plan", "quickstrt"], ["did you mean quickstart?"]),
        (["statsu"], ["No such command 'statsu'", "Did you mean 'status'?"]),
        (["verfy"], ["Did you mean 'verify'?"]),
    ],
)
def test_mistyped_name_gets_a_suggestion(dlm, store, arguments, words):
    fabricate_run(store, toy_plan(), run_id="run-one")
    done = dlm(*arguments)
    assert (done.code, done.stdout) == (2, "")
    assert all(word in done.stderr for word in words), done.stderr


def installed_dlm(*arguments: str, **env: str) -> str:
    """What ``dlm`` prints when it is called by that name."""
    code = f"import sys; sys.argv = ['dlm', *{arguments!r}]; from workflows.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=50)
    assert done.stderr == ""
    return done.stdout


def completions(line: str, store: str) -> list[str]:
    """What bash offers after a line, of which the last word is being typed."""
    place = str(len(line.split(" ")) - 1)
    return installed_dlm(_DLM_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=place, DLM_STORE=store).split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dlm sta", ["status"]),
        ("dlm status ", ["r2", "r1"]),
        ("dlm logs r1", ["r1"]),
        ("dlm resume r", ["r2", "r1"]),
        ("dlm plan quick", ["quickstart"]),
        ("dlm run bd3lm_", ["bd3lm_tiny", "bd3lm_owt"]),
        ("dlm explain r2 to", ["total"]),
        ("dlm logs r1 --step so", ["source"]),
        ("dlm status --store /nowhere/at/all ", []),
    ],
)
def test_shell_completes_commands_runs_recipes_and_steps(store, line, expected):
    for number in (1, 2):
        fabricate_run(store, toy_plan(), run_id=f"r{number}")
        os.utime(store.root.path / "runs" / f"r{number}" / "run.json", (number, number))
    assert completions(line, store.url) == expected


def test_shell_completion_of_a_store_that_cannot_be_read_is_empty(store):
    store.mark()
    (store.root.path / "store.json").write_text("{")
    assert completions("dlm status ", store.url) == []


def test_shell_gets_the_script_that_asks():
    shown = installed_dlm("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_DLM_COMPLETE=complete_bash" in shown
    assert "-F _dlm_completion dlm" in shown
