"""Samples: the same every time, without a mask, and with frames that lead from masks to the text."""

import json
import math
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dlm_core.models.transformer import Denoiser
from pipeline.artifact import load_manifest
from pipeline.data.vocabulary import load_vocabulary
from pipeline.errors import UserError
from pipeline.generate.config import STAGE, GenerateConfig
from pipeline.inference.model import forget_models
from pipeline.inference.sampler import TAKES, SamplerConfig
from pipeline.weights import load_record
from tests.support.exports import LLAMA
from tests.support.interchange import drawn, random_model, save_model
from tests.support.tiny_run import Artifacts, make_artifacts, run_stage, sha256

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("torch_settings")]
SMALL = GenerateConfig(num_samples=3, length=32, sampler=SamplerConfig(num_steps=16), num_frames=6)
KINDS = [
    SamplerConfig(kind, **settings)
    for kind, settings in {
        "ancestral": {"num_steps": 8, "noise_removal": True},
        "origin": {"num_steps": 8},
        "analytic": {"num_steps": 8},
        "first_hitting": {"per_pass": 2},
        "random": {"num_steps": 5},
        "confidence": {"num_steps": 6, "quotas": "cosine"},
        "margin": {"num_steps": 6, "order_temperature": 0.3},
        "entropy": {"num_steps": 6, "quotas": "timed", "is_tempered": True},
        "threshold": {"tau": 0.3},
        "factor": {"factor": 2.0},
        "entropy_bound": {"gamma": 1.0},
        "remdm": {"num_steps": 12, "eta": 0.1, "remasking": "rescale"},
        "path_planning": {"num_steps": 6},
        "self_speculative": {"num_states": 3},
    }.items()
]
"""One of each."""


def generate(config: GenerateConfig, weights: Path, tokenizer: Path, out: Path) -> list[dict[str, Any]]:
    """Samples of a run of the stage."""
    run_stage(STAGE, config, {"weights": weights, "tokenizer": tokenizer}, out)
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def of_kind(sampler: SamplerConfig, **changes: Any) -> GenerateConfig:
    """At a temperature that the kind takes."""
    return replace(SMALL, sampler=sampler, temperature=0.0 if sampler.kind == "self_speculative" else 0.9, **changes)


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


def test_samples_go_on_with_their_prompts_whatever_the_batch(weights: Path, made: Artifacts, tmp_path: Path) -> None:
    vocabulary, prompts = load_vocabulary(made.tokenizer), ("ba de", "", "ba " * 60)
    config = replace(SMALL, num_samples=2, length=10, prompts=prompts)
    lines = generate(config, weights, made.tokenizer, tmp_path / "a")
    assert [line["prompt"] for line in lines] == [prompt for prompt in prompts for _ in range(2)]
    for line in lines:
        ids = vocabulary.tokenizer.encode(line["prompt"], add_special_tokens=False).ids
        kept = ids[-22:]  # of rows of 32
        assert line["ids"][: len(kept)] == kept
        assert len(line["ids"]) == len(kept) + 10
        assert len(line["frames"]) == len(line["steps"])
    assert load_manifest(tmp_path / "a").stats["num_cut"] > 0
    generate(replace(config, batch_rows=1), weights, made.tokenizer, tmp_path / "b")
    assert sha256(tmp_path / "a" / "samples.jsonl") == sha256(tmp_path / "b" / "samples.jsonl")
    with pytest.raises(UserError, match=r"leaves nothing to draw of rows of 32; say how many .* \(length\)"):
        generate(replace(config, length=0), weights, made.tokenizer, tmp_path / "c")


@pytest.mark.parametrize("num_frames", [2, 6, 17])
def test_frames_lead_from_masks_to_the_pieces_of_the_text(
    weights: Path, made: Artifacts, tmp_path: Path, num_frames: int
) -> None:
    tokenizer = load_vocabulary(made.tokenizer).tokenizer
    for line in generate(replace(SMALL, num_frames=num_frames), weights, made.tokenizer, tmp_path / "out"):
        frames, steps = line["frames"], line["steps"]
        num_passes = line["nfe"]
        assert 9 < num_passes <= 16
        assert len(frames) == len(steps) == len(set(steps)) == min(num_frames, num_passes + 1)
        assert (steps[0], steps[-1], steps) == (0, num_passes, sorted(steps))
        assert frames[0] == [None] * 32
        assert frames[-1] == [tokenizer.decode([i], skip_special_tokens=False) for i in line["ids"]]
        for earlier, later in pairwise(frames):
            assert all(a is None or a == b for a, b in zip(earlier, later, strict=True))


