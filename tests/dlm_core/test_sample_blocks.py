"""Windows of a row one after another, and their contexts: exact where they claim to be, and what they cost."""

import pytest
import torch

from dlm_core.ar_init import shifted
from dlm_core.models.attention import AttentionMask
from dlm_core.samplers.blocks import sample_blocks
from dlm_core.samplers.confident import Confident, EntropyBound, Threshold
from dlm_core.samplers.contexts import DualCache, ExactCache, PrefixCache, Whole
from dlm_core.samplers.loop import sample, without_pass
from dlm_core.samplers.planned import Ancestral, FirstHitting, RandomOrder
from dlm_core.samplers.proposal import Proposal
from dlm_core.samplers.quotas import EvenQuotas
from dlm_core.samplers.remask import PathPlanning, ReMDM
from dlm_core.samplers.speculative import SelfSpeculative
from tests.support.sampling import LENGTH, MASK, draw_rows, follows, tiny_model, world

BLOCK, START, SEQ_LEN = 8, 8, 32
RULES = [
    Ancestral(16),
    FirstHitting(),
    RandomOrder(EvenQuotas(4)),
    Confident("probability", EvenQuotas(4)),
    Confident("entropy", EntropyBound(0.5)),
    Confident("probability", Threshold(0.5)),
    ReMDM(16, 0.1),
    PathPlanning(6),
]
NAMES = [f"{type(rule).__name__}, {getattr(rule, 'num', '')}" for rule in RULES]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def _rows() -> torch.Tensor:
    """A prompt, masks behind it, and tokens given among them."""
    mask = tiny_model().config.mask_token_id
    xt = torch.randint(mask, (4, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    xt[:, START:] = torch.where(torch.arange(SEQ_LEN - START) % 5 == 4, xt[:, START:], mask)
    return xt


def _fill(context, rule, xt=None, **options):
    settings = {
        "block_size": BLOCK,
        "mask_token_id": tiny_model().config.mask_token_id,
        "noise_seed": 3,
        "start": START,
    }
    return sample_blocks(context, _rows() if xt is None else xt, rule, Proposal(), **(settings | options))


def _plain(mask: AttentionMask | None = None, offset: int = 0) -> Whole:
    denoise = lambda xt, select: tiny_model()(xt, select, mask=mask or AttentionMask())  # noqa: E731
    return Whole(without_pass(shifted(denoise) if offset else denoise))


# Exact contexts


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_cache_of_clean_blocks_changes_no_token_and_costs_a_pass_a_block(rule):
    """All blocks but the last are taken in by a pass each, the prompt by one."""
    whole = _fill(_plain(AttentionMask("block_causal", block_size=BLOCK)), rule)
    cached = _fill(ExactCache(tiny_model(), BLOCK), rule)
    num_blocks = (SEQ_LEN - START) // BLOCK
    assert torch.equal(cached.x0, whole.x0)
    assert torch.equal(cached.nfe, whole.nfe + num_blocks)
    assert cached.num_passes >= whole.num_passes + num_blocks


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("kind", [PrefixCache, DualCache])
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_an_approximate_cache_that_is_refreshed_in_every_pass_changes_no_token(rule, kind, offset):
    whole = _fill(_plain(offset=offset), rule)
    cached = _fill(kind(tiny_model(), refresh_every=1, target_offset=offset), rule)
    assert torch.equal(cached.x0, whole.x0)
    assert torch.equal(cached.nfe, whole.nfe)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("kind", "width"), [(PrefixCache, SEQ_LEN - START), (DualCache, BLOCK)])
def test_an_approximate_cache_computes_less_after_the_first_pass_of_a_window(kind, width, offset):
    widths, model = [], tiny_model()
    handle = model.embedding.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    try:
        filled = _fill(kind(model, target_offset=offset), FirstHitting(), keep_frames=True)
    finally:
        handle.remove()
    whole = _fill(_plain(offset=offset), FirstHitting(), keep_frames=True)
    assert widths[0] == SEQ_LEN
    assert widths[1] == width + offset
    assert widths.count(SEQ_LEN) == (SEQ_LEN - START) // BLOCK
    assert torch.equal(filled.frames[1], whole.frames[1])
    assert not torch.equal(filled.x0, whole.x0)
    is_filled = _rows() == model.config.mask_token_id
    assert (filled.x0 == whole.x0)[is_filled].double().mean() > 10 / model.config.vocab_size  # ten times by chance


def test_what_an_approximate_cache_keeps_is_of_its_last_whole_pass():
    """One token a pass, refreshed in every second: the odd passes of a naive cache see the keys of the pass before."""
    first = _fill(DualCache(tiny_model(), refresh_every=2), FirstHitting())
    always = _fill(DualCache(tiny_model(), refresh_every=1), FirstHitting())
    never = _fill(DualCache(tiny_model()), FirstHitting())
    agree = [(filled.x0 == always.x0).double().mean() for filled in (first, never)]
    assert agree[1] < agree[0] <= 1


# Windows


@pytest.mark.parametrize("rule", RULES[:6], ids=NAMES[:6])
def test_one_window_is_the_plain_loop(rule):
    xt = _rows()
    mask = tiny_model().config.mask_token_id
    plain = sample(without_pass(tiny_model()), xt, rule, Proposal(), mask_token_id=mask, noise_seed=3)
    windows = _fill(_plain(), rule, start=0, block_size=SEQ_LEN)
    assert torch.equal(plain.x0, windows.x0)
    assert torch.equal(plain.nfe, windows.nfe)
    assert plain.num_passes == windows.num_passes


def test_blocks_are_filled_from_left_to_right():
    mask = tiny_model().config.mask_token_id
    frames = _fill(_plain(), FirstHitting(), keep_frames=True).frames
    assert torch.equal(frames[0], _rows())
    for frame in frames:
        for left in range(START, SEQ_LEN, BLOCK):
            if (frame[:, left : left + BLOCK] != _rows()[:, left : left + BLOCK]).any():
                assert (frame[:, :left] != mask).all()
    assert torch.equal(frames[-1], _fill(_plain(), FirstHitting()).x0)


def test_blocks_of_one_token_by_the_chain_rule_follow_the_joint():
    xt = torch.full((10_000, LENGTH), MASK)
    filled = sample_blocks(
        Whole(without_pass(world()[1])), xt, Ancestral(1), Proposal(), block_size=1, mask_token_id=MASK, noise_seed=0
    )
    assert follows(filled.x0, world()[0].prob)
    assert (filled.nfe == LENGTH).all()


def test_rows_are_the_same_in_any_batch():
    ids = torch.tensor([7, 1, 4, 2])
    together = _fill(ExactCache(tiny_model(), BLOCK), FirstHitting(), sample_ids=ids)
    for row in range(4):
        alone = _fill(
            ExactCache(tiny_model(), BLOCK), FirstHitting(), _rows()[row : row + 1], sample_ids=ids[row : row + 1]
        )
        assert torch.equal(alone.x0[0], together.x0[row])
        assert torch.equal(alone.nfe[0], together.nfe[row])


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_passes_are_heard_of_and_frames_kept_for_the_rows_that_needed_them(rule):
    """What a row is before each of its own passes does not depend on its company."""
    heard = []
    together = _fill(_plain(), rule, keep_frames=True, on_pass=lambda n, rows: heard.append((n, rows.clone())))
    assert [n for n, _ in heard] == list(range(1, together.num_passes + 1))
    assert all(torch.equal(rows, frame) for (_, rows), frame in zip(heard, together.frames[1:], strict=True))
    assert torch.equal(torch.stack(together.is_busy).sum(dim=0), together.nfe)
    for row in range(4):
        ids = torch.tensor([row])
        alone = _fill(_plain(), rule, _rows()[row : row + 1], keep_frames=True, sample_ids=ids)
        own = [
            [f[r] for f, b in zip(d.frames, d.is_busy, strict=False) if b[r]] for d, r in ((together, row), (alone, 0))
        ]
        assert len(own[0]) == len(own[1]) == int(alone.nfe)
        assert all(torch.equal(a, b) for a, b in zip(*own, strict=True))


def test_a_change_of_logits_is_told_places_of_the_row_in_any_window():
    mask = tiny_model().config.mask_token_id
    change = lambda logits, places: 1e4 * torch.nn.functional.one_hot(places % SEQ_LEN, logits.shape[1])  # noqa: E731
    filled = _fill(_plain(), FirstHitting(), change=change).x0
    wanted = torch.arange(SEQ_LEN).expand(4, -1)
    assert torch.equal(filled, torch.where(_rows() == mask, wanted, _rows()))


# Ends


def _ending(ends_at: dict[int, int], eos: int, other: int):
    """A denoiser that is sure of the end token at one place of each row, and of another token elsewhere."""

    def predict(xt, select, which):
        rows, places = which.rows[select // xt.shape[1]], select % xt.shape[1]
        is_end = torch.tensor([ends_at.get(int(r)) == int(p) for r, p in zip(rows, places, strict=True)])
        token = torch.where(is_end, eos, other)
        return 100.0 * torch.nn.functional.one_hot(token, 6).double()

    return predict


def test_rows_end_behind_their_first_end_token_and_cost_no_more():
    mask, eos = 5, 4
    xt = torch.full((3, 12), mask)
    xt[:, :2] = eos  # in the prompt it ends nothing
    xt[1, 9] = 0  # given: it stays
    xt[2, 4] = eos  # given: it ends nothing either
    filled = sample_blocks(
        Whole(_ending({0: 3, 1: 8}, eos, 1)), xt, FirstHitting(), Proposal(), block_size=5, start=2,
        mask_token_id=mask, noise_seed=0, eos_token_id=eos,
    )  # fmt: skip
    assert filled.x0.tolist() == [
        [4, 4, 1, 4, 4, 4, 4, 4, 4, 4, 4, 4],
        [4, 4, 1, 1, 1, 1, 1, 1, 4, 0, 4, 4],
        [4, 4, 1, 1, 4, 1, 1, 1, 1, 1, 1, 1],
    ]
    assert filled.nfe.tolist() == [5, 9, 9]


def test_no_pass_is_made_once_all_rows_have_ended():
    filled = sample_blocks(
        Whole(_ending({0: 1, 1: 2}, 4, 1)), torch.full((2, 12), 5), FirstHitting(), Proposal(), block_size=3,
        mask_token_id=5, noise_seed=0, eos_token_id=4,
    )  # fmt: skip
    assert filled.num_passes == 3
    assert filled.x0[:, 3:].unique().tolist() == [4]


def test_a_row_that_has_ended_needs_no_pass_of_the_others():
    filled = sample_blocks(
        Whole(_ending({0: 1, 1: 8}, 4, 1)), torch.full((2, 12), 5), FirstHitting(), Proposal(), block_size=3,
        mask_token_id=5, noise_seed=0, eos_token_id=4, keep_frames=True,
    )  # fmt: skip
    assert torch.equal(torch.stack(filled.is_busy).sum(dim=0), filled.nfe)
    assert filled.nfe.tolist() == [3, 9]
    assert torch.equal(filled.frames[-1], filled.x0)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 7}, "block_size is 7; it must divide the 24 tokens behind the first 8"),
        ({"block_size": 0}, "block_size is 0; it must divide"),
        ({"start": 40}, "behind the first 40"),
        ({"start": 16}, "a mask stands before position 16"),
    ],
)
def test_windows_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _fill(_plain(), FirstHitting(), **options)


