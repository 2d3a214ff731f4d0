"""Samples: the same every time, without a mask, and with frames that lead from masks to the text."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.vocabulary import load_vocabulary
from pipeline.errors import UserError
from pipeline.generate.config import STAGE, GenerateConfig
from pipeline.weights import load_record
from tests.support.tiny_run import Artifacts, make_artifacts, run_stage, sha256

pytestmark = pytest.mark.timeout(120)
SMALL = GenerateConfig(num_samples=3, length=32, num_steps=16, num_frames=6)


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """Undo the process-wide settings of the stage."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def generate(config: GenerateConfig, weights: Path, tokenizer: Path, out: Path) -> list[dict[str, Any]]:
    """Samples of a run of the stage."""
    run_stage(STAGE, config, {"weights": weights, "tokenizer": tokenizer}, out)
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_samples_are_the_same_every_time_and_others_for_another_seed(
    weights: Path, made: Artifacts, tmp_path: Path
) -> None:
    first = generate(SMALL, weights, made.tokenizer, tmp_path / "a")
    generate(SMALL, weights, made.tokenizer, tmp_path / "b")
    other = generate(GenerateConfig(**{**vars(SMALL), "noise_seed": 1}), weights, made.tokenizer, tmp_path / "c")
    assert sha256(tmp_path / "a" / "samples.jsonl") == sha256(tmp_path / "b" / "samples.jsonl")
    assert [line["ids"] for line in first] != [line["ids"] for line in other]
    assert len({line["text"] for line in first}) == 3


@pytest.mark.parametrize("temperature", [0.0, 0.9, 2.0])
def test_samples_hold_no_mask_and_their_text_is_that_of_their_ids(
    weights: Path, made: Artifacts, tmp_path: Path, temperature: float
) -> None:
    vocabulary = load_vocabulary(made.tokenizer)
    config = GenerateConfig(**{**vars(SMALL), "temperature": temperature})
    lines = generate(config, weights, made.tokenizer, tmp_path / "out")
    assert len(lines) == 3
    for line in lines:
        assert len(line["ids"]) == 32
        assert vocabulary.special.mask_token_id not in line["ids"]
        assert line["text"] == vocabulary.decode(line["ids"])


@pytest.mark.parametrize("num_frames", [2, 6, 17])
def test_frames_lead_from_masks_to_the_pieces_of_the_text(
    weights: Path, made: Artifacts, tmp_path: Path, num_frames: int
) -> None:
    tokenizer = load_vocabulary(made.tokenizer).tokenizer
    config = GenerateConfig(**{**vars(SMALL), "num_frames": num_frames})
    for line in generate(config, weights, made.tokenizer, tmp_path / "out"):
        frames, steps = line["frames"], line["steps"]
        assert len(frames) == len(steps) == len(set(steps)) == num_frames
        assert (steps[0], steps[-1], steps) == (0, 16, sorted(steps))
        assert frames[0] == [None] * 32
        assert frames[-1] == [tokenizer.decode([i], skip_special_tokens=False) for i in line["ids"]]
        for earlier, later in pairwise(frames):
            assert all(a is None or a == b for a, b in zip(earlier, later, strict=True))


def test_a_sample_longer_than_the_rows_of_training_is_refused(weights: Path, made: Artifacts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"generate\.length is 33, the model was trained on rows of 32 tokens"):
        generate(GenerateConfig(length=33), weights, made.tokenizer, tmp_path / "out")


def test_samples_of_a_shifted_model_begin_with_the_end_of_a_document_and_are_read_one_place_before(
    weights: Path, made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    special = load_vocabulary(made.tokenizer).special
    record = replace(load_record(weights), target_offset=1)
    asked: list[torch.Tensor] = []

    def next_number(xt: torch.Tensor, select: torch.Tensor) -> torch.Tensor:
        """After token n comes n + 1; asked at the place of n, whatever stands behind it."""
        asked.append(select)
        seen = xt.flatten()[select].clamp(max=special.vocab_size - 2)
        return 100.0 * torch.nn.functional.one_hot(seen + 1, special.vocab_size)

    monkeypatch.setattr("pipeline.generate.run.load_denoiser", lambda _: (next_number, record))
    config = GenerateConfig(num_samples=2, length=8, num_steps=1, num_frames=2, temperature=0.0)
    lines = generate(config, weights, made.tokenizer, tmp_path / "out")
    for line in lines:
        assert line["ids"][0] == special.eos_token_id
        assert line["ids"][1] == special.eos_token_id + 1
    (places,) = asked
    assert sorted((places % 8).tolist()) == sorted([*range(7), *range(7)])


def test_the_tokenizer_of_another_run_is_refused(weights: Path, tmp_path: Path) -> None:
    other = make_artifacts(tmp_path, seed=1)
    with pytest.raises(UserError, match="is not that of the weights"):
        generate(SMALL, weights, other.tokenizer, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"length": -1}, "length is -1"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"num_frames": 1}, "num_frames is 1"),
        ({"num_steps": 4, "num_frames": 6}, "num_frames is 6"),
    ],
)
def test_a_setting_out_of_range_names_the_field_and_the_value(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GenerateConfig(**change)