@pytest.mark.parametrize("sampler", KINDS, ids=lambda sampler: sampler.kind)
def test_every_kind_of_sampler_fills_rows_by_itself_and_in_windows(
    sampler: SamplerConfig, weights: Path, made: Artifacts, tmp_path: Path
) -> None:
    mask = load_vocabulary(made.tokenizer).special.mask_token_id
    tries: dict[str, dict[str, Any]] = {"row": {}, "windows": {"block_size": 8}}
    if sampler.kind != "self_speculative":
        tries["cached"] = {"block_size": 8, "cache": "dual"}
        tries["exact"] = {"block_size": 8, "cache": "prefix", "refresh_every": 1}
    drawn_by = {
        name: generate(of_kind(sampler, **changes), weights, made.tokenizer, tmp_path / name)
        for name, changes in tries.items()
    }
    for lines in drawn_by.values():
        assert len(lines) == 3
        assert all(mask not in line["ids"] and line["nfe"] > 0 for line in lines)
    ids = {name: [line["ids"] for line in lines] for name, lines in drawn_by.items()}
    assert ids["windows"] == ids.get("exact", ids["windows"])
    assert (ids["row"] != ids["windows"]) == (sampler.kind != "self_speculative")  # the most likely of few steps' model


@pytest.mark.parametrize("sampler", [k for k in KINDS if "entropy" not in k.kind], ids=lambda sampler: sampler.kind)
def test_a_model_of_blocks_draws_the_same_with_and_without_its_cache(
    sampler: SamplerConfig, made: Artifacts, tmp_path: Path
) -> None:
    """By entropy all masks of a first block are equal, and rounding says which is first."""
    vocabulary = load_vocabulary(made.tokenizer)
    model = random_model(drawn(LLAMA), vocabulary.special.vocab_size, vocabulary.special.mask_token_id)
    weights = of_blocks(model, made, tmp_path / "weights")
    both = [
        generate(of_kind(sampler, cache=cache), weights, made.tokenizer, tmp_path / cache) for cache in ("auto", "none")
    ]
    assert [line["ids"] for line in both[0]] == [line["ids"] for line in both[1]]
    taken_in = 0 if sampler.kind == "self_speculative" else 32 // 8 - 1  # which has no use for the cache
    assert [line["nfe"] for line in both[0]] == [line["nfe"] + taken_in for line in both[1]]


def of_blocks(model: Denoiser, made: Artifacts, root: Path) -> Path:
    """Weights of a model that was trained on blocks of 8, with the tokenizer of ``made``."""
    own = load_manifest(made.tokenizer).fingerprint
    return save_model(root, model, objective="block_nelbo", block_size=8, tokenizer=own)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache": "dual"}, 'cache is "dual", an approximation for models of full attention'),
        ({"block_size": 4}, "block_size is 4, but the model was trained on blocks of 8; leave it 0"),
        ({"guidance": 0.5}, r"guidance is 0\.5, but the model is of blocks"),
    ],
)
def test_what_does_not_go_with_blocks_is_refused(
    changes: dict[str, Any], words: str, made: Artifacts, tmp_path: Path
) -> None:
    vocabulary = load_vocabulary(made.tokenizer)
    model = random_model(LLAMA, vocabulary.special.vocab_size, vocabulary.special.mask_token_id)
    with pytest.raises(UserError, match=words):
        generate(replace(SMALL, **changes), of_blocks(model, made, tmp_path / "w"), made.tokenizer, tmp_path / "out")


def test_a_sample_longer_than_the_rows_of_training_is_refused(weights: Path, made: Artifacts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"generate\.length is 33, the model was trained on rows of 32 tokens"):
        generate(GenerateConfig(length=33), weights, made.tokenizer, tmp_path / "out")


