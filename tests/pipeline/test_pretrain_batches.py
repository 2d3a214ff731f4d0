"""A step's batch is a function of the step alone: ranks and micro batches only cut it up."""

import pytest
import torch

from pipeline.data.loader import Loader
from pipeline.data.rows import open_rows
from pipeline.data.vocabulary import SpecialTokens, load_vocabulary
from pipeline.pretrain.batches import micro_batches, rank_rows
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
