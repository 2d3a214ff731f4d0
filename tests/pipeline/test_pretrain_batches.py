"""A step's batch is a function of the step alone: ranks and micro batches only cut it up."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dlm_core import noise
from pipeline.data.rows import PackedRows, open_rows
from pipeline.data.special_tokens import SpecialTokens
from pipeline.data.vocabulary import load_vocabulary
from pipeline.errors import CorruptionError
from pipeline.pretrain.batches import (
    PhasedLoader,
    Rows,
    diffusion_batch,
    is_short,
    micro_batches,
    step_length,
    step_rows,
    step_strata,
)
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.pretrain.phases import Phase
from tests.support.tiny_run import Artifacts, tiny


@pytest.fixture(scope="module")
def rows(made: Artifacts) -> PackedRows:
    """Rows of the training split."""
    return open_rows(made.rows)


@pytest.fixture(scope="module")
def special(made: Artifacts) -> SpecialTokens:
    """Special ids of the tiny tokenizer."""
    return load_vocabulary(made.tokenizer).special


def whole(config: PretrainConfig, rows: PackedRows, special: SpecialTokens, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of the global batch, put together from all ranks and micro batches."""
    loader = PhasedLoader(config, rows, special.pad_token_id)
    drawn = [(rank, loader.rank_rows(step, rank)) for rank in range(config.workers)]
    parts = [batch for rank, own in drawn for batch in micro_batches(config, own, special, step, rank)]
    assert len(parts) == config.workers * config.grad_accum_steps
    assert len({len(part.xt) for part in parts}) == 1
    found = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("xt", "t", "is_text")}
    found["x0"] = torch.cat([step_rows(config, own, step).x0 for _, own in drawn])
    for name in ("targets", "weight", "nelbo_weight"):
        columns = [getattr(part.targets, name) for part in parts]
        if columns[0] is not None:
            found[name] = torch.cat(columns)
    starts = [number * part.xt.numel() for number, part in enumerate(parts)]
    found["select"] = torch.cat([part.targets.select + start for start, part in zip(starts, parts, strict=True)])
    found["num_tokens"] = torch.stack([part.targets.num_tokens for part in parts]).sum()
    if parts[0].x0 is not None:
        assert torch.equal(torch.cat([part.x0 for part in parts if part.x0 is not None]), found["x0"])
    return found


