"""Our own modeling files as transformers loads them: exact tensors, logits of our denoiser, a round trip, and text.

A process of its own loads every directory: what a model holds beside its tensors is wrong there if anywhere.
"""

import ast
import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm_core.models.attention import AttentionMask
from dlm_core.models.transformer import Denoiser
from pipeline.export.code_files import FOLDER
from pipeline.export.prove import auto_class
from pipeline.hf_config import read_config
from pipeline.hf_names import to_family
from tests.support import open_exports
from tests.support.hf_exports import EXPORTS, MASK, V, config_of, random_model, write_export

LOGITS_ATOL = 1e-5  # float32 logits of order 1 from two orders of summation
LOADED = ["installed", pytest.param("4.57", marks=pytest.mark.slow)]
REAL = torch.arange(V) != MASK

Reports = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def xt() -> Tensor:
    return torch.randint(5, V, (3, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, xt: Tensor
) -> Callable[[str], Reports]:
    """What a version of transformers made of all exports, by their names."""

    @functools.cache
    def of(version: str) -> Reports:
        folder = tmp_path_factory.mktemp("exports")
        for name, (family, architecture) in EXPORTS.items():
            write_export(folder / "in" / name, family, random_model(architecture))
        torch.save(xt, folder / "in" / "xt.pt")
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if version == "4.57":
            env |= {"PYTHONPATH": str(request.getfixturevalue("transformers4"))}
        command = [sys.executable, open_exports.__file__, str(folder / "in"), str(folder / "reports.pt")]
        run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-5000:]
        return torch.load(folder / "reports.pt")

    return of


@functools.cache
def _model(name: str) -> Denoiser:
    return random_model(EXPORTS[name][1])


@torch.no_grad()
def _ours(name: str, xt: Tensor, mask: AttentionMask | None = None) -> Tensor:
    model = _model(name)
    return model(xt, mask=mask or AttentionMask()).view(*xt.shape, V)[..., REAL]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("version", LOADED)
@pytest.mark.parametrize("name", EXPORTS)
def test_exports_load_with_exactly_their_tensors(reports, name, version):
    found = reports(version)[name]
    family, architecture = EXPORTS[name]
    assert found["version"].startswith("4.57." if version == "4.57" else "5.")
    assert found["problems"] == found["base problems"] == found["back problems"] == []
    wanted = {"llada": "LLaDAModelLM", "dream": "DreamModel", "llada_moe": "LLaDAMoEModelLM"}
    assert found["class"] == wanted.get(family, "LLaDA2MoeModelLM")
    assert found["base class"] == wanted.get(family, "LLaDA2MoeModel")
    written_out = V * architecture.d_model if architecture.tied_head and family != "llada" else 0
    biases = 3 * (16 + 2 * 8) if name == "dream-tied-no-biases" else 0
    assert found["num_params"] == _model(name).config.num_params() + written_out + biases


@pytest.mark.timeout(300)
@pytest.mark.parametrize("version", LOADED)
@pytest.mark.parametrize("name", EXPORTS)
def test_logits_equal_those_of_our_denoiser(reports, name, version, xt):
    found = reports(version)[name]
    full, causal = _ours(name, xt), _ours(name, xt, AttentionMask("causal"))
    wanted = dict.fromkeys(("logits", "base", "back", "padded", "positions"), full)
    wanted |= dict.fromkeys(("causal", "causal added"), causal)
    errors = {way: float((found[way][..., REAL] - logits).abs().max()) for way, logits in wanted.items()}
    assert max(errors.values()) <= LOGITS_ATOL, errors
    assert float((full - causal).abs().max()) > 100 * LOGITS_ATOL  # else a mask that is not applied goes unseen


@pytest.mark.timeout(300)
@pytest.mark.parametrize("version", LOADED)
@pytest.mark.parametrize("name", EXPORTS)
def test_half_precision_rounds_all_but_the_bias_of_the_choice(reports, name, version):
    found = reports(version)[name]
    kept = {key for key, dtype in found["half dtypes"].items() if dtype != "torch.bfloat16"}
    assert kept == {key for key in found["half dtypes"] if key.endswith("expert_bias")}
    assert bool(kept) == name.startswith("llada2")
    assert float((found["half logits"] - found["logits"]).abs().max()) < 1.0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("version", LOADED)
@pytest.mark.parametrize("name", EXPORTS)
def test_saved_again_it_has_code_and_the_keys_that_both_versions_read(reports, name, version):
    found = reports(version)[name]
    stem = {"llada_moe": "lladamoe", "llada2": "llada2_moe"}.get(EXPORTS[name][0], EXPORTS[name][0])
    code = {f"{part}_{stem}.py" for part in ("configuration", "modeling")}
    code |= {f"diffusion_{part}.py" for part in ("config", "modules", "generation")}
    assert {file for file in found["saved files"] if file.endswith(".py")} == code
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(found["saved files"])
    config = found["saved config"]
    assert "rope_parameters" not in config
    assert {"rope_theta", "rope_scaling"} <= config.keys()
    assert read_config(config) == read_config(config_of(EXPORTS[name][0], _model(name).config))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("version", LOADED)
