"""Diffusion models of other projects become ours: the same function, all options of a family, both directions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlm_core.models.config import Architecture, ModelConfig, RopeScaling
from dlm_core.models.transformer import Denoiser
from pipeline.artifact import load_manifest, read_json, write_json
from pipeline.errors import UserError
from pipeline.hf_config import SpecialIds, write_config, write_generation_config
from pipeline.hf_names import DITS, Family, to_family
from pipeline.import_checkpoint import fetch
from pipeline.import_checkpoint.config import STAGE, ImportConfig
from pipeline.import_checkpoint.run import REPORT
from pipeline.repack import write_theirs
from pipeline.tensor_files import TensorFiles
from pipeline.weights import WEIGHTS_FILE, ModelRecord, load_denoiser, load_record, save_weights
from tests.pipeline.conftest import make_artifact
from tests.pipeline.test_hf_dit import BD3LM, MDLM
from tests.support.tiny_families import EXPERTS, GROUPED, LLAMA3, SMALL, YARN

pytestmark = pytest.mark.usefixtures("forked_proofs")
V, SPECIAL = 23, SpecialIds(1, 2, 3, 4)
SHARED = replace(EXPERTS, num_shared_experts=2, first_k_dense=1)
UNGROUPED = replace(GROUPED, num_shared_experts=0, num_groups=1, top_groups=1)

MODELS: dict[str, tuple[Family, Architecture]] = {
    "llada": ("llada", replace(SMALL, qkv_bias=True)),
    "llada-tied": ("llada", replace(SMALL, tied_head=True, num_kv_heads=None, init="mitchell", init_std=None)),
    "dream": ("dream", replace(SMALL, qkv_bias=True, rope_scaling=YARN)),
    "llada_moe": ("llada_moe", replace(SMALL, qk_norm=True, moe=SHARED, rope_scaling=RopeScaling("linear", 2.0))),
    "llada_moe-all": (
        "llada_moe",
        replace(SMALL, d_ff=None, moe=EXPERTS),
    ),
    "llada2": ("llada2", replace(SMALL, qk_norm=True, head_dim=8, rope_fraction=0.5, moe=GROUPED)),
    "llada2-plain": (
        "llada2",
        replace(SMALL, qk_norm=True, qkv_bias=True, rope_scaling=LLAMA3, moe=UNGROUPED),
    ),
}


def random_model(config: ModelConfig) -> Denoiser:
    """Weights that leave no norm, bias or buffer at 0 or 1."""
    model = Denoiser(config).eval()
    with torch.no_grad():
        for index, tensor in enumerate([*model.parameters(), *model.buffers()]):
            generator = torch.Generator().manual_seed(index)
            tensor.copy_((tensor.ndim == 1) + 0.25 * torch.randn(tensor.shape, generator=generator))
    return model


def record_of(family: Family, a: Architecture) -> ModelRecord:
    return ModelRecord(
        ModelConfig(a, V, 4),
        seq_len=64,
        objective="block_nelbo" if family == "llada2" else "masked_nelbo",
        block_size=8 if family == "llada2" else 0,
        target_offset=1 if family == "dream" else 0,
    )


def write_source(root: Path, family: Family, record: ModelRecord, model: Denoiser, dtype: str = "F32") -> Path:
    """A directory of the family, in shards."""
    root.mkdir()
    save_weights(root, model.state_dict(), record)
    source = root / "source"
    source.mkdir()
    write_theirs(family, record.model, TensorFiles([root / WEIGHTS_FILE]), source, dtype, shard_bytes=9000)
    write_json(source / "config.json", write_config(family, record, SPECIAL))
    write_json(source / "generation_config.json", write_generation_config(SPECIAL))
    return source


def _import(source: Path, out: Path, **settings: Any) -> Path:
    return make_artifact(STAGE, ImportConfig(**{"path": str(source), "proof": "tensors", **settings}), {}, out)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_written_as_a_family_is_imported_as_it_was(name, tmp_path):
    family, a = MODELS[name]
    record, model = record_of(family, a), random_model(ModelConfig(a, V, 4))
    made = _import(write_source(tmp_path / name, family, record, model), tmp_path / "out")
    found, found_record = load_denoiser(made)
    assert replace(found_record, lineage=[]) == record
    ours, theirs = model.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert load_manifest(made).stats["special_ids"] == {"bos": 1, "eos": 2, "pad": 3, "mask": 4, "eos_token_ids": []}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=slow) for name in ("llada", "llada_moe")), "dream", "llada2"]
)
def test_import_of_a_diffusion_model_is_proved_by_the_logits_of_our_modeling_files(name, tmp_path):
    family, a = MODELS[name]
    source = write_source(tmp_path / name, family, record_of(family, a), random_model(ModelConfig(a, V, 4)), "BF16")
    for part in ("configuration", "modeling"):  # theirs are named in auto_map, and not run
        for path in (source / f"{part}_{stem}.py" for stem in ("llada", "dream", "lladamoe", "llada2_moe")):
            path.write_text("raise SystemExit('code of a checkpoint was run')\n")
    kernels = {name: "flash_attention_2" for name in ("_attn_implementation", "attn_implementation")}  # not installed
    write_json(source / "config.json", read_json(source / "config.json") | kernels)
    stats = load_manifest(_import(source, tmp_path / "out", proof="logits")).stats
    assert stats["proof"] == "logits"
    assert 0.0 <= stats["logits_difference"] < 1e-5


@pytest.mark.parametrize(("family", "config"), [("mdlm", MDLM), ("bd3lm", BD3LM), ("bd3lm", BD3LM | {"adaln": False})])
def test_a_dit_is_imported_without_its_buffers_and_without_transformers(family, config, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    from pipeline.hf_config import read_config

    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    assert family in DITS
    described = read_config(config)
    model = random_model(described.model)
    buffers = {"backbone.rotary_emb.inv_freq": torch.ones(2)}
    buffers |= {"sampling_eps_min": torch.tensor(1e-3)} if family == "bd3lm" else {}
    state = to_family(family, described.model.architecture, model.state_dict())
    source = tmp_path / "source"
    source.mkdir()
    save_file(state | buffers, source / "model.safetensors", metadata={"format": "pt"})
    write_json(source / "config.json", config)
    made = _import(source, tmp_path / "out", proof="logits")
    found, _ = load_denoiser(made)
    theirs = found.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items())
    assert read_json(made / REPORT)["left_out"].keys() == buffers.keys()
    stats = load_manifest(made).stats
    assert stats["proof"] == "tensors"
    assert "without its own code" in stats["why_no_logits"]
    assert load_record(made).objective == described.objective


def test_a_head_that_a_tied_family_writes_out_stays_untied(tmp_path):
    record = record_of("dream", replace(SMALL, qkv_bias=True, tied_head=True))
    model = random_model(record.model)
    made = _import(write_source(tmp_path / "dream", "dream", record, model), tmp_path / "out")
    found, found_record = load_denoiser(made)
    assert not found_record.model.architecture.tied_head
    assert torch.equal(found.head.weight, model.embedding.weight)


def test_biases_that_dream_always_has_are_kept(tmp_path):
    record = record_of("dream", SMALL)
    made = _import(write_source(tmp_path / "dream", "dream", record, random_model(record.model)), tmp_path / "out")
    found, found_record = load_denoiser(made)
    assert found_record.model.architecture.qkv_bias
    assert not found.blocks[0].attention.qkv.bias.any()


def test_an_index_of_a_family_that_lacks_an_expert_is_refused_by_its_tensors(tmp_path):
    family, a = MODELS["llada_moe"]
    source = write_source(tmp_path / "moe", family, record_of(family, a), random_model(ModelConfig(a, V, 4)))
    config = read_json(source / "config.json")
    write_json(source / "config.json", config | {"num_experts": 6})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts\.5\.gate_proj\.weight is missing"):
        _import(source, tmp_path / "out")