def test_contexts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the first window begins at 8, inside a block of 16"):
        _fill(ExactCache(tiny_model(), 16), FirstHitting())
    xt = torch.full((1, 8), tiny_model().config.mask_token_id)
    with pytest.raises(ValueError, match="position 0 is to be filled"):
        _fill(DualCache(tiny_model(), target_offset=1), FirstHitting(), xt, start=0)
    with pytest.raises(ValueError, match="adds rows to a pass, for which ExactCache has no place; take Whole"):
        _fill(ExactCache(tiny_model(), BLOCK), SelfSpeculative())
    with pytest.raises(ValueError, match="refresh_every is -1"):
        PrefixCache(tiny_model(), refresh_every=-1)


@pytest.mark.parametrize("logits", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_give_no_distribution_raise(logits):
    with pytest.raises(ValueError, match="hold nan or inf, or are -inf for every id"):
        draw_rows(FirstHitting(), 2, denoise=lambda xt, select: torch.full((len(select), 4), logits))


def test_a_denoiser_that_would_predict_the_mask_never_gets_it():
    def denoise(xt, select):
        return torch.tensor([0.0, 0.0, 0.0, 9.0]).expand(len(select), 4)

    for rule in (Ancestral(3), Confident("probability", EvenQuotas(2)), ReMDM(4, 0.1), PathPlanning(3)):
        for temperature in (0.0, 1.0):
            assert int(draw_rows(rule, 20, denoise=denoise, proposal=Proposal(temperature)).x0.max()) < MASK


def test_change_sees_every_pass_and_has_its_way():
    asked = []

    def change(logits, places):
        asked.append(places.tolist())
        return logits.index_fill(1, torch.tensor([0, 1]), -torch.inf)

    drawn = draw_rows(FirstHitting(), 5, change=change)
    assert drawn.x0.unique().tolist() == [2]
    assert sorted(place for places in asked for place in places) == list(range(15))


@pytest.mark.parametrize("rule", [FirstHitting(), Confident("probability", Threshold(0.9)), SelfSpeculative(2)])
def test_change_is_told_positions_of_the_batch_in_every_window(rule):
    """What it allows depends on the position, and so does what is written."""

    def change(logits, places):
        wanted = (places % 8 + places // 8) % 3
        return torch.where(torch.arange(4) == wanted[:, None], logits, -torch.inf)

    filled = sample_blocks(
        Whole(without_pass(lambda xt, select: torch.zeros(len(select), 4))), torch.full((3, 8), MASK), rule,
        Proposal(), block_size=4, mask_token_id=MASK, noise_seed=0, change=change,
    )  # fmt: skip
    assert filled.x0.tolist() == [[(place + row) % 3 for place in range(8)] for row in range(3)]


def test_the_last_frame_is_the_result_where_rows_end():
    filled = sample_blocks(
        Whole(_ending({0: 1, 1: 5}, 4, 1)), torch.full((3, 12), 5), FirstHitting(), Proposal(), block_size=4,
        mask_token_id=5, noise_seed=0, eos_token_id=4, keep_frames=True,
    )  # fmt: skip
    assert torch.equal(filled.frames[-1], filled.x0)
    assert len(filled.frames) == filled.num_passes + 1


def test_noise_removal_is_a_pass_of_windows_and_rows_with_masks():
    rule, xt = Ancestral(3, t_end=0.1, denoises_at_end="argmax"), torch.full((2, 9), MASK)
    xt[0], xt[1, 3:6] = 1, 2
    filled = sample_blocks(
        Whole(without_pass(lambda xt, select: torch.zeros(len(select), 4))), xt, rule, Proposal(), block_size=3,
        mask_token_id=MASK, noise_seed=0,
    )  # fmt: skip
    windows = [draw_rows(rule, xt=xt[1:, i : i + 3], first_position=i, sample_ids=torch.tensor([1])) for i in (0, 6)]
    assert filled.nfe.tolist() == [0, sum(int(window.nfe) for window in windows)]
    assert filled.num_passes == sum(window.num_passes for window in windows)
