"""A step's batch is a function of the step alone: ranks and micro batches only cut it up."""

from pathlib import Path

import pytest
import torch

from pipeline.data.loader import Loader
from pipeline.data.rows import open_rows
from pipeline.data.special_tokens import SpecialTokens
from pipeline.data.vocabulary import load_vocabulary
from pipeline.errors import CorruptionError
from pipeline.pretrain.batches import micro_batches, rank_rows, step_length
from pipeline.pretrain.config import PretrainConfig
from tests.support.tiny_run import Artifacts, tiny


@pytest.fixture(scope="module")
def loader(made: Artifacts, special: SpecialTokens) -> Loader:
    """Rows of the training split."""
    return Loader(open_rows(made.rows), tiny().data_seed, special.pad_token_id)


@pytest.fixture(scope="module")
def special(made: Artifacts) -> SpecialTokens:
    """Special ids of the tiny tokenizer."""
    return load_vocabulary(made.tokenizer).special


def whole(config: PretrainConfig, loader: Loader, special: SpecialTokens, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of the global batch, put together from all ranks and micro batches."""
    parts = [
        batch
        for rank in range(config.workers)
        for batch in micro_batches(config, rank_rows(config, loader, step, rank), special, step, rank)
    ]
    assert all(len(part.noised.x0) == config.rows_per_pass for part in parts)
    names = ("x0", "xt", "t", "is_text", "maskable")
    whole = {name: torch.cat([getattr(part.noised, name) for part in parts]) for name in names}
    for name in ("targets", "weight", "nelbo_weight"):
        whole[name] = torch.cat([getattr(part.targets, name) for part in parts])
    whole["select"] = torch.cat(
        [part.targets.select + number * config.rows_per_pass * 32 for number, part in enumerate(parts)]
    )
    whole["num_tokens"] = torch.stack([part.targets.num_tokens for part in parts]).sum()
    return whole


@pytest.mark.parametrize(("workers", "micro"), [(2, 0), (2, 2), (4, 1), (8, 0), (1, 2)])
@pytest.mark.parametrize("step", [0, 7])
def test_global_batch_is_the_same_however_it_is_cut(
    loader: Loader, special: SpecialTokens, step: int, workers: int, micro: int
) -> None:
    wanted = whole(tiny(), loader, special, step)
    found = whole(tiny(workers=workers, micro_batch_seqs=micro), loader, special, step)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name


def test_batch_masks_as_its_time_says_and_weighs_by_one_over_t(loader: Loader, special: SpecialTokens) -> None:
    config = tiny(global_batch_seqs=64)
    batch = whole(config, loader, special, 3)
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


def test_padding_is_neither_masked_nor_counted(loader: Loader, special: SpecialTokens) -> None:
    num_rows = open_rows(loader_directory(loader)).num_rows
    config = tiny(global_batch_seqs=num_rows)
    batch = whole(config, loader, special, 0)
    is_text = batch["is_text"]
    assert 0 < int((~is_text).sum()) < 32 * 5
    assert bool((batch["xt"][~is_text] == special.pad_token_id).all())
    assert int(batch["num_tokens"]) == int(is_text.sum())
    assert torch.equal(batch["maskable"], is_text)


def loader_directory(loader: Loader) -> Path:
    """Where a loader reads."""
    return loader._rows.directory


def test_short_steps_have_the_asked_share_and_uniform_lengths() -> None:
    config = tiny(short_step_share=0.25, short_step_min=8)
    lengths = [step_length(config, 32, step) for step in range(8000)]
    short = [length for length in lengths if length < 32]
    # One in 25 of the drawn lengths is the whole row; five sigmas of a binomial share.
    assert abs(len(short) / 8000 - 0.25 * 24 / 25) < 5 * (0.24 * 0.76 / 8000) ** 0.5
    counts = torch.bincount(torch.tensor(short))[8:]
    assert (min(short), max(short)) == (8, 31)
    expected = len(short) / 24
    assert float(((counts - expected) ** 2 / expected).sum()) < 72.6  # 23 degrees of freedom, once in a million
    assert lengths == [step_length(config, 32, step) for step in range(8000)]
    assert lengths != [
        step_length(tiny(short_step_share=0.25, short_step_min=8, data_seed=1), 32, s) for s in range(8000)
    ]


@pytest.mark.parametrize(("share", "shortest", "wanted"), [(0.0, 1, {32}), (1.0, 32, {32}), (1.0, 99, {32})])
def test_steps_keep_their_length_where_nothing_shorter_is_asked(share: float, shortest: int, wanted: set[int]) -> None:
    config = tiny(short_step_share=share, short_step_min=shortest)
    assert {step_length(config, 32, step) for step in range(200)} == wanted


def test_a_short_step_is_the_front_of_the_same_rows_on_every_rank(loader: Loader, special: SpecialTokens) -> None:
    config = tiny(short_step_share=1.0, workers=4)
    step = next(s for s in range(99) if 4 < step_length(config, 32, s) < 32)
    length = step_length(config, 32, step)
    full = whole(tiny(), loader, special, step)
    parts = [b for r in range(4) for b in micro_batches(config, rank_rows(config, loader, step, r), special, step, r)]
    assert torch.equal(torch.cat([part.noised.x0 for part in parts]), full["x0"][:, :length])
    assert torch.equal(torch.cat([part.noised.xt for part in parts]), full["xt"][:, :length])


def test_a_row_with_the_mask_id_is_refused_with_the_step(loader: Loader, special: SpecialTokens) -> None:
    config = tiny()
    drawn = rank_rows(config, loader, 3, 0)
    drawn.x0[1, 5] = special.mask_token_id
    with pytest.raises(CorruptionError, match=f"row of step 3 holds the mask id {special.mask_token_id}"):
        list(micro_batches(config, drawn, special, 3, 0))