@pytest.mark.parametrize("name", EXPORTS)
def test_a_model_without_weights_is_drawn_with_the_deviation_of_its_configuration(reports, name, version):
    drawn = reports(version)[name]["drawn"]
    assert all(0.6 * 0.25 < deviation < 1.4 * 0.25 for deviation in drawn.values()), drawn


@pytest.mark.timeout(300)
@pytest.mark.parametrize("version", LOADED)
@pytest.mark.parametrize("name", EXPORTS)
def test_generate_keeps_the_prompt_leaves_no_mask_and_repeats_under_a_seed(reports, name, version, xt):
    found = reports(version)[name]
    for way in ("greedy", "greedy padded", "drawn 7", "drawn 8"):
        assert found[way].shape == (3, 21)
        assert torch.equal(found[way][:, :11], xt)
        assert not (found[way] == MASK).any()
    assert torch.equal(found["greedy"], found["greedy again"])
    assert torch.equal(found["greedy"], found["greedy padded"])
    assert torch.equal(found["drawn 7"], found["drawn 7 again"])
    assert not torch.equal(found["drawn 7"], found["drawn 8"])


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_both_versions_generate_the_same_text(reports, name):
    for way in ("greedy", "drawn 7"):
        assert torch.equal(reports("installed")[name][way], reports("4.57")[name][way])


def test_exported_code_needs_nothing_of_this_repository():
    outside: set[str] = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                outside |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert (FOLDER / f"{node.module}.py").exists()
            elif isinstance(node, ast.ImportFrom):
                outside.add(str(node.module).partition(".")[0])
    assert outside == {"torch", "transformers", "math", "typing", "collections"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; .* computes 'silu' alone"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
    ],
)
def test_setting_that_the_code_does_not_compute_is_refused(settings, message):
    from pipeline.export.hf.configuration_dream import DreamConfig

    with pytest.raises(ValueError, match=message):
        DreamConfig(**settings)


@pytest.mark.parametrize(
    "given",
    [
        {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}},
    ],
)
def test_rotary_settings_are_read_in_every_spelling_and_written_in_one(given):
    from pipeline.export.hf.configuration_llada2_moe import LLaDA2MoeConfig

    written = LLaDA2MoeConfig(**given).to_dict()
    assert written["rope_theta"] == 300.0
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert "rope_parameters" not in written


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            'rope_type is "dynamic"; it must be one of default, linear, llama3, yarn',
        ),
        (
            {"rope_type": "linear", "factor": 2.0, "mscale": 1.0},
            "mscale, which is not computed",
        ),
        ({"rope_type": "default", "factor": 2.0}, "rope_scaling has factor"),
    ],
)
def test_rotary_setting_that_the_code_does_not_compute_is_refused(rope, message):
    from pipeline.export.hf.diffusion_modules import rope_frequencies

    with pytest.raises(ValueError, match=message):
        rope_frequencies({"rope_theta": 100.0, **rope}, 8, 64)


def test_attention_mask_of_another_shape_is_refused():
    from pipeline.export.hf.diffusion_modules import attention_pairs

    with pytest.raises(ValueError, match=r"attention_mask is \[11\]; wanted \[B, L\]"):
        attention_pairs(torch.ones(11), torch.float32)


def _theirs(name: str) -> Any:
    """The exported class with the weights of our denoiser, made here."""
    (family, architecture), ours = EXPORTS[name], _model(name)
    values = config_of(family, ours.config)
    config, model = (
        getattr(importlib.import_module(f"pipeline.export.hf.{module}"), kind)
        for module, _, kind in (values["auto_map"][of].partition(".") for of in ("AutoConfig", auto_class(family)))
    )
    theirs = model(config(**values)).eval()
    theirs.load_state_dict(to_family(family, architecture, ours.state_dict()), strict=True)
    return theirs


@pytest.mark.parametrize("name", EXPORTS)
def test_weights_that_lie_on_the_disk_are_brought_in_where_they_are_used(name: str, tmp_path: Path, xt: Tensor):
    """accelerate does it where a module is called: a weight that is read past its module is not there."""
    from accelerate import disk_offload

    theirs = disk_offload(_theirs(name), str(tmp_path), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in theirs.parameters())
    with torch.no_grad():
        found = theirs(xt).logits
    assert float((found[..., REAL] - _ours(name, xt)).abs().max()) <= LOGITS_ATOL


@pytest.mark.parametrize("name", EXPORTS)
def test_what_chooses_experts_is_none_of_the_matrices_that_quantisers_replace(name: str, xt: Tensor):
    """They put a class of their own in the place of every nn.Linear: it computes in the dtype of its input."""
    theirs = _theirs(name).bfloat16()
    with torch.no_grad():
        before = theirs(xt).logits
        for place, module in [*theirs.named_modules()]:
            if isinstance(module, torch.nn.Linear):
                parent, _, own = place.rpartition(".")
                plain = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
                setattr(theirs.get_submodule(parent), own, plain.bfloat16())
                plain.load_state_dict(module.state_dict())
        assert torch.equal(theirs(xt).logits, before)
