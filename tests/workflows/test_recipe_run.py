"""A tiny recipe, shortened by settings alone, goes through the command line from text to its report."""

import json
from pathlib import Path

import pytest

from benchmarks.adaptation_checkpoint import make_checkpoint
from pipeline.config import to_json
from pipeline.pretrain.config import PretrainConfig
from pipeline.weights import load_record
from tests.support.tiny_run import metrics, write_text
from tests.workflows.conftest import Dlm
from workflows import runs
from workflows.graph import wanted_steps
from workflows.recipes import RECIPES, load_recipe
from workflows.store import Store

TINY = [name for name in RECIPES if name.endswith("_tiny")]
SETTINGS = {
    "corpus.held_out_fraction": 0.05,
    "tokenizer.vocab_size": 300,
    "packing.seq_len": 64,
    "pretrain.architecture.d_model": 32,
    "pretrain.architecture.num_layers": 2,
    "pretrain.num_steps": 42,
    "pretrain.global_batch_seqs": 4,
    "pretrain.optimizer.ema_decay": 0.9,
    "pretrain.validation.every_steps": 7,
    "pretrain.validation.num_rows": 4,
    "pretrain.track": "false",
    "convert.weights": "ema",
    "evaluate.num_shards": 1,
}
OWN = {
    "bd3lm_tiny": {"pretrain.validation.every_steps": 3},  # of the last 6 steps, on blocks: rates are searched in them
    "llada_moe_tiny": {
        "pretrain.ep_size": 2,
        "pretrain.phases.first.seq_len": 32,
        "pretrain.phases.second.seq_len": 32,
        "pretrain.phases.anneal.seq_len": 32,
    },
    "llada2_tiny": {"pretrain.ep_size": 2},
    "dream_tiny": {
        "ar_pretrain.architecture.d_model": 32,
        "ar_pretrain.architecture.num_layers": 2,
        "ar_pretrain.num_steps": 7,
        "ar_pretrain.global_batch_seqs": 4,
        "ar_pretrain.track": "false",
    },
}
SAMPLES = {"generate.num_samples": 1, "generate.sampler.num_steps": 8}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize("recipe", TINY)
def test_a_tiny_recipe_shortened_by_settings_commits_every_step_and_its_report(
    recipe: str, dlm: Dlm, store: Store, tmp_path: Path
) -> None:
    text = write_text(tmp_path / "text.jsonl", seed=0, num_docs=200)
    workflow = load_recipe(recipe)
    steps = {step.name: step.config for step in wanted_steps(workflow)}
    samples = {"generate.num_samples": 1} if recipe == "ar_tiny" else SAMPLES  # it goes from left to right
    settings = {"corpus.source": text, **SETTINGS, **OWN.get(recipe, {}), **samples}
    words = [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
    done = dlm("run", recipe, "--executor", "local", "--run-id", "r1", *words)
    assert done.code == 0, done.stderr
    status = json.loads(dlm("status", "r1", "--json").stdout)
    assert status["status"] == "succeeded"
    assert {step["step"]: step["status"] for step in status["steps"]} == dict.fromkeys(steps, "committed")
    report = Path(dlm("report", "r1").stdout.strip().splitlines()[-1])
    assert "</html>" in report.read_text(encoding="utf-8")
    trained = metrics(runs.committed_outputs(store, runs.require_run_id(store, "r1"))["pretrain"].path)
    assert len(trained) == 42
    pretrain: PretrainConfig = steps["pretrain"]
    assert list(dict.fromkeys(line["phase"] for line in trained)) == list(pretrain.phases or ["all"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_a_checkpoint_goes_from_its_import_to_samples_of_the_diffusion_model(
    dlm: Dlm, store: Store, tmp_path: Path
) -> None:
    architecture = make_checkpoint(tmp_path / "given")
    texts = {name: write_text(tmp_path / f"{name}.jsonl", seed, 60) for seed, name in enumerate(("train", "test"))}
    source = {name: {"paths": str(path), "held_out_fraction": float(name == "test")} for name, path in texts.items()}
    settings = {
        "import_checkpoint.path": tmp_path / "given",
        "corpus.source": json.dumps(source),
        "packing.seq_len": 32,
        "pretrain.architecture": json.dumps(to_json(architecture)),
        "pretrain.precision": "fp32",
        "pretrain.num_steps": 8,
        "pretrain.validation.every_steps": 4,
        "pretrain.validation.num_rows": 2,
        "pretrain.adaptation.anneal_steps": 4,
        "pretrain.track": "false",
        "evaluate.num_shards": 1,
        "generate.length": 16,
        "generate.sampler.num_steps": 8,
    }
    words = [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
    done = dlm("run", "smollm2_to_diffusion", "--executor", "local", "--run-id", "r1", *words)
    assert done.code == 0, done.stderr
    outputs = runs.committed_outputs(store, runs.require_run_id(store, "r1"))
    record = load_record(outputs["convert"].path)
    assert [origin.kind for origin in record.lineage] == ["imported", "initialised", "trained"]
    assert (record.target_offset, record.objective) == (1, "masked_nelbo")
    assert record.model.vocab_size == load_record(outputs["import_checkpoint"].path).model.vocab_size + 1
    eos, mask = 0, record.model.mask_token_id
    for line in (outputs["generate"].path / "samples.jsonl").read_text().splitlines():
        ids = json.loads(line)["ids"]
        assert (ids[0], len(ids), mask in ids) == (eos, 16, False)
