"""``dlm plan --dry-run`` and ``--deepspeed``: what is shown, what is refused, and that what is advised fits."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dlm_core.models.presets import PRESETS
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.memory import RankMemory
from pipeline.tokenizer.config import TokenizerConfig
from workflows import sizing
from workflows.recipes import RECIPES
from workflows.recipes.quickstart import quickstart
from workflows.step import Workflow

ROOT = Path(__file__).parents[2]


def large(name: str = "llada-moe-7b-a1b") -> Workflow:
    """The quickstart with a published model, its vocabulary and its rows."""
    model = PRESETS[name].model
    configs = {
        "tokenizer": TokenizerConfig(vocab_size=model.vocab_size),
        "packing": PackingConfig(seq_len=4096),
        "pretrain": PretrainConfig(
            architecture=model.architecture,
            precision="bf16",
            num_steps=1000,
            workers=64,
            global_batch_seqs=1024,
            micro_batch_seqs=1,
        ),
    }
    workflow = quickstart()
    steps = tuple(replace(step, config=configs.get(step.name, step.config)) for step in workflow.steps)
    return replace(workflow, name="large", steps=steps)


@pytest.fixture(autouse=True)
def _recipes(monkeypatch):
    monkeypatch.setitem(RECIPES, "large", large)
    monkeypatch.setitem(RECIPES, "llada", lambda: large("llada-8b"))


def test_dry_run_of_a_large_model_shows_memory_operations_and_hours(dlm):
    done = dlm("plan", "large", "--dry-run")
    assert done.code == 0, done.stderr
    for words in ("7.36 B parameters", "1.4 B active", "of 64 workers", "at its peak", "GPU-hours", "MFU of 0.35"):
        assert words in done.stdout
    assert dlm("plan", "large", "--dry-run", "--gpu", "b200", "--mfu", "0.5").stdout.count("B200") == 2


def test_dry_run_on_a_gpu_of_another_size_tells_what_fits_and_no_hours_without_its_peak(dlm):
    done = dlm("plan", "large", "--dry-run", "--gpu", "48gb", "--set", "pretrain.zero_stage=2")
    assert done.code == 0, done.stderr
    assert re.search(r"^of 48 GB GPU +48\.00 GB *$", done.stdout, re.MULTILINE)
    assert "not told: the peak of a 48 GB GPU is not known; set pretrain.peak_tflops_per_worker" in done.stdout
    words = ["--set", "pretrain.peak_tflops_per_worker=181", "--set", "pretrain.zero_stage=2"]
    (found,) = json.loads(dlm("plan", "large", "--dry-run", "--json", "--gpu", "48 GB", *words).stdout)
    assert found["gpu"] == {"name": "48 GB GPU", "peak_flops": 0.0, "memory_bytes": 48 * 10**9}
    assert found["gpu_hours"] == pytest.approx(found["flops"] / (0.35 * 181e12) / 3600)
    small = dlm("plan", "large", "--dry-run", "--gpu", "12.5GB")
    assert small.code == 5
    assert "12.5 GB GPU has 12.50 GB" in small.stderr


def test_dry_run_says_what_each_component_is_and_what_the_host_holds(dlm):
    words = ["plan", "large", "--dry-run", "--set", "pretrain.offload_optimizer=true"]
    shown = " ".join(dlm(*words).stdout.split())
    (found,) = json.loads(dlm(*words, "--json").stdout)
    memory = found["memory"]
    for name, value in (memory["components"] | memory["host_components"]).items():
        row = f"{name.replace('_', ' ')} {value / 1e9:,.2f} GB {sizing.LEGEND[name]}"
        assert (row in shown) == (value > 0), row
    assert f"at its peak, on its host {memory['host_bytes'] / 1e9:,.2f} GB" in shown
    assert memory["host_components"]["host_optimizer"] > 0


def test_legend_has_every_component_and_no_other():
    fields = {field.name for field in dataclasses.fields(RankMemory)}
    assert sizing.LEGEND.keys() == fields - {"checkpoint_bytes"}


def test_dry_run_in_float32_tells_no_hours_and_what_to_set(dlm):
    words = ["large", "--dry-run", "--set", "pretrain.precision=fp32", "--set", "pretrain.zero_stage=3"]
    done = dlm("plan", *words)
    assert done.code == 0, done.stderr
    assert re.search(r"GPU-hours +not told: .* set that to bf16, or pretrain.peak_tflops_per_worker", done.stdout)
    assert " days on " not in done.stdout
    (found,) = json.loads(dlm("plan", *words, "--json").stdout)
    assert (found["gpu_hours"], found["hours"]) == (None, None)
    told = dlm("plan", *words, "--set", "pretrain.peak_tflops_per_worker=60")
    assert "MFU of 0.35" in told.stdout


def test_dry_run_as_json_has_every_parameter_and_component(dlm):
    (found,) = json.loads(dlm("plan", "large", "--dry-run", "--json").stdout)
    assert (found["step"], found["num_params"], found["num_active_params"]) == (
        "pretrain",
        7_356_880_896,
        1_397_823_488,
    )
    assert found["parameters"]["embedding.weight"] == [157_184, 2048]
    assert sum(found["memory"]["components"].values()) == found["memory"]["device_bytes"]
    assert found["memory"]["by_phase"] == {"all": found["memory"]["device_bytes"]}
    assert found["tokens"] == 1000 * 1024 * 4096
    assert found["gpu"]["name"] == "H100"
    assert found["gpu_hours"] == pytest.approx(64 * found["hours"])
    assert found["checkpoint_bytes"] == 12 * 7_356_880_896


def test_dry_run_on_more_workers_and_spread_experts_needs_less(dlm):
    def needed(*settings: str) -> int:
        words = [word for setting in settings for word in ("--set", f"pretrain.{setting}")]
        return json.loads(dlm("plan", "large", "--dry-run", "--json", *words).stdout)[0]["memory"]["device_bytes"]

    assert needed("workers=64", "zero_stage=2") < needed("workers=16", "zero_stage=2") < needed("workers=16")
    assert needed("ep_size=8") < needed()


def test_dry_run_that_does_not_fit_ends_with_code_5_and_ways_that_fit(dlm):
    done = dlm("plan", "llada", "--dry-run", "--set", "pretrain.workers=64", "--set", "pretrain.micro_batch_seqs=8")
    assert (done.code, done.stdout) == (5, "")
    assert re.search(r"pretrain does not fit: a worker needs [\d.]+ GB, and H100 has 80.00 GB", done.stderr)
    assert "Most of it is activations" in done.stderr
    ways = re.findall(r"^  with (.*): ([\d.]+) GB$", done.stderr, re.MULTILINE)
    assert len(ways) > 1
    for settings, _ in ways:
        words = ["--set", "pretrain.workers=64", "--set", "pretrain.micro_batch_seqs=8", *settings.split()]
        assert dlm("plan", "llada", "--dry-run", *words).code == 0


def test_dry_run_that_no_single_setting_makes_fit_names_several_that_do(dlm):
    wide = ["--set", "pretrain.workers=2", "--set", "pretrain.micro_batch_seqs=64"]
    done = dlm("plan", "llada", "--dry-run", *wide)
    assert done.code == 5
    ((settings, size),) = re.findall(r"^  with (.*): ([\d.]+) GB$", done.stderr, re.MULTILINE)
    assert settings.count("--set") > 1
    again = dlm("plan", "llada", "--dry-run", "--json", *wide, *settings.split())
    assert json.loads(again.stdout)[0]["memory"]["device_bytes"] == pytest.approx(1e9 * float(size), abs=1e7)


def test_dry_run_that_nothing_makes_fit_says_so(dlm):
    rows = ["--set", "packing.seq_len=1048576", "--set", "pretrain.global_batch_seqs=2", "--set", "pretrain.workers=2"]
    done = dlm("plan", "llada", "--dry-run", *rows)
    assert done.code == 5
    assert "take more workers, or a larger GPU" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["large", "--dry-run", "--gpu", "v100"], ["'v100' is not known", "h100", "as in 48GB"]),
        (["large", "--dry-run", "--gpu", "0GB"], ["'0GB' is not known"]),
        (["large", "--dry-run", "--gpu", "-48GB"], ["'-48GB' is not known"]),
        (["large", "--dry-run", "--mfu", "0"], ["pretrain: mfu is 0.0", "(0, 1]"]),
        (["large", "--dry-run", "--mfu", "35"], ["mfu is 35.0"]),
        (["large", "--gpu", "h100"], ["--gpu has no effect without --dry-run; add --dry-run, or leave --gpu out"]),
        (["large", "--mfu", "0"], ["--mfu has no effect without --dry-run; add --dry-run, or leave --mfu out"]),
        (
            ["large", "--gpu", "h100", "--mfu", "0"],
            ["--gpu and --mfu have no effect without --dry-run; add --dry-run, or leave --gpu and --mfu out"],
        ),
        (["large", "--dry-run", "--deepspeed"], ["--dry-run, --deepspeed, --settings, --diff and --freeze each"]),
        (["large", "--deepspeed", "--settings"], ["--dry-run, --deepspeed, --settings, --diff and --freeze each"]),
        (["toy", "--dry-run"], ["workflow toy has no training step"]),
        (["toy", "--deepspeed"], ["workflow toy has no training step"]),
        (
            ["large", "--dry-run", "--set", "pretrain.objective.block_size=48"],
            ["block_size is 48 in phase all of pretrain", "4096"],
        ),
    ],
    ids=lambda value: " ".join(value) if value[0] in ("large", "toy") else "",
)
def test_plan_options_that_cannot_be_are_refused(dlm, arguments, words):
    done = dlm("plan", *arguments)
    assert (done.code, done.stdout) == (2, "")
    for word in words:
        assert word in done.stderr


def test_vocabulary_is_that_of_a_given_tokenizer(dlm, tokenizer_file):
    words = ["--set", f"tokenizer.file={tokenizer_file}"]
    (found,) = json.loads(dlm("plan", "quickstart", "--dry-run", "--json", *words).stdout)
    assert found["vocab_size"] == 256 + 3
    assert found["parameters"]["embedding.weight"][0] == 256 + 3


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"vocab": 3}}', "[1]"])
def test_vocabulary_of_a_file_that_is_no_tokenizer_is_refused(dlm, tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    done = dlm("plan", "quickstart", "--dry-run", "--set", f"tokenizer.file={path}")
    assert (done.code, done.stdout) == (2, "")
    assert "is not a tokenizer.json" in done.stderr


def test_deepspeed_configuration_is_the_generated_one(dlm):
    words = ["--set", "pretrain.ep_size=8", "--set", "pretrain.zero_stage=2"]
    found = json.loads(dlm("plan", "large", "--deepspeed", *words).stdout)["pretrain"]
    assert (found["train_batch_size"], found["gradient_accumulation_steps"]) == (1024, 16)
    assert found["zero_optimization"]["stage"] == 2
    assert found["expert_parallel"]["autoep_size"] == 8
    assert found["gradient_clipping"] == 1.0


def test_deepspeed_configuration_is_printed_without_torch(store):
    code = (
        "import sys; from workflows.cli import main\n"
        "sys.argv = ['dlm', 'plan', 'quickstart', '--deepspeed']\n"
        "main()\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    env = {**os.environ, "DLM_STORE": str(store.root.path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr


# --- what was not published -----------------------------------------------------------------------------------------


def test_recipes_as_json_say_which_settings_were_not_published(dlm, monkeypatch):
    ours = replace(quickstart(), name="ours", unpublished=("pretrain.optimizer.lr", "packing", "pretrain.num_steps"))
    monkeypatch.setitem(RECIPES, "ours", lambda: ours)
    found = {recipe["name"]: recipe["settings"] for recipe in json.loads(dlm("recipes", "--json").stdout)}
    assert found["ours"]["pretrain.optimizer.lr"] == {"value": 3e-3, "published": False}
    assert found["ours"]["packing.seq_len"] == {"value": 128, "published": False}
    assert "pretrain.global_batch_seqs" not in found["ours"]
    assert found["quickstart"] == {}


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("pretrain.optimizer.lrr", r"'pretrain.optimizer.lrr'; did you mean pretrain.optimizer.lr\?"),
        ("pretrain.num_step", r"did you mean pretrain.num_steps\?"),
        ("lr", "no step has the unpublished setting 'lr'"),
        ("", "no step has the unpublished setting ''"),
    ],
)
def test_unpublished_setting_that_no_step_has_is_refused(path, words):
    with pytest.raises(ValueError, match=words):
        replace(quickstart(), unpublished=(path,))


def test_setting_may_be_given_for_what_was_not_published(dlm, monkeypatch):
    ours = replace(quickstart(), unpublished=("pretrain.optimizer.lr",))
    monkeypatch.setitem(RECIPES, "ours", lambda: ours)
    found = json.loads(dlm("plan", "ours", "--settings", "--json", "--set", "pretrain.optimizer.lr=1e-4").stdout)
    assert found["pretrain.optimizer.lr"] == 1e-4
