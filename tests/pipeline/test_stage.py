import contextlib
import dataclasses
import json
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import MANIFEST, open_artifact, write_json
from pipeline.config import from_json, identity
from pipeline.corpus.config import STAGE as CORPUS
from pipeline.corpus.config import CorpusConfig
from pipeline.errors import UserError
from pipeline.pretrain.config import STAGE as PRETRAIN
from pipeline.stage import (
    Stage,
    StageContext,
    build_manifest,
    check_external,
    environment,
    external_identity,
    list_shards,
    run_here,
    scratch,
    shard_fingerprint,
    stage_fingerprint,
)
from pipeline.tokenizer.config import STAGE as TOKENIZER
from tests.pipeline.conftest import flip_bit, python, write_jsonl
from tests.support.toy_stages.copies.config import STAGE as COPIES
from tests.support.toy_stages.letters.config import STAGE as LETTERS
from tests.support.toy_stages.letters.config import LettersConfig
from tests.support.toy_stages.trouble import ToyConfig, executions
from tests.support.toy_workflow import wait_until

TEXTS = [f"document {i}" for i in range(50)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of the corpus stage on disk, with its source."""
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"source": str(source), "held_out_fraction": 0.3}))
    return path


def _run_corpus(config: Path, out: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    return python("-m", "pipeline.corpus", "--config", str(config), "--out", str(out), *more)


def _refused(process: "subprocess.CompletedProcess[str]") -> str:
    """What a user is told about a mistake; never a traceback."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    return process.stderr


def test_a_stage_by_itself_commits_and_a_second_call_finds_it_complete(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "corpus"
    first = _run_corpus(config, out)
    assert first.returncode == 0, first.stderr
    manifest = open_artifact(out)
    assert (manifest.stage, manifest.code_version) == ("corpus", CORPUS.code_version)
    assert manifest.stats["train_docs"] + manifest.stats["held_out_docs"] == len(TEXTS)
    assert from_json(CorpusConfig, manifest.config).held_out_fraction == 0.3
    assert manifest.environment == environment()
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    second = _run_corpus(config, out)
    assert second.returncode == 0, second.stderr
    assert "already complete" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps


def test_a_fingerprint_here_is_that_of_the_process(config: Path, tmp_path: Path) -> None:
    assert _run_corpus(config, tmp_path / "corpus").returncode == 0
    value = from_json(CorpusConfig, json.loads(config.read_text()))
    own = stage_fingerprint(CORPUS, value, {}, external_identity(CORPUS, value))
    assert open_artifact(tmp_path / "corpus").fingerprint == own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"surce": "a"}', "unknown setting corpus.surce; did you mean source?"),
        ('{"held_out_fraction": "much"}', "corpus.held_out_fraction is 'much'"),
        ('{"held_out_fraction": 2}', "held_out_fraction is 2"),
        ('{"source": "a", "source": "b"}', "'source' stands twice"),
        ('{"source": "/absent/file"}', "there is no file or folder '/absent/file'"),
        ("{", "--config"),
        ("[]", "corpus is []"),
        (b"\xff", "--config"),
        (None, "--config"),
    ],
)
def test_a_wrong_config_is_exit_2_and_names_the_mistake(
    tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / "c.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in _refused(_run_corpus(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_missing_or_unknown_or_no_artifact_is_refused(config: Path, tmp_path: Path) -> None:
    assert "takes no --input" in _refused(_run_corpus(config, tmp_path / "out", "--input", "x=y"))
    out = str(tmp_path / "t")
    wanted = "--input corpus=DIR --input tokenizer=DIR; found none"
    assert wanted in _refused(python("-m", "pipeline.tokenization", "--out", out))
    assert "neither the input corpus" in _refused(python("-m", "pipeline.tokenizer", "--out", out))
    command = ("-m", "pipeline.tokenizer", "--out", out, "--input", f"corpus={tmp_path}")
    assert "is not a finished artifact" in _refused(python(*command))


def test_a_corpus_without_a_source_is_refused_before_it_is_begun(config: Path, tmp_path: Path) -> None:
    config.write_text(json.dumps({"source": {}}))
    assert "corpus.source is empty" in _refused(_run_corpus(config, tmp_path / "out"))
    assert not (tmp_path / "out.state").exists()


def test_an_out_directory_of_another_artifact_is_refused_and_left_alone(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    assert _run_corpus(config, out).returncode == 0
    before = open_artifact(out)
    config.write_text(json.dumps({**json.loads(config.read_text()), "split_seed": 1}))
    assert "holds another artifact" in _refused(_run_corpus(config, out))
    assert open_artifact(out) == before


def test_an_out_directory_with_something_else_in_it_is_refused_and_left_alone(config: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for out in (home, tmp_path / "file", home / ".." / "home"):
        assert "holds something else" in _refused(_run_corpus(config, out))
    assert (home / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "a file"


def test_an_out_directory_that_somebody_else_fills_after_the_artifact_was_deleted_is_left_alone(
    config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "corpus"
    assert _run_corpus(config, out).returncode == 0
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "holds something else" in _refused(_run_corpus(config, out))
    assert (out / "thesis.txt").read_text() == "years of work"


def test_an_out_directory_that_somebody_else_fills_meanwhile_is_left_alone(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    fill = f"import pathlib; p = pathlib.Path({str(out)!r}); p.mkdir(); (p / 'thesis.txt').write_text('years of work')"
    process = python("-c", _MEANWHILE, fill, "--config", str(config), "--out", str(out))
    assert process.returncode == 3
    assert "not empty" in process.stderr
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_state_on_another_file_system_is_refused_before_the_work(config: Path, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert Path(other).stat().st_dev != tmp_path.stat().st_dev
        (tmp_path / "corpus.state").symlink_to(other)
        assert "must lie on one file system" in _refused(_run_corpus(config, tmp_path / "corpus"))
        assert not any(Path(other).iterdir())


def test_an_empty_out_directory_is_used(config: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert _run_corpus(config, tmp_path / "out").returncode == 0
    open_artifact(tmp_path / "out")


def test_an_artifact_whose_files_are_damaged_is_not_called_complete(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    assert _run_corpus(config, out).returncode == 0
    (out / "train-text-00000.arrow").unlink()
    assert "train-text-00000.arrow is missing" in _refused(_run_corpus(config, out))


_MEANWHILE = """
import sys, time
import pipeline.corpus.run as work
from pipeline.corpus.config import STAGE
from pipeline.stage import main
action = sys.argv.pop(1)
work._check_not_empty = lambda *_: exec(action)
main(STAGE)
"""
"""Runs the corpus stage; once all shards are written, the statements in the first argument."""


def test_a_source_that_changes_while_it_is_read_is_refused(config: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    options = ("--config", str(config), "--out", str(tmp_path / "corpus"))
    grow = f"open({str(source)!r}, 'a').write('{{}}')"
    assert "have changed" in _refused(python("-c", _MEANWHILE, grow, *options))
    assert not (tmp_path / "corpus" / MANIFEST).exists()


def test_check_external_compares_with_what_was_planned(config: Path) -> None:
    value = from_json(CorpusConfig, json.loads(config.read_text()))
    planned = external_identity(CORPUS, value)
    check_external(CORPUS, value, planned)
    flip_bit(Path(value.source["text"].paths[0]), 12)
    with pytest.raises(UserError, match="corpus reads have changed"):
        check_external(CORPUS, value, planned)


def test_what_a_killed_attempt_left_is_not_trusted(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    options = ("--config", str(config), "--out", str(out))
    assert _run_corpus(config, tmp_path / "clean").returncode == 0
    child = subprocess.Popen(
        [sys.executable, "-c", _MEANWHILE, "print('written', flush=True); time.sleep(60)", *options],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert any("written" in line for line in child.stdout)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    left = tmp_path / "corpus.state" / "attempt"
    assert not out.exists()
    assert not (left / MANIFEST).exists()
    flip_bit(left / "train-text-00000.arrow", 300)
    (left / "train-text-00007.arrow").write_bytes(b"stray")
    assert _run_corpus(config, out).returncode == 0
    assert open_artifact(out).files == open_artifact(tmp_path / "clean").files


def test_a_failure_of_our_own_is_exit_3_with_a_traceback(config: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.state").write_text("a file where a directory must be")
    process = _run_corpus(config, tmp_path / "corpus")
    assert process.returncode == 3
    assert "Traceback" in process.stderr
    assert not (tmp_path / "corpus" / MANIFEST).exists()


def test_stage_fingerprint_follows_everything_that_decides_the_result() -> None:
    stage = Stage(name="a", kind="task", config=CorpusConfig, module="m")
    config = CorpusConfig()
    variants = [
        stage_fingerprint(stage, config, {"x": "1", "y": "2"}, {"sha256": "3"}),
        stage_fingerprint(Stage("b", "task", CorpusConfig, "m"), config, {"x": "1", "y": "2"}, {"sha256": "3"}),
        stage_fingerprint(
            Stage("a", "task", CorpusConfig, "m", code_version=2), config, {"x": "1", "y": "2"}, {"sha256": "3"}
        ),
        stage_fingerprint(stage, CorpusConfig(split_seed=1), {"x": "1", "y": "2"}, {"sha256": "3"}),
        stage_fingerprint(stage, config, {"x": "2", "y": "1"}, {"sha256": "3"}),
        stage_fingerprint(stage, config, {"x": "1"}, {"sha256": "3"}),
        stage_fingerprint(stage, config, {"x": "1", "y": "2"}, {"sha256": "4"}),
        stage_fingerprint(stage, config, {"x": "1", "y": "2"}),
    ]
    assert len(set(variants)) == len(variants)
    assert stage_fingerprint(stage, config, {"y": "2", "x": "1"}, {"sha256": "3"}) == variants[0]


@pytest.mark.parametrize("stage", [CORPUS, TOKENIZER, PRETRAIN], ids=lambda stage: stage.name)
def test_a_declaration_is_light_to_import_and_its_config_has_defaults(stage: Stage) -> None:
    assert identity(stage.config()) != {}
    folder = stage.module.rsplit(".", 1)[0]
    program = f"import {folder}.config, sys; print([m for m in ('torch', 'ray', 'deepspeed') if m in sys.modules])"
    assert python("-c", program).stdout.strip() == "[]"


def test_run_here_reports_the_shards_of_a_map_stage(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    from pipeline.tokenization.config import STAGE, TokenizationConfig

    seen: list[Any] = []
    (tmp_path / "out").mkdir()
    context = StageContext(
        tmp_path / "out", tmp_path / "state", "f", progress=lambda done, total: seen.append((done, total))
    )
    run_here(STAGE, TokenizationConfig(), {"corpus": corpus, "tokenizer": tokenizer}, context)
    total = len(list((tmp_path / "out").glob("*.arrow")))
    assert seen == [(i + 1, total) for i in range(total)]


# --- the shards of a stage alone ------------------------------------------------------------------------------------


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """An input with the letters a, b and c, a file each."""
    out = tmp_path / "letters"
    out.mkdir()
    run_here(LETTERS, LettersConfig(), {}, StageContext(out, tmp_path / "letters.state", "f"))
    write_json(out / MANIFEST, build_manifest(LETTERS, LettersConfig(), "f", {}, out, None, 0.0, 0.0))
    return out


def _copy(tmp_path: Path, letters: Path, own: str = "f", **settings: Any) -> tuple[str, Any]:
    """Run the toy map by itself; what it made, and its stats."""
    log, out = tmp_path / "log", tmp_path / "out"
    log.mkdir(exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    config = ToyConfig(log=str(log), **settings)
    stats = run_here(COPIES, config, {"letters": letters}, StageContext(out, tmp_path / "state", own))
    return (out / "text.txt").read_text(), stats


EACH = dict.fromkeys(["copies-list", "copies-000", "copies-001", "copies-002", "copies-finish"], 1)
AGAIN = {**EACH, "copies-list": 2, "copies-finish": 2}


def test_run_here_gives_finish_what_the_shards_returned(tmp_path: Path, letters: Path) -> None:
    assert _copy(tmp_path, letters) == ("aabbcc", {"codes": sum(map(ord, "abc"))})
    for place, letter in enumerate("abc"):
        manifest = open_artifact(tmp_path / "state" / "shards" / f"{place:03d}")
        assert (manifest.stage, manifest.fingerprint) == ("toy-copies", "f")
        assert manifest.stats == {"code": ord(letter)}
        assert (manifest.shard["name"], manifest.shard["file"]) == (f"{place:03d}", f"{place:03d}.txt")
        assert [file.path for file in manifest.files] == ["in/copy.txt"]


def test_run_here_after_a_failure_runs_only_the_shards_that_are_missing(tmp_path: Path, letters: Path) -> None:
    with pytest.raises(RuntimeError, match="copies-001 has a defect"):
        _copy(tmp_path, letters, trouble="code", where="copies-001")
    assert executions(tmp_path / "log") == {"copies-list": 1, "copies-000": 1, "copies-001": 1}
    assert _copy(tmp_path, letters)[0] == "aabbcc"
    assert executions(tmp_path / "log") == {**EACH, "copies-list": 2, "copies-001": 2}


_DAMAGE = {
    "a flipped bit": lambda shard: flip_bit(shard / "in" / "copy.txt", 0),
    "a missing file": lambda shard: (shard / "in" / "copy.txt").unlink(),
    "no manifest": lambda shard: (shard / MANIFEST).unlink(),
    "half a manifest": lambda shard: (shard / MANIFEST).write_text("{"),
    "another fingerprint": lambda shard: _edit(shard / MANIFEST, fingerprint="g"),
    "another shard": lambda shard: _edit(shard / MANIFEST, shard={"name": "001", "file": "000.txt"}),
    "an older manifest": lambda shard: _edit(shard / MANIFEST, shard={}),
}


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("damage", list(_DAMAGE))
def test_run_here_runs_a_shard_again_whose_directory_has(tmp_path: Path, letters: Path, damage: str) -> None:
    _copy(tmp_path, letters)
    _DAMAGE[damage](tmp_path / "state" / "shards" / "001")
    assert _copy(tmp_path, letters)[0] == "aabbcc"
    assert executions(tmp_path / "log") == {**AGAIN, "copies-001": 2}


def test_run_here_of_another_fingerprint_runs_every_shard_again(tmp_path: Path, letters: Path) -> None:
    _copy(tmp_path, letters)
    _copy(tmp_path, letters, own="g")
    assert executions(tmp_path / "log") == dict.fromkeys(EACH, 2)


_ALONE = "from pipeline.stage import main; from tests.support.toy_stages.copies.config import STAGE; main(STAGE)"


def test_a_map_stage_killed_in_a_shard_runs_only_what_is_missing(tmp_path: Path, letters: Path) -> None:
    log, config = tmp_path / "log", tmp_path / "c.json"
    log.mkdir()
    config.write_text(json.dumps({"log": str(log), "trouble": "kill", "where": "copies-001"}))
    command = ("-c", _ALONE, "--config", str(config), "--out", str(tmp_path / "out"), "--input", f"letters={letters}")
    assert python(*command).returncode == -signal.SIGKILL
    second = python(*command)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "out" / "text.txt").read_text() == "aabbcc"
    assert executions(log) == {**EACH, "copies-list": 2, "copies-001": 2}


def test_a_second_call_for_the_same_directory_is_refused_while_the_first_is_at_work(
    tmp_path: Path, letters: Path
) -> None:
    log, config, out = tmp_path / "log", tmp_path / "c.json", tmp_path / "out"
    log.mkdir()
    config.write_text(json.dumps({"log": str(log), "trouble": "slow", "where": "copies-001"}))
    command = ("-c", _ALONE, "--config", str(config), "--out", str(out), "--input", f"letters={letters}")
    first = subprocess.Popen([sys.executable, *command], cwd=Path(__file__).parents[2])
    try:
        wait_until(lambda: (log / "copies-001").exists(), "the first call is at work")
        (witness := tmp_path / "out.state" / "attempt" / "witness").write_text("")
        assert f"is being made by process {first.pid} on {platform.node()}" in _refused(python(*command))
        assert witness.exists()
    finally:
        first.kill()
        first.wait()
    again = python(*command)
    assert again.returncode == 0, again.stderr
    assert (out / "text.txt").read_text() == "aabbcc"
    assert not (out / "witness").exists()


def test_run_here_keeps_a_shard_that_differs_in_other_values_than_its_identity(tmp_path: Path, letters: Path) -> None:
    _copy(tmp_path, letters)
    manifest = tmp_path / "state" / "shards" / "001" / MANIFEST
    _edit(manifest, shard={**json.loads(manifest.read_text())["shard"], "file": "elsewhere.txt"})
    assert _copy(tmp_path, letters)[0] == "aabbcc"
    assert executions(tmp_path / "log") == AGAIN


@pytest.mark.parametrize("names", [["a", "a"], ["a/b"], ["../a"], [""], [".."], [".hidden"]])
def test_shards_whose_names_are_not_unique_or_no_directories_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    monkeypatch.setattr("tests.support.toy_stages.copies.run.list_shards", lambda *_: [{"name": n} for n in names])
    with pytest.raises(AssertionError, match="toy-copies"):
        list_shards(COPIES, ToyConfig(), {}, StageContext(tmp_path, tmp_path, "f"))


def test_shard_fingerprint_follows_what_decides_its_files_and_not_its_name() -> None:
    config, shard = ToyConfig(), {"name": "a", "identity": {"sha256": "1"}}
    own = shard_fingerprint(COPIES, config, shard)
    assert shard_fingerprint(COPIES, ToyConfig(log="elsewhere"), {**shard, "name": "b", "file": "c"}) == own
    others = [
        shard_fingerprint(COPIES, config, {**shard, "identity": {"sha256": "2"}}),
        shard_fingerprint(COPIES, ToyConfig(number=2), shard),
        shard_fingerprint(dataclasses.replace(COPIES, code_version=2), config, shard),
        shard_fingerprint(dataclasses.replace(COPIES, name="copies"), config, shard),
    ]
    assert len({own, *others}) == 5


def test_what_a_killed_attempt_left_goes_before_the_next_and_nothing_stays(tmp_path: Path) -> None:
    context = StageContext(tmp_path / "out", tmp_path, "f")
    killed = tmp_path / "scratch" / "model"
    killed.mkdir(parents=True)
    (killed / "weights").write_bytes(bytes(1000))
    with scratch(context) as beside:
        assert list((tmp_path / "scratch").iterdir()) == [beside]
        assert list(beside.iterdir()) == []
        first = beside
    with scratch(context) as beside:
        assert beside != first  # where a process of the attempt before may still write
    with contextlib.suppress(OSError), scratch(context):
        raise OSError("the disk is full")
    assert list(tmp_path.iterdir()) == []
