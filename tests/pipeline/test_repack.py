"""A family's files and ours: the same tensors as in memory, whatever the shards and blocks; nothing else is taken."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlm_core.models.config import Architecture, ModelConfig, MoE
from dlm_core.models.transformer import Denoiser
from pipeline import repack, tensor_files
from pipeline.errors import CorruptionError, UserError
from pipeline.hf_names import Family, from_family, to_family
from pipeline.repack import check_round_trip, their_shapes, write_ours, write_theirs
from pipeline.tensor_files import TensorFiles

DENSE = Architecture(d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=6, tied_head=False)
EXPERTS = MoE(num_experts=3, top_k=1, d_ff_expert=4, renormalise=False)
GROUPED = MoE(4, 2, 4, num_shared_experts=2, router_score="sigmoid", num_groups=2, selection_bias=True, first_k_dense=1)
LLADA2 = replace(DENSE, qk_norm=True, rope_fraction=0.5, moe=GROUPED)
CASES: dict[str, tuple[Family, Architecture]] = {
    "llama": ("llama", DENSE),
    "llama, tied": ("llama", replace(DENSE, tied_head=True)),
    "qwen2": ("qwen2", replace(DENSE, qkv_bias=True)),
    "qwen3": ("qwen3", replace(DENSE, qk_norm=True, head_dim=6)),
    "qwen3_moe": ("qwen3_moe", replace(DENSE, qk_norm=True, d_ff=None, moe=EXPERTS)),
    "llada": ("llada", DENSE),
    "dream": ("dream", replace(DENSE, qkv_bias=True)),
    "dream, without biases, tied": ("dream", replace(DENSE, tied_head=True)),
    "llada_moe": ("llada_moe", replace(DENSE, qk_norm=True, d_ff=None, moe=EXPERTS)),
    "llada2": ("llada2", LLADA2),
    "llada2, unbiased": ("llada2", replace(LLADA2, moe=replace(GROUPED, selection_bias=False))),
}


@pytest.fixture(autouse=True, params=[5, 1 << 20], ids=["small blocks", "one block"])
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repack, "BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr(tensor_files, "BLOCK_ELEMENTS", request.param)


def config_of(case: str) -> ModelConfig:
    return ModelConfig(CASES[case][1], 11, 10)


def our_tensors(case: str) -> dict[str, Tensor]:
    """Numbers that are all different and exact in bfloat16 once they are rounded."""
    generator = torch.Generator().manual_seed(3)
    shapes = Denoiser(config_of(case)).state_dict()
    return {name: torch.randn(t.shape, generator=generator).bfloat16().float() for name, t in shapes.items()}


def theirs_in_memory(case: str) -> dict[str, Tensor]:
    family, a = CASES[case]
    return {name: tensor.contiguous() for name, tensor in to_family(family, a, our_tensors(case)).items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].float(), tensor.float()), name


def saved(directory: Path, tensors: dict[str, Tensor], num_files: int = 1) -> TensorFiles:
    """Their files, as somebody else has written them."""
    paths = [directory / f"theirs-{number}.safetensors" for number in range(num_files)]
    for number, path in enumerate(paths):
        part = {name: tensors[name].clone() for name in sorted(tensors)[number::num_files]}
        save_file(part, path, metadata={"format": "pt"})
    return TensorFiles(paths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_our_file_has_what_joining_theirs_in_memory_gives(tmp_path: Path, case: str, dtype: torch.dtype):
    family, a = CASES[case]
    tensors = {name: tensor.to(dtype) for name, tensor in theirs_in_memory(case).items()}
    theirs = saved(tmp_path, tensors, num_files=3)
    write_ours(family, config_of(case), theirs, tmp_path / "ours")
    found = load_file(tmp_path / "ours")
    assert_equal(found, from_family(family, a, {name: tensor.float() for name, tensor in tensors.items()}))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    check_round_trip(family, config_of(case), TensorFiles([tmp_path / "ours"]), theirs)


@pytest.mark.parametrize("shard_bytes", [1, 500, 10**9])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("case", CASES)
def test_their_files_have_what_cutting_ours_in_memory_gives(tmp_path: Path, case: str, dtype: str, shard_bytes: int):
    family, _ = CASES[case]
    save_file(our_tensors(case), tmp_path / "ours")
    ours = TensorFiles([tmp_path / "ours"])
    paths = write_theirs(family, config_of(case), ours, tmp_path, dtype, shard_bytes)
    found = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert_equal(found, theirs_in_memory(case))
    wanted = {name: torch.bfloat16 if dtype == "BF16" else torch.float32 for name in found}
    wanted |= {name: torch.float32 for name in found if name.endswith("expert_bias")}
    assert {name: tensor.dtype for name, tensor in found.items()} == wanted
    check_round_trip(family, config_of(case), ours, TensorFiles(paths))
    index = tmp_path / "model.safetensors.index.json"
    if len(paths) == 1:
        assert paths == [tmp_path / "model.safetensors"]
        assert not index.exists()
        return
    for path in paths:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118 - no mapping
        assert len(sizes) == 1 or sum(sizes) <= shard_bytes
    last = len(paths)
    assert paths[-1].name == f"model-{last:05d}-of-{last:05d}.safetensors"
    value = json.loads(index.read_text())
    assert value["weight_map"] == {name: path.name for path in paths for name in load_file(path)}
    assert value["metadata"] == {"total_size": sum(tensor.nbytes for tensor in found.values())}


def test_all_that_is_missing_unknown_or_misshapen_is_told_before_anything_is_written(tmp_path: Path):
    tensors = theirs_in_memory("llama")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(8, 8)
    tensors |= {"model.layers.2.norm": torch.zeros(1), "model.rotary.inv_freq": torch.zeros(2)}
    with pytest.raises(UserError) as caught:
        write_ours("llama", config_of("llama"), saved(tmp_path, tensors), tmp_path / "ours", ["model.rotary.inv_freq"])
    assert str(caught.value) == (
        'the weights are not those of "llama" with this config.json: model.layers.1.mlp.up_proj.weight is missing; '
        "model.norm.weight is missing; model.layers.2.norm is unknown; model.layers.0.self_attn.k_proj.weight has "
        "shape (8, 8), the model wants (4, 8)"
    )
    assert not (tmp_path / "ours").exists()


def test_of_many_that_do_not_fit_some_are_named_and_the_rest_counted(tmp_path: Path):
    tensors = {f"extra.{number:02d}": torch.zeros(1) for number in range(30)}
    with pytest.raises(UserError, match=r"extra\.19 is unknown; and 10 more$"):
        write_ours("llama", config_of("llama"), saved(tmp_path, theirs_in_memory("llama") | tensors), tmp_path / "ours")


def test_tensors_by_the_hundred_thousand_are_refused_before_their_names_are_listed(tmp_path: Path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    many = replace(DENSE, qk_norm=True, d_ff=None, num_layers=100, moe=replace(EXPERTS, num_experts=1000))
    with pytest.raises(UserError, match=r'"qwen3_moe" with 300,903 tensors, but the files have 1; take both'):
        write_ours(
            "qwen3_moe", ModelConfig(many, 11, 10), TensorFiles([tmp_path / "model.safetensors"]), tmp_path / "x"
        )


def test_tensors_without_function_are_left_out(tmp_path: Path):
    theirs = saved(tmp_path, {**theirs_in_memory("llama"), "rotary.inv_freq": torch.ones(3)})
    write_ours("llama", config_of("llama"), theirs, tmp_path / "ours", left_out=["rotary.inv_freq"])
    assert_equal(load_file(tmp_path / "ours"), our_tensors("llama"))


def test_packed_experts_of_a_model_in_memory_are_refused_with_what_to_take(tmp_path: Path):
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(3, 8, 8)}
    with pytest.raises(UserError, match="whose experts are packed: take the files of save_pretrained"):
        write_ours("qwen3_moe", config_of("qwen3_moe"), saved(tmp_path, tensors), tmp_path / "ours")


@pytest.mark.parametrize(
    ("case", "name", "words"),
    [
        ("dream, without biases, tied", "model.layers.1.self_attn.k_proj.bias", "is not all zeros, but the model"),
        ("dream, without biases, tied", "lm_head.weight", r"is not model\.embed_tokens\.weight once more"),
        ("llada2, unbiased", "model.layers.1.mlp.gate.expert_bias", "is not all zeros, but the model"),
    ],
)
def test_what_ours_would_lose_is_refused(tmp_path: Path, case: str, name: str, words: str):
    tensors = theirs_in_memory(case)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] += 1.0
    with pytest.raises(UserError, match=f"{name} {words}"):
        write_ours(CASES[case][0], config_of(case), saved(tmp_path, tensors), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_ours_that_is_not_of_the_model_is_refused(tmp_path: Path):
    tensors = our_tensors("llama")
    del tensors["norm.weight"]
    save_file(tensors, tmp_path / "ours")
    with pytest.raises(CorruptionError, match=r"norm\.weight is missing"):
        write_theirs("llama", config_of("llama"), TensorFiles([tmp_path / "ours"]), tmp_path)


@pytest.mark.parametrize("case", ["llama", "qwen3_moe", "dream, without biases, tied"])
def test_a_value_that_changed_is_found_in_whatever_tensor(tmp_path: Path, case: str):
    family, _ = CASES[case]
    save_file(our_tensors(case), tmp_path / "ours")
    ours = TensorFiles([tmp_path / "ours"])
    names = sorted(their_shapes(family, config_of(case)))
    for name in names[:: max(1, len(names) // 8)]:
        tensors = theirs_in_memory(case)
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] += 1e-6
        with pytest.raises(CorruptionError, match=f"^{name} is not the same in both files"):
            check_round_trip(family, config_of(case), ours, saved(tmp_path, tensors))