@pytest.mark.parametrize(("workers", "micro"), [(2, 0), (2, 2), (4, 1), (8, 0), (1, 2)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": ObjectiveConfig(block_size=4)},
        {"objective": ObjectiveConfig(masking="exact_count", block_size=8)},
        {"objective": ObjectiveConfig(kind="autoregressive")},
        {"phases": {"short": Phase(seq_len=8, block_size=2), "long": Phase()}},
    ],
)
@pytest.mark.parametrize("step", [0, 7])
def test_global_batch_is_the_same_however_it_is_cut(
    rows: PackedRows, special: SpecialTokens, step: int, workers: int, micro: int, changes: dict[str, Any]
) -> None:
    wanted = whole(tiny(**changes), rows, special, step)
    found = whole(tiny(workers=workers, micro_batch_seqs=micro, **changes), rows, special, step)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("objective", "wanted"),
    [
        (ObjectiveConfig(), [8]),
        (ObjectiveConfig(block_size=4), [64]),
        (ObjectiveConfig(masking="exact_count", block_size=8), [32]),
        (ObjectiveConfig(weighting="inverse_mask_prob", mask_rates=(0.25, 0.5), block_size=8), [32]),
        (ObjectiveConfig(kind="autoregressive"), []),
    ],
)
def test_what_is_of_the_global_batch_is_drawn_once_a_step_for_any_number_of_micro_batches(
    rows: PackedRows,
    special: SpecialTokens,
    objective: ObjectiveConfig,
    wanted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[int] = []
    permutation = noise.hash_permutation
    monkeypatch.setattr(
        noise, "hash_permutation", lambda size, *words: (drawn.append(size), permutation(size, *words))[1]
    )
    config = tiny(objective=objective, micro_batch_seqs=1)
    own = PhasedLoader(config, rows, special.pad_token_id).rank_rows(3, 0)
    assert len(list(micro_batches(config, own, special, 3, 0))) == 8
    assert drawn == wanted


def test_batch_masks_as_its_time_says_and_weighs_by_one_over_t(rows: PackedRows, special: SpecialTokens) -> None:
    config = tiny(global_batch_seqs=64)
    batch = whole(config, rows, special, 3)
    is_masked = batch["xt"] == special.mask_token_id
    assert torch.equal(batch["xt"][~is_masked], batch["x0"][~is_masked])
    assert special.mask_token_id not in batch["x0"]
    assert torch.equal(batch["select"], is_masked.flatten().nonzero().squeeze(1))
    assert torch.equal(batch["targets"], batch["x0"][is_masked])
    torch.testing.assert_close(batch["weight"], 1 / batch["t"][is_masked])
    assert torch.equal(batch["nelbo_weight"], batch["weight"])
    t = batch["t"][:, 0]
    assert torch.equal(batch["t"], t[:, None].expand(-1, 32))
    assert torch.equal((t.sort().values * 64).floor().long(), torch.arange(64))  # one time a stratum
    by_row = is_masked.double().mean(dim=1)
    assert float((by_row - t).abs().max()) < 5 * (0.25 / 32) ** 0.5  # five sigmas of a binomial share
    assert bool(batch["is_text"].all())
    assert int(batch["num_tokens"]) == batch["x0"].numel()


def test_padding_is_neither_masked_nor_counted(rows: PackedRows, special: SpecialTokens) -> None:
    config = tiny(global_batch_seqs=rows.num_rows)
    batch = whole(config, rows, special, 0)
    is_text = batch["is_text"]
    assert 0 < int((~is_text).sum()) < 32 * 5
    assert bool((batch["xt"][~is_text] == special.pad_token_id).all())
    assert int(batch["num_tokens"]) == int(is_text.sum())


def test_short_steps_have_the_asked_share_and_uniform_lengths() -> None:
    config = tiny(short_step_share=0.25, short_step_min=8, num_steps=8000)
    lengths = [step_length(config, 32, step) for step in range(8000)]
    short = [length for length in lengths if length < 32]
    # One in 25 of the drawn lengths is the whole row; five sigmas of a binomial share.
    assert abs(len(short) / 8000 - 0.25 * 24 / 25) < 5 * (0.24 * 0.76 / 8000) ** 0.5
    counts = torch.bincount(torch.tensor(short))[8:]
    assert (min(short), max(short)) == (8, 31)
    expected = len(short) / 24
    assert float(((counts - expected) ** 2 / expected).sum()) < 72.6  # 23 degrees of freedom, once in a million
    assert lengths == [step_length(config, 32, step) for step in range(8000)]
    assert lengths != [step_length(replace(config, data_seed=1), 32, s) for s in range(8000)]
    assert [is_short(config, 32, step) for step in range(8000)] == [length < 32 for length in lengths]
    pieces = replace(config, phases={"only": Phase(seq_len=16)})
    of_pieces = [step_length(pieces, 16, step) for step in range(8000)]
    assert [is_short(pieces, 32, step) for step in range(8000)] == [length < 16 for length in of_pieces]


@pytest.mark.parametrize(("share", "shortest", "wanted"), [(0.0, 1, {32}), (1.0, 32, {32}), (1.0, 99, {32})])
def test_steps_keep_their_length_where_nothing_shorter_is_asked(share: float, shortest: int, wanted: set[int]) -> None:
    config = tiny(short_step_share=share, short_step_min=shortest, num_steps=200)
    assert {step_length(config, 32, step) for step in range(200)} == wanted


def test_a_short_step_is_the_front_of_the_same_rows_on_every_rank(rows: PackedRows, special: SpecialTokens) -> None:
    config = tiny(short_step_share=1.0, workers=4, num_steps=99)
    step = next(s for s in range(99) if 4 < step_length(config, 32, s) < 32)
    length = step_length(config, 32, step)
    full = whole(tiny(), rows, special, step)
    short = whole(config, rows, special, step)
    assert torch.equal(short["x0"], full["x0"][:, :length])
    assert torch.equal(short["xt"], full["xt"][:, :length])


def test_a_row_with_the_mask_id_is_refused_with_the_step(rows: PackedRows, special: SpecialTokens) -> None:
    config = tiny()
    drawn = PhasedLoader(config, rows, special.pad_token_id).rank_rows(3, 0)
    drawn.x0[1, 5] = special.mask_token_id
    with pytest.raises(CorruptionError, match=f"row of step 3 holds the mask id {special.mask_token_id}"):
        list(micro_batches(config, drawn, special, 3, 0))


BLOCKS = tiny(objective=ObjectiveConfig(block_size=4))


def test_blocks_have_a_time_each_one_a_stratum_of_the_global_batch(rows: PackedRows, special: SpecialTokens) -> None:
    batch = whole(BLOCKS, rows, special, 3)
    t = batch["t"].view(8, 8, 4)
    assert torch.equal(t, t[..., :1].expand(-1, -1, 4))
    strata = (t[..., 0].flatten().sort().values - 1e-3) / (1 - 1e-3) * 64
    assert torch.equal(strata.floor().long(), torch.arange(64))


def test_exact_counts_mask_every_block_a_stratified_number_of_times(rows: PackedRows, special: SpecialTokens) -> None:
    config = tiny(objective=ObjectiveConfig(masking="exact_count", block_size=4))
    batch = whole(config, rows, special, 3)
    counts = (batch["xt"] == special.mask_token_id).view(64, 4).sum(dim=1)
    assert torch.equal(counts.bincount(minlength=5), torch.tensor([0, 16, 16, 16, 16]))
    masked_blocks = batch["select"] // 4
    torch.testing.assert_close(batch["weight"], (4 / counts[masked_blocks]).double())
    assert torch.equal(batch["weight"], batch["nelbo_weight"])


def test_clipped_rates_stay_inside_and_have_no_bound_beside_them(rows: PackedRows, special: SpecialTokens) -> None:
    o = ObjectiveConfig(weighting="inverse_mask_prob", mask_rates=(0.25, 0.5), block_size=8)
    batch = whole(tiny(objective=o), rows, special, 3)
    fraction = (batch["xt"] == special.mask_token_id).view(32, 8).double().mean(dim=1)
    assert (float(fraction.min()), float(fraction.max())) == (0.25, 0.5)
    assert "nelbo_weight" not in batch
    rate = 0.25 + 0.25 * batch["t"].flatten()[batch["select"]]
    torch.testing.assert_close(batch["weight"], 1 / rate)


@pytest.mark.parametrize("left", [1, 2, 5])
def test_clipped_rates_leave_blocks_cut_short_by_padding_to_chance(
    rows: PackedRows, special: SpecialTokens, left: int
) -> None:
    o = ObjectiveConfig(weighting="inverse_mask_prob", mask_rates=(0.3, 0.45), block_size=8)
    config = tiny(objective=o)
    num_rows = 2000
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(5, 200, (num_rows, 16), generator=generator)
    doc_ids = torch.where(torch.arange(16) < 8 + left, 0, -1).expand(num_rows, -1)
    cut = Rows(torch.arange(num_rows), x0, doc_ids)
    strata = step_strata(config, cut, 0, 0)
    batch = diffusion_batch(config, cut, strata, config.spans[0], special, 0, o.mask_rates)
    is_masked = (batch.xt == special.mask_token_id).double()
    assert set(is_masked[:, :8].sum(dim=1).tolist()) == {3.0}  # 3 of 8 is the only fraction inside
    short = is_masked[:, 8 : 8 + left]
    if left == 5:
        assert set(short.sum(dim=1).tolist()) == {2.0}  # 2 of 5 is inside too
    else:
        assert abs(float(short.mean()) - 0.375) < 5 * (0.25 / short.numel()) ** 0.5  # five sigmas of a binomial share
    assert float(is_masked[:, 8 + left :].sum()) == 0


@pytest.mark.parametrize("rates", [(0.35, 0.65), (0.49, 0.51), (0.5, 0.5)])
def test_clipped_rates_leave_rows_that_a_short_step_makes_too_short_to_chance(
    rows: PackedRows, special: SpecialTokens, rates: tuple[float, float]
) -> None:
    o = ObjectiveConfig(weighting="inverse_mask_prob", mask_rates=rates)
    config = tiny(objective=o, num_steps=150, global_batch_seqs=16, short_step_share=1.0)
    fractions: dict[int, set[float]] = {}
    for step in range(150):
        batch = whole(config, rows, special, step)
        counts = (
            (batch["xt"] == special.mask_token_id).view(batch["is_text"].shape).sum(dim=1)[batch["is_text"].all(dim=1)]
        )
        length = batch["is_text"].shape[1]
        fractions.setdefault(length, set()).update((counts.double() / length).tolist())
    assert fractions[1] == {0.0, 1.0}
    for length, found in fractions.items():
        inside = [count / length for count in range(length + 1) if rates[0] <= count / length <= rates[1]]
        assert found <= set(inside) or not inside, length
    assert any(len(found) > 1 for length, found in fractions.items() if length % 2)


def test_lowest_time_as_lowest_rate_leaves_blocks_without_a_mask(rows: PackedRows, special: SpecialTokens) -> None:
    o = ObjectiveConfig(weighting="inverse_mask_prob", mask_rates=(1e-3, 0.5), block_size=4)
    batch = whole(tiny(objective=o, global_batch_seqs=64), rows, special, 3)
    counts = (batch["xt"] == special.mask_token_id).view(-1, 4).sum(dim=1)
    assert (int(counts.min()), int(counts.max())) == (0, 2)


def test_next_tokens_are_asked_for_at_the_position_before(rows: PackedRows, special: SpecialTokens) -> None:
    batch = whole(tiny(objective=ObjectiveConfig(kind="autoregressive")), rows, special, 3)
    assert torch.equal(batch["xt"], batch["x0"])
    assert torch.equal(batch["targets"], batch["x0"].flatten()[batch["select"] + 1])
    assert int(batch["num_tokens"]) == 8 * 31 == len(batch["select"])


def test_a_phase_cuts_rows_into_pieces_with_their_own_noise(rows: PackedRows, special: SpecialTokens) -> None:
    config = tiny(phases={"short": Phase(seq_len=8), "long": Phase()})
    short, full = whole(config, rows, special, 3), whole(tiny(), rows, special, 3)
    assert torch.equal(short["x0"], full["x0"].view(32, 8))
    assert len(short["t"][:, 0].unique()) == 32
    later = whole(config, rows, special, 10)
    assert torch.equal(later["xt"], whole(tiny(), rows, special, 10)["xt"])


def test_another_mixture_begins_its_own_order_at_its_first_step(made: Artifacts, special: SpecialTokens) -> None:
    rows = open_rows(made.rows)
    config = tiny(phases={"first": Phase(), "second": Phase(mixture={"text": 1.0})})
    loader = PhasedLoader(config, rows, special.pad_token_id)
    seen = torch.cat([torch.from_numpy(loader.rank_rows(step, 0).sample_ids) for step in range(8, 12)])
    assert torch.equal(seen, torch.arange(64, 96))
    assert loader.epochs(80) == pytest.approx({"": 80 / rows.num_rows})
    assert loader.epochs(88) == pytest.approx({"": 80 / rows.num_rows, "text": 8 / rows.num_rows})
    again = PhasedLoader(config, rows, special.pad_token_id).rank_rows(10, 0)
    assert torch.equal(torch.from_numpy(again.x0), torch.from_numpy(loader.rank_rows(10, 0).x0))


def test_rows_with_padding_keep_it_apart_from_the_text(rows: PackedRows, special: SpecialTokens) -> None:
    config = tiny(global_batch_seqs=rows.num_rows)
    drawn = PhasedLoader(config, rows, special.pad_token_id).rank_rows(0, 0)
    (batch,) = micro_batches(config, drawn, special, 0, 0)
    assert batch.mask.doc_ids is not None
    assert torch.equal(batch.mask.doc_ids == 1, batch.is_text)


@pytest.mark.parametrize(("kind", "family"), [("diffusion", "full"), ("autoregressive", "causal")])
def test_documents_are_kept_apart_where_asked(rows: PackedRows, special: SpecialTokens, kind: Any, family: str) -> None:
    config = tiny(global_batch_seqs=64, objective=ObjectiveConfig(kind=kind, within_documents=True))
    drawn = PhasedLoader(config, rows, special.pad_token_id).rank_rows(0, 0)
    (batch,) = micro_batches(config, drawn, special, 0, 0)
    assert batch.mask.family == family
    assert batch.mask.doc_ids is not None
    assert torch.equal(batch.mask.doc_ids, torch.from_numpy(drawn.doc_ids).long())
    assert int(batch.mask.doc_ids.max()) > 0
