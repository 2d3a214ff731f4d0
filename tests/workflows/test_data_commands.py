"""``dlm data`` on a store with real data: what it prints, and its exit codes."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.artifact import load_manifest
from pipeline.corpus.config import CorpusConfig, Source
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import PretrainConfig
from pipeline.stage import environment
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import TokenizerConfig
from tests.pipeline.conftest import flip_bit
from tests.support.executors import Inline
from tests.support.toy_workflow import coordinate, copies_plan
from tests.workflows.conftest import Dlm
from tests.workflows.test_data_stages import data_plan, write_sources
from workflows import runs
from workflows.data_commands import prepared_data, print_shown
from workflows.plan import make_plan
from workflows.step import Step, Workflow
from workflows.store import open_store


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A store with a run from text to rows."""
    root = tmp_path_factory.mktemp("data")
    store = open_store(root / "store")
    plan = data_plan(write_sources(root / "text"), tokenizer_file, "best_fit")
    coordinate(store, runs.create_run(store, plan, "local", "r1"), Inline)
    return store.root.path


def test_data_show_prints_counts_lengths_and_rows_without_steering_the_terminal(dlm: Dlm, finished: Path) -> None:
    done = dlm("data", "show", "--store", str(finished), "--sample", "3", "--number", "2")
    assert done.code == 0, done.stderr
    stats = load_manifest(next((finished / "artifacts" / "packing").glob("*/attempts/*/manifest.json")).parent).stats
    for source in ("books", "code"):
        own = [shard for shard in stats["shards"] if shard["source"] == source]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(source)]
        assert f"{sum(shard['tokens'] for shard in own):,}" in line
        assert f"{sum(shard['rows'] for shard in own):,}" in line
    assert "rows of 64 tokens" in done.stdout
    assert "length of documents in tokens" in done.stdout
    assert "sample 3" in done.stdout
    assert "sample 4" in done.stdout
    assert "── document 0, " in done.stdout


def test_data_show_as_json_has_all_that_is_printed(dlm: Dlm, finished: Path) -> None:
    shown = json.loads(dlm("data", "show", "--store", str(finished), "--json").stdout)
    assert [source["source"] for source in shown["sources"]] == ["books", "code"]
    assert sum(source["share"] for source in shown["sources"]) == pytest.approx(1)
    assert sum(part["tokens"] for part in shown["samples"]["0"]) == shown["seq_len"] == 64
    assert shown["lengths"]["shards"] > shown["lengths"]["shards_read"] == 16
    assert 0 < sum(shown["lengths"]["counts"]) < sum(source["docs"] for source in shown["sources"])


def test_data_verify_says_what_it_checked_and_ends_with_3_on_damage(dlm: Dlm, finished: Path, tmp_path: Path) -> None:
    done = dlm("data", "verify", "--store", str(finished))
    assert done.code == 0, done.stderr
    assert "every token of every document in exactly one" in done.stdout
    store = shutil.copytree(finished, tmp_path / "copy")
    victim = next((store / "artifacts" / "packing").glob("*/attempts/*/train-code-*[0-9].arrow"))
    flip_bit(victim, 700)
    done = dlm("data", "verify", "--store", str(store))
    assert done.code == 3
    assert victim.name in done.stderr
    assert "SHA-256" in done.stderr