def test_samples_of_a_shifted_model_begin_with_the_end_of_a_document_and_are_read_one_place_before(
    weights: Path, made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    special = load_vocabulary(made.tokenizer).special
    record = replace(load_record(weights), target_offset=1)
    asked: list[torch.Tensor] = []

    class NextNumber(torch.nn.Module):
        """After token n comes n + 1; asked at the place of n, whatever stands behind it."""

        def forward(self, xt: torch.Tensor, select: torch.Tensor, mask: Any) -> torch.Tensor:
            asked.append(select)
            seen = xt.flatten()[select].clamp(max=special.vocab_size - 2)
            return 100.0 * torch.nn.functional.one_hot(seen + 1, special.vocab_size)

    monkeypatch.setattr("pipeline.inference.model.load_denoiser", lambda _: (NextNumber(), record))
    monkeypatch.setattr("pipeline.inference.model.load_record", lambda _: record)
    forget_models()
    config = GenerateConfig(num_samples=2, length=8, sampler=SamplerConfig(num_steps=1), num_frames=2, temperature=0.0)
    lines = generate(config, weights, made.tokenizer, tmp_path / "out")
    forget_models()
    for line in lines:
        assert line["ids"][0] == special.eos_token_id
        assert line["ids"][1] == special.eos_token_id + 1
        assert len(line["ids"]) == 1 + 8
    (places,) = asked
    assert sorted((places % 9).tolist()) == sorted([*range(8), *range(8)])


def test_the_room_of_a_shifted_model_is_a_token_less_than_its_rows(
    weights: Path, made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.inference.model.load_record", lambda path: replace(load_record(path), target_offset=1)
    )
    forget_models()
    for prompts in ((), ("ba de",)):
        lines = generate(replace(SMALL, length=0, prompts=prompts), weights, made.tokenizer, tmp_path / str(prompts))
        assert {len(line["ids"]) for line in lines} == {32}
        with pytest.raises(UserError, match=r"rows of 32 tokens, of which the first must be given; take at most 31"):
            generate(replace(SMALL, prompts=prompts), weights, made.tokenizer, tmp_path / "out")
    forget_models()


def test_the_tokenizer_of_another_run_is_refused(weights: Path, tmp_path: Path) -> None:
    other = make_artifacts(tmp_path, seed=1)
    with pytest.raises(UserError, match="is not that of the weights"):
        generate(SMALL, weights, other.tokenizer, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"length": -1}, "length is -1"),
        ({"block_size": -1}, "block_size is -1"),
        ({"refresh_every": -1}, "refresh_every is -1"),
        ({"refresh_every": 2}, 'refresh_every is 2, but cache is "auto"'),
        (
            {"sampler": SamplerConfig("remdm"), "cache": "dual", "refresh_every": 2},
            "refresh_every is 2, but the sampler remdm changes rows between their passes; take 0 or 1",
        ),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 0.9, "temperature": 0.0}, "change nothing at temperature 0"),
        ({"sampler": SamplerConfig("self_speculative")}, "takes the most likely tokens; set it to 0"),
        (
            {"sampler": SamplerConfig("self_speculative"), "temperature": 0.0, "cache": "dual"},
            'cache is "dual", which holds one state of a row',
        ),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"num_frames": 1}, "num_frames is 1"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"batch_rows": 0}, "batch_rows is 0"),
        ({"guidance": -1.0}, r"guidance is -1\.0"),
        ({"guidance": 1.0, "cache": "dual"}, r'guidance is 1\.0, but cache is "dual"'),
        ({"suppressed": (-1,)}, "suppressed has the id -1"),
        ({"suppresses_eos": True, "ends_at_eos": True}, "ends_at_eos is true, but suppresses_eos"),
        (
            {"suppresses_eos": True, "sampler": SamplerConfig("entropy", takes_eos_last=True)},
            r"sampler\.takes_eos_last is true, but suppresses_eos lets no end be drawn; leave one out",
        ),
    ],
)
def test_a_setting_out_of_range_names_the_field_and_the_value(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GenerateConfig(**change)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "llada"}, "kind is 'llada'; it must be one of ancestral, "),
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"kind": "first_hitting", "num_steps": 4}, "num_steps is 4, but kind 'first_hitting' has no use for it"),
        ({"kind": "first_hitting", "per_pass": 0}, "per_pass is 0"),
        ({"kind": "threshold", "tau": 1.5}, r"tau is 1.5; it must be in \[0, 1\]"),
        ({"kind": "factor", "factor": -1.0}, "factor is -1.0"),
        ({"kind": "entropy_bound", "gamma": -1.0}, "gamma is -1.0"),
        ({"kind": "remdm", "eta": 1.5}, r"eta is 1.5; it must be in \[0, 1\]"),
        ({"kind": "path_planning", "eta": -1.5}, "eta is -1.5; it must be at least 0"),
        ({"kind": "self_speculative", "num_states": 0}, "num_states is 0"),
        ({"kind": "entropy", "order_temperature": -0.5}, "order_temperature is -0.5"),
        ({"kind": "threshold", "look_every": 0}, "look_every is 0; it must be at least 1"),
        ({"kind": "confidence", "look_every": 2}, "look_every is 2, but kind 'confidence' has no use for it"),
        ({"kind": "random", "takes_eos_last": True}, "takes_eos_last is True, but kind 'random' has no use for it"),
    ],
)
def test_a_setting_of_a_sampler_that_is_out_of_range_or_idle_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplerConfig(**settings)


def test_every_setting_is_taken_by_some_kind_and_has_a_default() -> None:
    own = {field.name for field in fields(SamplerConfig)} - {"kind"}
    assert own == {name for names in TAKES.values() for name in names}
    for kind, names in TAKES.items():
        assert all(SamplerConfig(kind).value(name) is not None for name in names)


@pytest.mark.parametrize(
    ("remasking", "eta"), [("cap", 0.008), ("rescale", 0.015), ("loop", 0.02), ("confidence", 1.0)]
)
def test_remdm_remasks_as_published_unless_told(remasking: Any, eta: float) -> None:
    assert SamplerConfig("remdm", remasking=remasking).value("eta") == eta
    assert SamplerConfig("remdm", remasking=remasking, eta=0.5).value("eta") == 0.5
