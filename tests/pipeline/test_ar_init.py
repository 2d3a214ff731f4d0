"""Weights of a next-token model become those of a diffusion model: what stays is exact, what is new is told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlm_core.ar_init import shift_right
from dlm_core.models.attention import AttentionMask
from dlm_core.models.config import Architecture, ModelConfig, MoE
from dlm_core.models.transformer import Denoiser
from pipeline.ar_init.config import STAGE, ArInitConfig, check_upstream
from pipeline.artifact import load_manifest
from pipeline.config import from_json, to_json
from pipeline.errors import CorruptionError, UserError
from pipeline.tokenizer.config import STAGE as TOKENIZER
from pipeline.tokenizer.config import TokenizerConfig
from pipeline.weights import WEIGHTS_FILE, ModelRecord, Origin, load_denoiser, load_record
from tests.pipeline.conftest import make_artifact, python
from tests.support.ar_checkpoints import FAMILIES, IMPORTED, checkpoint, qwen_like, weights
from tests.support.tiny_run import forge

QWEN = qwen_like(["the token mask noise model reads", "data learns text 1 2 3 and writes in the model of noise"] * 20)
NUM_TOKENS, RARE = QWEN.get_vocab_size(), QWEN.get_vocab_size() - 3
"""The last token that was learned is part of no other."""
EXACT = 1e-12  # float64, sums in another order
ROUNDING = 1e-5
"""Relative to the largest logit: sums of float32 in another order, through two layers."""
HEAD_BIAS = replace(FAMILIES["llama"], head_bias=True)
SPARE: dict[str, tuple[int, dict[str, Any]]] = {
    "unused_row": (6, {}),
    "new_row": (0, {}),
    "rare_token": (0, {"mask_from": "rare_token", "rare_token_id": RARE}),
}
"""Rows beyond the tokens, and settings, by where the mask comes from."""


def chain(
    root: Path,
    mask_from: str = "unused_row",
    architecture: Architecture = FAMILIES["qwen2"],
    config: ArInitConfig = ArInitConfig(),  # noqa: B008 - frozen
) -> tuple[Path, Path]:
    """A checkpoint, and what the stages make of it."""
    spare, settings = SPARE[mask_from]
    source = checkpoint(root / "import", QWEN, NUM_TOKENS + spare, architecture, {"eos": NUM_TOKENS - 1})
    tokenizer = make_artifact(TOKENIZER, TokenizerConfig(**settings), {"checkpoint": source}, root / "tokenizer")
    return source, make_artifact(STAGE, config, {"weights": source, "tokenizer": tokenizer}, root / "init")


def tensors(artifact: Path) -> dict[str, Tensor]:
    return load_file(artifact / WEIGHTS_FILE)


def text(num_rows: int = 2, length: int = 9) -> Tensor:
    """Ids of tokens that stay."""
    return torch.randint(0, NUM_TOKENS - 3, (num_rows, length), generator=torch.Generator().manual_seed(1))


def logits(model: Denoiser, x: Tensor, mask: AttentionMask) -> Tensor:
    with torch.no_grad():
        return model(x, mask=mask, backend="dense").view(*x.shape, -1)


CAUSAL, FULL = AttentionMask("causal"), AttentionMask("full")
CLOSED = AttentionMask("annealed", ratio=0.0, noise_seed=3, step=0)


# Oracles of methods.md, section 15


@pytest.mark.parametrize("mask_row", ["mean", "keep"])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_causal_attention_with_a_masked_tail_it_is_the_next_token_model(
    tmp_path: Path, family: str, mask_row: Any
) -> None:
    source, made = chain(tmp_path, architecture=FAMILIES[family], config=ArInitConfig(mask_row))
    (before, _), (after, record) = load_denoiser(source), load_denoiser(made)
    mask_token_id, x0, bound = record.model.mask_token_id, text(), 0.0
    assert mask_token_id is not None
    assert mask_token_id == NUM_TOKENS
    if FAMILIES[family].moe is not None:  # how many tokens an expert has at once moves the last bit
        before, after, bound = before.double(), after.double(), EXACT
    wanted = logits(before, x0, CAUSAL)
    assert torch.isfinite(wanted).all()
    others = torch.arange(wanted.shape[2]) != mask_token_id
    for place in range(1, x0.shape[1]):
        xt = torch.where(torch.arange(x0.shape[1]) >= place, mask_token_id, x0)
        for attention in (CAUSAL, CLOSED):
            found = shift_right(logits(after, xt, attention))
            assert float((found[:, place] - wanted[:, place - 1])[:, others].abs().max()) <= bound
        opened = shift_right(logits(after, xt, FULL))
        assert float((opened[:, place] - wanted[:, place - 1])[:, others].abs().max()) > 1e-3


@pytest.mark.parametrize("mask_from", SPARE)
@pytest.mark.parametrize("architecture", [FAMILIES["qwen2"], FAMILIES["llama"], HEAD_BIAS])
def test_text_without_a_mask_gets_the_logits_that_it_had(
    tmp_path: Path, mask_from: str, architecture: Architecture
) -> None:
    source, made = chain(tmp_path, mask_from, architecture)
    (before, _), (after, record) = load_denoiser(source), load_denoiser(made)
    mask_token_id = record.model.mask_token_id
    assert mask_token_id == (RARE if mask_from == "rare_token" else NUM_TOKENS)
    assert record.model.vocab_size == NUM_TOKENS + {"unused_row": 6, "new_row": 1, "rare_token": 0}[mask_from]
    for attention in (CAUSAL, FULL):
        wanted, found = logits(before, text(), attention), logits(after, text(), attention)
        others = torch.arange(wanted.shape[2]) != mask_token_id
        bound = 0.0 if wanted.shape == found.shape else ROUNDING * float(wanted.abs().max())  # a wider product
        assert float((found[..., : wanted.shape[2]][..., others] - wanted[..., others]).abs().max()) <= bound
        assert (found[..., mask_token_id] == -torch.inf).all()


def test_a_later_token_changes_what_is_said_of_earlier_ones_under_full_attention_alone(tmp_path: Path) -> None:
    model, record = load_denoiser(chain(tmp_path)[1])
    others = torch.arange(record.model.vocab_size) != record.model.mask_token_id
    x = text()
    other = x.clone()
    other[:, -1] = (other[:, -1] + 1) % 100
    for attention, changes in ((CAUSAL, False), (CLOSED, False), (FULL, True)):
        a, b = (logits(model, ids, attention)[:, :-1, others] for ids in (x, other))
        assert (a != b).any(dim=-1).all() if changes else torch.equal(a, b)


# Rows


def rows_mean(table: Tensor, left_out: int | None = None) -> Tensor:
    kept = [row for place, row in enumerate(table.double()) if place != left_out]
    return (sum(kept[1:], kept[0]) / len(kept)).float()


@pytest.mark.parametrize("mask_from", SPARE)
@pytest.mark.parametrize("architecture", [FAMILIES["qwen2"], HEAD_BIAS])
def test_the_row_of_the_mask_is_the_mean_of_the_others_and_no_other_row_is_touched(
    tmp_path: Path, mask_from: str, architecture: Architecture
) -> None:
    source, made = chain(tmp_path, mask_from, architecture)
    before, after = tensors(source), tensors(made)
    mask_token_id = load_record(made).model.mask_token_id
    assert mask_token_id is not None
    tables = [name for name in before if name.startswith(("embedding", "head"))]
    assert len(tables) == (1 if architecture.tied_head else 3)
    assert after.keys() == before.keys()
    for name, old in before.items():
        if name not in tables:
            assert torch.equal(after[name], old), name
            continue
        assert len(after[name]) == max(len(old), mask_token_id + 1)
        others = torch.arange(len(old)) != mask_token_id
        assert torch.equal(after[name][: len(old)][others], old[others]), name
        wanted = rows_mean(old, mask_token_id)
        torch.testing.assert_close(after[name][mask_token_id], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mask_from", ["unused_row", "rare_token"])
def test_a_row_that_is_kept_is_kept_bit_for_bit(tmp_path: Path, mask_from: str) -> None:
    source, made = chain(tmp_path, mask_from, HEAD_BIAS, ArInitConfig(mask_row="keep"))
    before, after = tensors(source), tensors(made)
    assert all(torch.equal(after[name], old) for name, old in before.items())
    assert json.loads((made / "report.json").read_text())["made"] == {}


def test_report_and_lineage_tell_what_was_copied_and_made(tmp_path: Path) -> None:
    source, made = chain(tmp_path, "new_row", HEAD_BIAS)
    report, record = json.loads((made / "report.json").read_text()), load_record(made)
    how = f"the mean of {NUM_TOKENS} rows in row {NUM_TOKENS}"
    tables = ["embedding.weight", "head.weight", "head.bias"]
    assert report["made"] == dict.fromkeys(tables, how)
    assert sorted(report["copied"] + tables) == sorted(tensors(source))
    assert report["left_out"] == []
    assert record.lineage[0] == IMPORTED
    (initialised,) = record.lineage[1:]
    assert initialised.kind == "initialised"
    assert initialised.details["made"] == report["made"]
    assert initialised.details["mask_token_id"] == NUM_TOKENS
    manifest = load_manifest(made)
    assert record.tokenizer == manifest.inputs["tokenizer"]
    assert manifest.stats["architecture"] == to_json(HEAD_BIAS)
    assert manifest.stats["num_params"] == sum(tensor.numel() for tensor in tensors(made).values())
    assert record.objective == "autoregressive_nll"


def test_the_row_of_a_token_that_was_given_up_is_said_to_be_replaced(tmp_path: Path) -> None:
    _, made = chain(tmp_path, "rare_token")
    report = json.loads((made / "report.json").read_text())
    assert report["made"] == {"embedding.weight": f"the mean of {NUM_TOKENS - 1} rows in row {RARE}"}


# Upcycling

EXPERTS = MoE(4, 2, 48)
UPCYCLED = {
    "renormalised": EXPERTS,
    "softmax": replace(EXPERTS, renormalise=False),
    "sigmoid": replace(EXPERTS, renormalise=False, router_score="sigmoid", routed_scale=2.5),
    "groups": replace(EXPERTS, num_groups=2, routed_scale=0.5, selection_bias=True),
    "some layers": replace(EXPERTS, first_k_dense=1),
}


@pytest.mark.parametrize("kind", UPCYCLED)
def test_an_upcycled_model_is_the_dense_one_while_its_routers_are_even(tmp_path: Path, kind: str) -> None:
    moe = UPCYCLED[kind]
    source, made = chain(tmp_path, config=ArInitConfig("keep", upcycle=moe))
    (dense, _), (sparse, record) = load_denoiser(source), load_denoiser(made)
    assert record.model.architecture.moe == moe
    wanted = logits(dense, text(), FULL)
    others = torch.arange(wanted.shape[2]) != record.model.mask_token_id
    bound = ROUNDING * float(wanted.abs().max())

    def error() -> float:
        return float((logits(sparse, text(), FULL) - wanted)[..., others].abs().max())

    assert (error() <= bound) == moe.renormalise
    routers = [weight for name, weight in sparse.state_dict().items() if name.endswith("gate.weight")]
    assert len(routers) == 2 - moe.first_k_dense
    for router in routers:
        router.zero_()
    assert error() <= bound


def test_routers_are_drawn_from_the_seed_with_the_given_width_each_layer_its_own(tmp_path: Path) -> None:
    def routers(name: str, **settings: Any) -> list[Tensor]:
        made = chain(tmp_path / name, config=ArInitConfig(upcycle=EXPERTS, **settings))[1]
        return [tensors(made)[f"blocks.{layer}.feed_forward.gate.weight"] for layer in range(2)]

    first, again, other, wide = (
        routers("first"), routers("again"), routers("other", init_seed=1), routers("wide", router_std=0.5),
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])
    for a, b in zip(first, wide, strict=True):
        torch.testing.assert_close(25.0 * a, b)
        assert abs(float(a.std()) / 0.02 - 1) < 0.25  # 128 draws: four standard errors


def test_experts_are_copies_and_the_dense_networks_are_left_out_by_name(tmp_path: Path) -> None:
    source, made = chain(tmp_path, config=ArInitConfig(upcycle=UPCYCLED["sigmoid"]))
    before, after = tensors(source), tensors(made)
    for layer in range(2):
        prefix = f"blocks.{layer}.feed_forward."
        for expert in range(4):
            assert torch.equal(after[prefix + "experts.gate_up_proj"][expert], before[prefix + "gate_up.weight"])
            down = before[prefix + "down.weight"] / 2.5  # top_k 2 of sigmoids of 0, times 2.5
            torch.testing.assert_close(after[prefix + "experts.down_proj"][expert], down)
    report = json.loads((made / "report.json").read_text())
    assert report["left_out"] == sorted(name for name in before if "feed_forward." in name)
    assert "4 copies of blocks.0.feed_forward.down.weight times 0.4" in report["made"].values()
    shapes = {name: tensor.shape for name, tensor in Denoiser(load_record(made).model).state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in after.items()}


def test_the_stage_does_not_import_torch() -> None:
    done = python("-c", "import sys, pipeline.ar_init.run; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


# Bad input


def initialised(root: Path, source: Path, tokenizer: Path, **settings: Any) -> Path:
    return make_artifact(STAGE, ArInitConfig(**settings), {"weights": source, "tokenizer": tokenizer}, root / "made")


def test_a_new_row_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf'ar_init\.mask_row is keep, .* {NUM_TOKENS} is a new row.*mask_row="mean"'):
        chain(tmp_path, "new_row", config=ArInitConfig("keep"))


def test_that_is_refused_when_a_workflow_is_planned() -> None:
    for mask_row, mask_from in (("mean", "new_row"), ("keep", "auto"), ("keep", "unused_row")):
        check_upstream(ArInitConfig(mask_row), {"tokenizer": {"mask_from": mask_from}}, "init")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r'init\.mask_row is keep, but tokenizer\.mask_from is "new_row"'):
        check_upstream(ArInitConfig("keep"), {"tokenizer": {"mask_from": "new_row"}}, "init")


def test_the_tokenizer_of_other_weights_is_refused(tmp_path: Path) -> None:
    source, _ = chain(tmp_path / "a")
    other = checkpoint(tmp_path / "b" / "import", QWEN, NUM_TOKENS + 6, special_ids={"eos": 1}, seed=1)
    made_of_other = make_artifact(TOKENIZER, TokenizerConfig(eos_token="<|endoftext|>"), {"checkpoint": other},
                                  tmp_path / "b" / "tokenizer")  # fmt: skip
    with pytest.raises(UserError, match=r"is not that of the weights in .*: its ids mean other tokens\. Give the one"):
        initialised(tmp_path, source, made_of_other)


def test_a_tokenizer_smaller_than_the_table_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    own = load_manifest(tokenizer).fingerprint
    record = ModelRecord(ModelConfig(FAMILIES["qwen2"], 310, 0), 32, "masked_nelbo", tokenizer=own)
    source = weights(tmp_path / "weights", record)
    with pytest.raises(UserError, match=r"wants 300 rows, the weights in .* have 310; no row is taken away\. Give"):
        initialised(tmp_path, source, tokenizer)


def test_trained_weights_are_taken_with_the_tokenizer_that_they_were_trained_with(
    tmp_path: Path, tokenizer: Path
) -> None:
    own, lineage = load_manifest(tokenizer).fingerprint, [IMPORTED, Origin("trained", {"steps": 3})]
    record = ModelRecord(ModelConfig(FAMILIES["qwen2"], 300, 0), 32, "masked_nelbo", tokenizer=own, lineage=lineage)
    source = weights(tmp_path / "weights", record)
    made = initialised(tmp_path, source, tokenizer, mask_row="keep", upcycle=EXPERTS)
    assert load_record(made).lineage[:2] == lineage
    assert torch.equal(tensors(made)["embedding.weight"], tensors(source)["embedding.weight"])


def test_the_row_of_a_mask_that_was_trained_is_not_replaced(tmp_path: Path, tokenizer: Path) -> None:
    own = load_manifest(tokenizer).fingerprint
    record = ModelRecord(ModelConfig(FAMILIES["qwen2"], 300, 0), 32, "masked_nelbo", tokenizer=own)
    with pytest.raises(
        UserError, match=r'mask_row is mean, .* trained as masked_nelbo .* Set ar_init\.mask_row="keep"'
    ):
        initialised(tmp_path / "a", weights(tmp_path / "diffusion", record), tokenizer)
    record = replace(record, objective="autoregressive_nll")
    source = weights(tmp_path / "next", record)
    made = initialised(tmp_path / "b", source, tokenizer)
    assert not torch.equal(tensors(made)["embedding.weight"][0], tensors(source)["embedding.weight"][0])


@pytest.mark.parametrize(
    ("family", "moe", "words"),
    [
        ("qwen2", replace(EXPERTS, d_ff_expert=24), r"moe\.d_ff_expert is 24; .* as wide as it: 48"),
        ("qwen2", replace(EXPERTS, num_shared_experts=1), r"moe\.num_shared_experts is 1; .* so 0"),
        ("qwen2", replace(EXPERTS, first_k_dense=2), r"moe\.first_k_dense is 2"),
        ("qwen3_moe", replace(EXPERTS, d_ff_expert=16), "the model has experts already"),
    ],
)
def test_experts_that_cannot_be_copies_are_refused(tmp_path: Path, family: str, moe: MoE, words: str) -> None:
    with pytest.raises(UserError, match=r"ar_init\.upcycle does not fit the weights in .*: .*" + words):
        chain(tmp_path, architecture=FAMILIES[family], config=ArInitConfig(upcycle=moe))


def test_a_network_without_gates_cannot_be_upcycled(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r'ar_init\.upcycle does not fit .*: activation is "gelu"; experts are "swiglu"'
    ):
        chain(
            tmp_path, architecture=replace(FAMILIES["llama"], activation="gelu"), config=ArInitConfig(upcycle=EXPERTS)
        )


def test_weights_that_do_not_fit_their_record_are_refused_by_every_name(tmp_path: Path) -> None:
    source, _ = chain(tmp_path)
    given = tensors(source)
    del given["norm.weight"]
    given["blocks.0.extra"] = torch.zeros(1)
    given["embedding.weight"] = torch.zeros(3, 32)
    save_file(given, source / WEIGHTS_FILE)
    forge(source, WEIGHTS_FILE)
    with pytest.raises(
        CorruptionError, match=r"norm\.weight is missing; blocks\.0\.extra is unknown; embedding\.weight"
    ):
        initialised(tmp_path, source, tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_row": "zero"}, "mask_row"),
        ({"router_std": 0.5}, r"router_std is 0\.5, but nothing is drawn without upcycle; leave it out"),
        ({"init_seed": 3}, "init_seed is 3, but nothing is drawn"),
        ({"upcycle": {"num_experts": 4, "top_k": 2, "d_ff_expert": 8}, "router_std": 0.0}, "router_std is 0"),
        ({"upcycle": {"num_experts": 4, "top_k": 2, "d_ff_expert": 8}, "init_seed": -1}, "init_seed is -1"),
        ({"upcycle": {"num_experts": 4, "top_k": 5, "d_ff_expert": 8}}, r"moe\.top_k is 5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_json(ArInitConfig, settings, "ar_init")


def test_the_mean_of_many_rows_is_that_of_all_of_them(tmp_path: Path) -> None:
    from pipeline.ar_init.run import _mean

    table = np.random.default_rng(0).standard_normal((10_000, 3)).astype(np.float32)
    rows = np.delete(np.arange(len(table)), 4096)
    np.testing.assert_array_equal(_mean(table, rows), table[rows].astype(np.float64).mean(axis=0).astype(np.float32))