def test_data_of_a_run_with_two_of_each_are_those_that_the_chosen_step_was_made_of(
    dlm: Dlm, tmp_path: Path, tokenizer_file: Path
) -> None:
    """Two chains, x and y, whose steps of different stages come in different orders."""
    folder, store = write_sources(tmp_path / "text"), open_store(tmp_path / "store")
    steps: dict[str, Step] = {}
    for name, seed in (("x", 0), ("y", 1)):
        corpus = CorpusConfig(
            source={"books": Source((str(folder / "books"),))}, held_out_fraction=0.3, split_seed=seed
        )
        made_of = {"corpus": f"corpus-{name}", "tokenizer": f"tokenizer-{name}"}
        packed = {"tokens": f"tokens-{name}", "tokenizer": f"tokenizer-{name}"}
        trained = {"rows": f"rows-{name}", "tokenizer": f"tokenizer-{name}"}
        tokenizer = TokenizerConfig(file=str(tokenizer_file))
        training = PretrainConfig(num_steps=3 + seed, global_batch_seqs=8)
        for step in (
            Step(f"corpus-{name}", "pipeline.corpus", corpus),
            Step(f"tokenizer-{name}", "pipeline.tokenizer", tokenizer, {"corpus": f"corpus-{name}"}),
            Step(f"tokens-{name}", "pipeline.tokenization", TokenizationConfig(backend="tokenizers"), made_of),
            Step(f"rows-{name}", "pipeline.packing", PackingConfig(seq_len=64), packed),
            Step(f"train-{name}", "pipeline.pretrain", training, trained),
        ):
            steps[step.name] = step
    order = [f"{stage}-{name}" for stage, names in (
        ("corpus", "xy"), ("tokenizer", "yx"), ("tokens", "xy"), ("rows", "yx"), ("train", "xy")
    ) for name in names]  # fmt: skip
    for run_id, last in (("packed", "rows"), ("trained", "train")):
        chosen = tuple(steps[name] for name in order if last == "train" or not name.startswith("train"))
        runs.create_run(store, make_plan(Workflow("two", "of each", chosen), environment()), "local", run_id)
    coordinate(store, store.run("packed"), Inline)
    for run_id, step, num_samples in (
        ("packed", "rows-x", None), ("packed", "rows-y", None), ("trained", "rows-x", None),
        ("trained", "train-x", 24), ("trained", "train-y", 32),
    ):  # fmt: skip
        data = prepared_data(store, store.run(run_id), step)
        assert load_manifest(data.corpus).config["split_seed"] == "xy".index(step[-1])
        assert load_manifest(data.tokens).inputs["corpus"] == load_manifest(data.corpus).fingerprint
        assert load_manifest(data.rows).inputs["tokens"] == load_manifest(data.tokens).fingerprint
        assert data.num_samples == num_samples
    assert dlm("data", "verify", "packed", "--store", str(store.root.path), "--step", "rows-x").code == 0
    for command in ("show", "verify"):
        done = dlm("data", command, "trained", "--store", str(store.root.path))
        assert done.code == 2
        assert "it has 2 pretrain steps; choose one with --step: train-x, train-y, rows-y, rows-x" in done.stderr
        done = dlm("data", command, "packed", "--store", str(store.root.path), "--step", "corpus-x")
        assert done.code == 2
        assert "'corpus-x' is no training or packing; choose one with --step: rows-y, rows-x" in done.stderr


def test_data_of_a_run_that_packs_nothing_is_exit_2(dlm: Dlm, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    store = open_store(tmp_path / "store")
    runs.create_run(store, copies_plan(tmp_path / "log", "abc"), "local", "r1")
    done = dlm("data", "show", "r1")
    assert done.code == 2
    assert "run r1 has no packing step" in done.stderr


@pytest.mark.parametrize("command", ["show", "verify"])
def test_data_of_a_run_without_rows_is_exit_2_with_the_missing_step(
    dlm: Dlm, finished: Path, tokenizer_file: Path, command: str
) -> None:
    store = open_store(finished)
    if not (finished / "runs" / "r0").exists():
        runs.create_run(store, data_plan(finished.parent / "text", tokenizer_file, "document"), "local", "r0")
    done = dlm("data", command, "r0", "--store", str(finished))
    assert done.code == 2
    assert "run r0 has no finished" in done.stderr


def test_data_commands_refuse_samples_that_are_no_number_of_one(dlm: Dlm, finished: Path) -> None:
    for sample in ("-1", str(2**63)):
        assert dlm("data", "show", "--store", str(finished), "--sample", sample).code == 2


def printed(text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed of one document."""
    shown = {
        "sources": [], "seq_len": 4, "vocab_size": 9, "padding_share": 0.0,
        "lengths": {"edges": [1], "counts": [], "shards_read": 1, "shards": 1},
        "samples": {0: [{"text": text, "tokens": 4}]},
    }  # fmt: skip
    print_shown(Console(width=80), shown)
    return capsys.readouterr().out


def test_control_characters_of_a_text_are_shown_as_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("a\x1b[2Jb\x07 :smile: [bold]\n\tc\x7f", capsys)
    assert "a\u241b[2Jb\u2407 :smile: [bold]" in out
    assert "c\u2421" in out
    assert "\x1b" not in out


def test_control_characters_without_a_picture_are_shown_by_number(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(
        "red \x9b31m, \x80 and \x9f, gpj.\u202eexe\u202c, \u2066isolated\u2069, \u200djoined\u200c \xa0", capsys
    )
    assert (
        "red \\u009b31m, \\u0080 and \\u009f, gpj.\\u202eexe\\u202c, \\u2066isolated\\u2069, \u200djoined\u200c \xa0"
        in out
    )
