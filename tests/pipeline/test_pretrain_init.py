"""Trainings that begin with given weights, and what eases them into diffusion: against sums made by hand."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dlm_core.masks import annealed, dense_mask
from dlm_core.models.attention import AttentionMask
from dlm_core.models.config import ModelConfig, MoE
from dlm_core.models.transformer import Denoiser
from pipeline.artifact import load_manifest
from pipeline.config import from_json, to_json
from pipeline.data.rows import open_rows
from pipeline.data.special_tokens import load_special_tokens
from pipeline.errors import CorruptionError, UserError
from pipeline.pretrain.adaptation import AdaptationConfig
from pipeline.pretrain.batches import PhasedLoader, micro_batches, step_kind
from pipeline.pretrain.config import STAGE, PretrainConfig, check_init
from pipeline.pretrain.given import check_same_architecture
from pipeline.pretrain.initial import first_loss_warning, first_model, initial_record
from pipeline.pretrain.lr_schedule import LRSchedule
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.pretrain.optimizer_config import LRScale
from pipeline.weights import WEIGHTS_FILE, ModelRecord, Origin, load_record
from tests.pipeline.conftest import flip_bit
from tests.support import ar_checkpoints
from tests.support.ar_checkpoints import IMPORTED, drawn
from tests.support.reference import hash_words
from tests.support.resuming import differences, kill_paused
from tests.support.tiny_run import TINY, Artifacts, convert, metrics, run_gang, start_gang, tiny

pytestmark = pytest.mark.timeout(120)

SHIFTED = ObjectiveConfig(t_min=1e-3, target_offset=1)
EASED = AdaptationConfig(anneal_steps=4, mask_noise_std=0.5, mask_noise_steps=3)
FROZEN = replace(TINY.optimizer, lr=1e-30, lr_schedule=LRSchedule("constant"), weight_decay=0.0)
"""Updates that no float32 weight shows."""
BY_HAND = 1e-5
"""Relative: another implementation in float32."""
SPREAD = 1e-4
"""Bar for other orders of float32 sums over some steps, as for trainings from scratch."""
LINEAGE = [IMPORTED, Origin("initialised", {"mask_token_id": 0})]


def record_of(made: Artifacts, **changes: Any) -> ModelRecord:
    """Of weights that TINY can begin with."""
    special = load_special_tokens(made.tokenizer)
    model = ModelConfig(TINY.architecture, special.vocab_size, special.mask_token_id)
    own = load_manifest(made.tokenizer).fingerprint
    record = ModelRecord(model, 32, "autoregressive_nll", tokenizer=own, lineage=LINEAGE)
    return replace(record, **changes)


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory, made: Artifacts) -> Path:
    return ar_checkpoints.weights(tmp_path_factory.mktemp("init") / "init", record_of(made))


def inputs(made: Artifacts, init: Path) -> dict[str, Path]:
    return {**made.inputs(), "init": init}


def train(config: PretrainConfig, made: Artifacts, init: Path, out: Path) -> Path:
    return run_gang(STAGE, config, inputs(made, init), out, workers=config.workers)


def given_model(made: Artifacts, init: Path) -> Denoiser:
    model = Denoiser(record_of(made).model)
    model.load_state_dict(load_file(init / WEIGHTS_FILE))
    return model


# The first steps


def naive_noise(step: int, row: int, place: int, d_model: int, noise_seed: int) -> torch.Tensor:
    """Box and Muller over the hash of (seed, stream 9, step, sample id, position), then channel and word."""
    token = hash_words(noise_seed, 9, step, row, place)
    found = []
    for channel in range(d_model):
        u, v = ((hash_words(token, channel, word) >> 11) / 2**53 for word in (0, 1))
        found.append(math.sqrt(-2 * math.log1p(-u)) * math.cos(2 * math.pi * v))
    return torch.tensor(found)


def loss_by_hand(config: PretrainConfig, made: Artifacts, model: Denoiser, step: int) -> float:
    """Nats a token of a step of shifted diffusion, annealed and noised, with the weights of ``model``."""
    special = load_special_tokens(made.tokenizer)
    rows = PhasedLoader(config, open_rows(made.rows), special.pad_token_id).rank_rows(step, 0)
    (batch,) = micro_batches(config, rows, special, step, rank=0)
    x0, is_masked = torch.from_numpy(rows.x0), batch.xt == special.mask_token_id
    std = 0.5 * (1 - step / 3) if step < 3 else 0.0
    noise = torch.zeros(*x0.shape, 32)
    for row, place in is_masked.nonzero().tolist() if std else []:
        noise[row, place] = std * naive_noise(step, step * 8 + row, place, 32, config.noise_seed)
    hook = model.embedding.register_forward_hook(lambda *passed: passed[2] + noise)
    ratio = (step + 1) / 4
    mask = AttentionMask("full")
    if ratio < 1:
        mask = AttentionMask("annealed", ratio=ratio, noise_seed=config.noise_seed, step=step)
    with torch.no_grad():
        logits = model(batch.xt, mask=mask).view(*x0.shape, -1)
    hook.remove()
    cross_entropy = F.cross_entropy(logits[:, :-1].transpose(1, 2), x0[:, 1:], reduction="none")
    weighted = cross_entropy * is_masked[:, 1:] / batch.t[:, 1:].float()
    assert not is_masked[:, 0].any()
    return float(weighted.sum() / batch.is_text[:, 1:].sum())


@pytest.fixture(scope="module")
def eased(tmp_path_factory: pytest.TempPathFactory, made: Artifacts, init: Path) -> Path:
    """A training of six steps that changes no weight."""
    config = tiny(num_steps=6, objective=SHIFTED, adaptation=EASED, optimizer=FROZEN, noise_seed=7)
    return train(config, made, init, tmp_path_factory.mktemp("eased") / "out")


def test_losses_are_those_of_the_given_weights_under_the_attention_and_noise_of_each_step(
    made: Artifacts, init: Path, eased: Path
) -> None:
    config, model = tiny(num_steps=6, objective=SHIFTED, adaptation=EASED, noise_seed=7), given_model(made, init)
    wanted = [loss_by_hand(config, made, model, step) for step in range(6)]
    assert [line["loss"] for line in metrics(eased)] == pytest.approx(wanted, rel=BY_HAND)
    plain = replace(config, adaptation=AdaptationConfig())
    special = load_special_tokens(made.tokenizer)
    loader = PhasedLoader(plain, open_rows(made.rows), special.pad_token_id)
    for step, loss in enumerate(wanted):
        (batch,) = micro_batches(plain, loader.rank_rows(step, 0), special, step, rank=0)
        (eased_batch,) = micro_batches(config, loader.rank_rows(step, 0), special, step, rank=0)
        assert torch.equal(batch.xt, eased_batch.xt)
        with torch.no_grad():
            (columns, named), tokens = batch.arguments("cpu"), batch.targets.num_tokens
            differs = abs(float(model(*columns, **named).loss_sum / tokens) / loss - 1) > 100 * BY_HAND
        assert differs == (step < 3), "the aids of a step make no difference, or go on after their last"


def test_first_loss_is_that_of_the_given_weights_and_not_of_drawn_ones(
    made: Artifacts, init: Path, alone: Path, tmp_path: Path
) -> None:
    out = train(tiny(num_steps=2), made, init, tmp_path / "out")
    model, special = given_model(made, init), load_special_tokens(made.tokenizer)
    rows = PhasedLoader(TINY, open_rows(made.rows), special.pad_token_id).rank_rows(0, 0)
    (batch,) = micro_batches(TINY, rows, special, 0, rank=0)
    with torch.no_grad():
        logits = model(batch.xt).view(*batch.xt.shape, -1)
    cross_entropy = F.cross_entropy(logits.transpose(1, 2), torch.from_numpy(rows.x0), reduction="none")
    is_masked = (batch.xt == special.mask_token_id).float()
    wanted = float((cross_entropy * is_masked / batch.t.float()).sum() / batch.is_text.sum())
    found = metrics(out)[0]["loss"]
    assert found == pytest.approx(wanted, rel=BY_HAND)
    assert abs(found / metrics(alone)[0]["loss"] - 1) > 0.05


@pytest.mark.parametrize(("anneal_steps", "num_closed"), [(0, 0), (1, 0), (2, 1), (4, 3)])
def test_attention_of_a_step_is_the_annealed_mask_of_that_step(
    made: Artifacts, anneal_steps: int, num_closed: int
) -> None:
    config = tiny(objective=SHIFTED, adaptation=AdaptationConfig(anneal_steps=anneal_steps), noise_seed=11)
    special = load_special_tokens(made.tokenizer)
    loader = PhasedLoader(config, open_rows(made.rows), special.pad_token_id)
    for step in range(6):
        (batch,) = micro_batches(config, loader.rank_rows(step, 0), special, step, rank=0)
        found, kind = batch.mask, step_kind(config, 32, step)[0]
        if step >= num_closed:
            assert (found.family, found.doc_ids is None, kind) == ("full", batch.is_text.all().item(), "all")
            continue
        ratio = (step + 1) / anneal_steps
        table = dense_mask(found.predicate(32), 1, 32)
        assert torch.equal(table, dense_mask(annealed(ratio, 11, step), 1, 32))
        assert table.sum() < 32 * 32
        assert (found.family, kind) == ("annealed", "all, annealing")


def test_annealed_attention_stays_within_documents_where_that_is_wanted(made: Artifacts) -> None:
    objective = replace(SHIFTED, within_documents=True)
    config = tiny(objective=objective, adaptation=AdaptationConfig(anneal_steps=20))
    special = load_special_tokens(made.tokenizer)
    loader, num_apart = PhasedLoader(config, open_rows(made.rows), special.pad_token_id), 0
    for step in range(10):
        rows = loader.rank_rows(step, 0)
        (batch,) = micro_batches(config, rows, special, step, rank=0)
        ids = torch.from_numpy(rows.doc_ids)
        apart = ids[:, :, None] != ids[:, None, :]
        num_apart += int(apart.sum())
        table = dense_mask(batch.mask.predicate(32), 8, 32)
        assert torch.equal(table, dense_mask(annealed((step + 1) / 20, 0, step), 8, 32) & ~apart)
    assert num_apart > 0


def test_noise_is_on_the_masks_of_the_first_steps_alone(made: Artifacts) -> None:
    config = tiny(adaptation=AdaptationConfig(mask_noise_std=0.5, mask_noise_steps=3), micro_batch_seqs=2)
    special = load_special_tokens(made.tokenizer)
    loader = PhasedLoader(config, open_rows(made.rows), special.pad_token_id)
    for step in range(5):
        for number, batch in enumerate(micro_batches(config, loader.rank_rows(step, 0), special, step, rank=0)):
            if step >= 3:
                assert batch.perturb is None
                continue
            assert batch.perturb is not None
            noised = batch.perturb(torch.zeros(2, 32, 4))
            is_masked = batch.xt == special.mask_token_id
            assert torch.equal((noised != 0).any(dim=-1), is_masked)
            row, place = is_masked.nonzero()[0].tolist()
            wanted = 0.5 * (1 - step / 3) * naive_noise(step, step * 8 + 2 * number + row, place, 4, 0)
            torch.testing.assert_close(noised[row, place], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
def test_aids_do_not_depend_on_how_the_work_is_spread(made: Artifacts, init: Path, tmp_path: Path) -> None:
    config = tiny(num_steps=5, objective=SHIFTED, adaptation=EASED)
    one = metrics(train(config, made, init, tmp_path / "one"))
    spread = replace(config, workers=2, micro_batch_seqs=2, zero_stage=3, activation_checkpointing=True)
    two = metrics(train(spread, made, init, tmp_path / "two"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], abs=SPREAD)
    assert len({line["loss"] for line in one}) == 5


SPARSE = replace(TINY.architecture, d_ff=None, moe=MoE(4, 2, 16, selection_bias=True))


@pytest.fixture(scope="module")
def sparse_init(tmp_path_factory: pytest.TempPathFactory, made: Artifacts) -> Path:
    record = record_of(made)
    record = replace(record, model=replace(record.model, architecture=SPARSE))
    return ar_checkpoints.weights(tmp_path_factory.mktemp("sparse") / "init", record)


def test_a_model_has_the_given_weights_and_is_to_be_trained(sparse_init: Path) -> None:
    record = load_record(sparse_init)
    model = first_model(record.model, {"init": sparse_init}, tiny(architecture=SPARSE))
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, drawn(record.model)[name]), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("precision", "zero_stage", "workers", "ep_size"),
    [
        ("bf16", 2, 2, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("fp32", 0, 1, 0), ("bf16", 0, 1, 0))),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("bf16", 1, 2, 0), ("bf16", 3, 2, 0))),
    ],
)
def test_a_training_begins_with_every_digit_of_the_given_weights(
    made: Artifacts, sparse_init: Path, tmp_path: Path, precision: Any, zero_stage: Any, workers: int, ep_size: int
) -> None:
    config = tiny(
        architecture=SPARSE, num_steps=1, optimizer=replace(FROZEN, ema_decay=0.9), precision=precision,
        zero_stage=zero_stage, workers=workers, ep_size=ep_size,
    )  # fmt: skip
    out, wanted = train(config, made, sparse_init, tmp_path / "out"), load_file(sparse_init / WEIGHTS_FILE)
    for kind in ("last", "ema"):
        found = load_file(convert(out, tmp_path / kind, kind) / WEIGHTS_FILE)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), (kind, name)


# The row of the mask


@pytest.mark.parametrize(("scale", "precision"), [(0.0, "fp32"), (0.0, "bf16"), (1.0, "fp32")])
def test_a_frozen_row_of_the_mask_stays_bit_for_bit_and_no_other(
    made: Artifacts, init: Path, tmp_path: Path, scale: float, precision: Any
) -> None:
    optimizer = replace(TINY.optimizer, lr_scale=LRScale(mask_embedding=scale))
    config = tiny(num_steps=4, optimizer=optimizer, objective=SHIFTED, adaptation=EASED, precision=precision)
    out = train(config, made, init, tmp_path / "out")
    before = load_file(init / WEIGHTS_FILE)["embedding.weight"]
    after = load_file(convert(out, tmp_path / "weights") / WEIGHTS_FILE)["embedding.weight"]
    stayed = (before.view(torch.int32) == after.view(torch.int32)).all(dim=1)
    mask = load_special_tokens(made.tokenizer).mask_token_id
    assert stayed.nonzero().flatten().tolist() == ([mask] if scale == 0.0 else [])


# Going on


def test_a_resume_goes_on_from_its_checkpoint_and_not_from_the_given_weights(
    made: Artifacts, init: Path, tmp_path: Path
) -> None:
    config = tiny(num_steps=8, objective=SHIFTED, adaptation=replace(EASED, anneal_steps=8, mask_noise_steps=7))
    straight = train(config, made, init, tmp_path / "straight")
    gang = start_gang(STAGE, config, inputs(made, init), tmp_path / "out", fault="pause_at_step", step=6)
    kill_paused(gang, 6)
    again = start_gang(STAGE, config, inputs(made, init), tmp_path / "out")
    assert again.wait() == [0], again.log()
    assert "continuing from checkpoint step-00000004: 4 of 8" in again.log()
    assert "the first loss is" not in again.log()
    assert differences(config, tmp_path / "out", straight) == []


def test_a_resume_with_other_given_weights_is_refused(made: Artifacts, init: Path, tmp_path: Path) -> None:
    config = tiny(num_steps=8)
    gang = start_gang(STAGE, config, inputs(made, init), tmp_path / "out", fault="pause_at_step", step=6)
    kill_paused(gang, 6)
    other = ar_checkpoints.weights(tmp_path / "other", record_of(made), seed=1)
    for given in (inputs(made, other), made.inputs()):
        again = start_gang(STAGE, config, given, tmp_path / "out")
        assert again.wait() == [2]
        assert "inputs.init" in again.log()


def test_lineage_gets_through_to_the_stats_and_the_weights(made: Artifacts, eased: Path, tmp_path: Path) -> None:
    assert load_manifest(eased).stats["lineage"] == to_json(LINEAGE)
    record = load_record(convert(eased, tmp_path / "weights"))
    assert record.lineage[:2] == LINEAGE
    assert [origin.kind for origin in record.lineage] == ["imported", "initialised", "trained"]
    assert record.target_offset == 1


def test_a_training_from_scratch_has_no_lineage(alone: Path) -> None:
    assert load_manifest(alone).stats["lineage"] == []


# A first loss that is odd


def sums(loss: float, num_masked: float) -> torch.Tensor:
    return torch.tensor([0.25 * loss * num_masked, 0.75 * loss * num_masked, 0.25 * num_masked, 0.75 * num_masked])


def test_a_first_loss_worse_than_knowing_nothing_is_told_and_nothing_else() -> None:
    model = ModelConfig(TINY.architecture, 300, 299)
    nothing = math.log(300)
    for loss, is_told in ((nothing - 0.01, False), (0.0, False), (nothing + 0.01, True), (30.0, True)):
        words = first_loss_warning(model, sums(loss, 400))
        assert bool(words) == is_told
        if is_told:
            assert words.startswith(f"the first loss is {loss:.2f} nats a masked token")
            assert "log(vocab_size) = 5.70" in words
            assert "objective.target_offset" in words
    assert first_loss_warning(model, sums(0.0, 0)) == ""


def test_the_log_tells_of_it_once(made: Artifacts, init: Path, tmp_path: Path) -> None:
    gang = start_gang(STAGE, tiny(num_steps=2), inputs(made, init), tmp_path / "out")
    assert gang.wait() == [0], gang.log()
    assert metrics(tmp_path / "out")[0]["loss"] > math.log(300)
    assert gang.log().count("the first loss is") == 1


# Bad input


def checked(made: Artifacts, record: ModelRecord, root: Path, **settings: Any) -> ModelRecord | None:
    """What a training says of weights with this record."""
    init = ar_checkpoints.weights(root / "init", record)
    return initial_record(tiny(**settings), inputs(made, init), load_special_tokens(made.tokenizer))


def test_weights_of_another_architecture_are_refused_by_every_field_that_differs(
    made: Artifacts, tmp_path: Path
) -> None:
    architecture = replace(TINY.architecture, num_heads=4, d_ff=32, init_std=0.7)
    record = record_of(made)
    record = replace(record, model=replace(record.model, architecture=architecture))
    with pytest.raises(UserError) as caught:
        checked(made, record, tmp_path)
    told = str(caught.value)
    assert "d_ff is 32 there and 64 here; head_dim is 8 there and 16 here" in told
    assert "num_heads is 4 there and 2 here" in told
    assert "pretrain.architecture is not that of the weights in" in told
    assert "init_std" not in told.partition(". Set it to theirs: ")[0]


def test_an_architecture_spelled_otherwise_is_the_same(made: Artifacts, tmp_path: Path) -> None:
    a = TINY.architecture
    check_same_architecture(a, replace(a, head_dim=16, num_kv_heads=2, init="small", init_std=None), "x")
    with pytest.raises(UserError, match=r"num_kv_heads is 1 there and 2 here"):
        check_same_architecture(a, replace(a, num_kv_heads=1), "x")
    with pytest.raises(UserError, match=r"moe\.num_experts is 4 there and None here"):
        check_same_architecture(a, replace(a, d_ff=None, moe=MoE(4, 2, 16)), "x")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": "0" * 64}, "is not that of the weights in .*: its ids mean other tokens"),
        ({"tokenizer": ""}, "is not that of the weights in .*: its ids mean other tokens"),
        ({"vocab_size": 310}, r"vocab_size of the weights in .* is 310, that of the tokenizer .* is 300; fit the"),
        (
            {"mask_token_id": 299},
            r"mask_token_id of the weights in .* is 299, that of .* is 0; fit .*pipeline\.ar_init",
        ),
        ({"mask_token_id": None}, r"mask_token_id of the weights in .* is None, that of .* is 0; fit the weights"),
    ],
)
def test_weights_of_another_vocabulary_are_refused(
    made: Artifacts, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    record = record_of(made)
    of_model = {name: value for name, value in changes.items() if name != "tokenizer"}
    record = replace(
        record, model=replace(record.model, **of_model), tokenizer=changes.get("tokenizer", record.tokenizer)
    )
    with pytest.raises(UserError, match=words):
        checked(made, record, tmp_path)


def test_weights_that_fit_are_let_through_with_what_is_known_of_them(made: Artifacts, tmp_path: Path) -> None:
    assert checked(made, record_of(made), tmp_path) == record_of(made)
    assert initial_record(TINY, made.inputs(), load_special_tokens(made.tokenizer)) is None


def test_a_refusal_ends_the_stage_with_exit_code_2(made: Artifacts, init: Path, tmp_path: Path) -> None:
    gang = start_gang(STAGE, tiny(init_seed=3), inputs(made, init), tmp_path / "out")
    assert gang.wait() == [2]
    assert "pretrain.init_seed is 3, but the weights come from the input init: nothing is drawn" in gang.log()


def test_a_seed_beside_given_weights_is_refused_when_a_workflow_is_planned() -> None:
    with pytest.raises(UserError, match=r"warm\.init_seed is 3, .*Leave it out"):
        check_init(tiny(init_seed=3), {"init": {}}, "warm")
    check_init(tiny(init_seed=3), {}, "warm")
    check_init(tiny(init_seed=0), {"init": {}}, "warm")


def test_damaged_weights_are_refused(made: Artifacts, init: Path, tmp_path: Path) -> None:
    copy = tmp_path / "init"
    shutil.copytree(init, copy)
    flip_bit(copy / WEIGHTS_FILE)
    with pytest.raises(CorruptionError, match=r"model\.safetensors"):
        first_model(record_of(made).model, {"init": copy}, TINY)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adaptation": {"anneal_steps": -1}}, "anneal_steps is -1"),
        ({"adaptation": {"mask_noise_std": -0.5, "mask_noise_steps": 3}}, r"mask_noise_std is -0\.5"),
        ({"adaptation": {"mask_noise_std": 0.5}}, r"mask_noise_std is 0\.5 and mask_noise_steps 0; noise needs both"),
        ({"adaptation": {"mask_noise_steps": 3}}, r"mask_noise_std is 0\.0 and mask_noise_steps 3"),
        (
            {"adaptation": {"anneal_steps": 3}, "objective": {"block_size": 4}},
            r"adaptation\.anneal_steps is 3 .*blocks",
        ),
        (
            {"adaptation": {"anneal_steps": 3}, "objective": {"kind": "autoregressive"}},
            "adaptation is set, but objective",
        ),
    ],
)
def test_aids_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_json(PretrainConfig, settings, "pretrain")
