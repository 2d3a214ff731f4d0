"""Every pair that is the same function: exported, loaded by transformers in a fresh process, imported again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifact import read_json
from pipeline.data.vocabulary import load_vocabulary
from pipeline.export.prove import LOGITS_RTOL
from pipeline.import_checkpoint.config import STAGE as IMPORT
from pipeline.import_checkpoint.config import ImportConfig
from pipeline.repack import INDEX_FILE
from pipeline.tensor_files import TensorFiles, narrowed
from pipeline.weights import WEIGHTS_FILE, load_record
from tests.support.exports import PAIRS, TEXTS, ask_transformers, export
from tests.support.tiny_run import run_stage

pytestmark = pytest.mark.timeout(300)
DIFFUSION = ("llada", "dream", "llada_moe", "llada2")
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
Made = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Weights and directory of every pair."""
    return {name: export(pair, tokenizer, tmp_path_factory.mktemp(name)) for name, pair in PAIRS.items()}


@pytest.fixture(scope="module")
def answers(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the installed transformers."""
    return ask_transformers(made, tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def answers4(made: Made, tmp_path_factory: pytest.TempPathFactory, transformers4: Path) -> Any:
    """Of transformers 4.57."""
    return ask_transformers(made, tmp_path_factory.mktemp("old"), transformers4)


def check_answer(name: str, answer: Any, tokenizer: Path, version: str) -> None:
    """The directory is the same function, generates as its card says, and has the same tokenizer."""
    assert "error" not in answer, answer["error"]
    assert answer["versions"]["transformers"].startswith(version)
    assert 0 < answer["difference"] < LOGITS_RTOL / 10
    vocabulary = load_vocabulary(tokenizer)
    special, ids = vocabulary.special, [vocabulary.tokenizer.encode(text).ids for text in TEXTS]
    assert answer["ids"] == ids
    assert answer["texts"] == [vocabulary.decode(one) for one in ids] == list(TEXTS)
    assert answer["special"] == [special.mask_token_id, special.eos_token_id, special.pad_token_id]
    pair, mask = PAIRS[name], answer["second mask"]
    assert 0 in mask
    assert mask == sorted(mask)  # padding in front
    assert answer["new in a batch"] == answer["new alone"]
    assert len(answer["new alone"]) == 4
    if pair.family in DIFFUSION or pair.record.get("objective") == "autoregressive_nll":
        (prompt,), (out,) = answer["prompt"], answer["out"]
        assert out[: len(prompt)] == prompt
        assert len(prompt) < len(out) <= len(prompt) + 32
        if pair.family in DIFFUSION:
            assert len(out) == len(prompt) + 32
            assert special.mask_token_id not in out
        assert answer["printed"].strip()


@pytest.mark.parametrize("name", PAIRS)
def test_an_exact_pair_is_the_same_function_in_the_installed_transformers(
    name: str, answers: Any, tokenizer: Path
) -> None:
    check_answer(name, answers[name], tokenizer, "5.")


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_an_exact_pair_is_the_same_function_in_transformers_4(name: str, answers4: Any, tokenizer: Path) -> None:
    check_answer(name, answers4[name], tokenizer, "4.57.")


@pytest.mark.parametrize("name", PAIRS)
def test_an_exported_directory_is_imported_as_the_weights_that_it_was_made_of(
    name: str, made: Made, tmp_path: Path
) -> None:
    weights, exported = made[name]
    back = run_stage(IMPORT, ImportConfig(path=str(exported), proof="tensors"), {}, tmp_path / "back")
    ours, again = TensorFiles([weights / WEIGHTS_FILE]), TensorFiles([back / WEIGHTS_FILE])
    dtype, rounded = STORED[PAIRS[name].dtype], 0
    for tensor in ours.names:
        values, found = ours.read(tensor), again.read(tensor)
        is_exact = tensor.endswith("e_score_correction_bias")
        wanted = values if is_exact else _rounded(values, dtype)
        assert found.tobytes() == wanted.tobytes(), tensor
        rounded += not is_exact and not np.array_equal(found, values)
    assert (rounded > 0) == (dtype != "F32")
    for tensor in set(again.names) - set(ours.names):  # what the family always has: zeros, or the embedding once more
        values = again.read(tensor)
        assert not values.any() or values.tobytes() == again.read("embedding.weight").tobytes(), tensor
    record, there = load_record(weights), load_record(back)
    assert (there.seq_len, there.model.mask_token_id) == (record.seq_len, record.model.mask_token_id)
    if PAIRS[name].family in DIFFUSION:
        assert there.target_offset == record.target_offset


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    stored = narrowed(values, dtype)
    widened = np.left_shift(stored, 16, dtype=np.uint32).view(np.float32) if dtype == "BF16" else stored
    return widened.astype(np.float32).reshape(values.shape)


def test_weights_are_cut_into_files_with_an_index(made: Made) -> None:
    whole, cut = made["llama-llada"][1], made["qwen2-llada"][1]
    assert [path.name for path in sorted(whole.glob("*.safetensors"))] == ["model.safetensors"]
    names = [path.name for path in sorted(cut.glob("*.safetensors"))]
    assert len(names) > 2
    assert names == [f"model-{number + 1:05d}-of-{len(names):05d}.safetensors" for number in range(len(names))]
    index = read_json(cut / INDEX_FILE)
    assert set(index["weight_map"].values()) == set(names)
    assert set(index["weight_map"]) == set(TensorFiles(sorted(cut.glob("*.safetensors"))).names)
    assert not (whole / INDEX_FILE).exists()


def test_plain_families_bring_no_code_and_the_others_all_that_they_import(made: Made) -> None:
    for name, (_, exported) in made.items():
        found = {path.stem for path in exported.glob("*.py")}
        assert bool(found) == (PAIRS[name].family in DIFFUSION)
        for path in exported.glob("*.py"):
            assert set(_relative_imports(path)) <= found
        named = read_json(exported / "config.json").get("auto_map", {}).values()
        assert {target.split(".")[0] for target in named} <= found


def _relative_imports(path: Path) -> Iterator[str]:
    for line in path.read_text().splitlines():
        if line.startswith("from ."):
            yield line.split()[1].lstrip(".")


def test_ids_of_special_tokens_stand_in_both_configurations(made: Made, tokenizer: Path) -> None:
    special = load_vocabulary(tokenizer).special
    for _, exported in made.values():
        for file in ("config.json", "generation_config.json"):
            values = read_json(exported / file)
            assert values["mask_token_id"] == special.mask_token_id
            assert values["eos_token_id"] == special.eos_token_id
            assert values["pad_token_id"] == special.pad_token_id
