"""Masks become text: as a naive loop over single rows fills them, whatever the batch, the order and the company."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from dlm_core.models.attention import AttentionMask
from dlm_core.noise import Stream, hash_uniform
from dlm_core.samplers.proposal import Proposal, draw
from pipeline.errors import UserError
from pipeline.inference.filling import Canvas, Filled, drawn_ids, fill, prompted
from pipeline.inference.model import OpenModel
from pipeline.inference.sampler import TAKES, Kind, SamplerConfig
from pipeline.inference.sampling import SamplingConfig
from pipeline.inference.stops import before_end
from tests.support.model_kinds import KINDS

pytestmark = pytest.mark.timeout(120)
SEQ_LEN, BLOCK = 32, 4
STEPWISE = SamplingConfig(SamplerConfig("first_hitting"), temperature=1.0, noise_seed=3)
PLAIN = SamplingConfig(temperature=1.0, noise_seed=3)
"""What a model of next tokens takes."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _config(name: str) -> SamplingConfig:
    return PLAIN if name == "next" else STEPWISE


def _all(model: OpenModel, canvases: Sequence[Canvas], config: SamplingConfig, **options: Any) -> list[Filled]:
    found = dict(fill(model, canvases, config, **options))
    return [found[number] for number in range(len(canvases))]


def _prompts(model: OpenModel) -> list[Canvas]:
    """Of several lengths, and two that differ in their sample id alone."""
    sizes = [(0, 9), (3, 8), (3, 8), (5, 11), (8, 8), (3, 8), (13, 7)]
    some = [prompted(model, range(20, 20 + n), length, 70 + i) for i, (n, length) in enumerate(sizes)]
    return [*some, Canvas(some[1].ids, 90)]


def _gaps(model: OpenModel) -> list[Canvas]:
    """Several gaps in one row."""
    m = model.mask_token_id
    return [
        Canvas([5, m, m, 8, m, 10, 11, m], 1),
        Canvas([5, 6, m, 8, 9, m, m, m], 2),
        Canvas([5, m, m, m, m, 10, m, 12], 3),
    ]


def _naive_first_hitting(model: OpenModel, canvas: Canvas, seed: int) -> list[int]:
    """One token a pass in falling order of u; of a model of blocks, block by block."""
    ids, record = list(canvas.ids), model.record
    length = len(ids)
    ids += [model.mask_token_id] * (-length % (record.block_size or 1))
    size = record.block_size or len(ids)
    mask = AttentionMask("block_causal", block_size=size) if record.block_size else AttentionMask()
    for left in range(0, len(ids), size):
        window = range(left, left + size)
        uniform = {p: float(hash_uniform(seed, Stream.REVEAL, canvas.sample_id, p, 0)) for p in window}
        for place in sorted((p for p in window if ids[p] == model.mask_token_id), key=lambda p: -uniform[p]):
            logits = model.denoiser(torch.tensor([ids]), mask=mask)[place - record.target_offset]
            logits[model.mask_token_id] = -torch.inf
            u = hash_uniform(seed, Stream.CATEGORICAL, canvas.sample_id, place, 0)
            ids[place] = int(draw(Proposal(), logits[None], u[None]).x0)
    return ids[:length]


def _naive_next_tokens(model: OpenModel, canvas: Canvas, seed: int) -> list[int]:
    ids = [model.vocabulary.special.eos_token_id, *canvas.ids]
    for place in range(1, len(ids)):
        if ids[place] == model.mask_token_id:
            logits = model.denoiser(torch.tensor([ids[:place]]), mask=AttentionMask("causal"))[-1]
            u = hash_uniform(seed, Stream.CATEGORICAL, canvas.sample_id, place - 1, 0)
            ids[place] = int(draw(Proposal(), logits[None], u[None]).x0)
    return ids[1:]


@pytest.mark.parametrize("name", KINDS)
def test_prompts_are_continued_as_a_naive_loop_does_it(doubles: dict[str, OpenModel], name: str) -> None:
    model, naive = doubles[name], _naive_next_tokens if name == "next" else _naive_first_hitting
    canvases = _prompts(model)
    with torch.no_grad():
        wanted = [naive(model, canvas, 3) for canvas in canvases]
    found = _all(model, canvases, _config(name))
    assert [filled.ids for filled in found] == wanted
    assert found[1].ids != found[7].ids


@pytest.mark.parametrize("name", ["masked", "shifted", "blocks"])
def test_gaps_are_filled_as_a_naive_loop_does_it_and_what_is_given_stays(
    doubles: dict[str, OpenModel], name: str
) -> None:
    model = doubles[name]
    canvases = _gaps(model)
    with torch.no_grad():
        wanted = [_naive_first_hitting(model, canvas, 3) for canvas in canvases]
    found = _all(model, canvases, STEPWISE)
    assert [filled.ids for filled in found] == wanted
    for canvas, filled in zip(canvases, found, strict=True):
        assert all(new == old or old == model.mask_token_id for new, old in zip(filled.ids, canvas.ids, strict=True))


@pytest.mark.parametrize("sampler", [SamplerConfig("first_hitting"), SamplerConfig("remdm", num_steps=9, eta=0.3)])
@pytest.mark.parametrize("name", KINDS)
def test_a_canvas_is_filled_alike_in_any_batch_order_and_company(
    doubles: dict[str, OpenModel], name: str, sampler: SamplerConfig
) -> None:
    model = doubles[name]
    config = PLAIN if name == "next" else replace(STEPWISE, sampler=sampler)
    canvases = _prompts(model) + (_gaps(model) if name != "next" else [])
    together = _all(model, canvases, config, keep_frames=True)
    for batch_rows in (1, 3):
        assert _all(model, canvases, replace(config, batch_rows=batch_rows), keep_frames=True) == together
    assert _all(model, canvases[::-1], config, keep_frames=True) == together[::-1]
    for canvas, filled in zip(canvases, together, strict=True):
        assert _all(model, [canvas], config, keep_frames=True) == [filled]


WAYS: dict[str, tuple[str, SamplingConfig]] = {
    "whole": ("masked", STEPWISE),
    "quotas": ("masked", replace(STEPWISE, sampler=SamplerConfig("confidence", num_steps=4), ends_at_eos=True)),
    "shifted": ("shifted", STEPWISE),
    "windows": ("masked", replace(STEPWISE, block_size=BLOCK)),
    "guided": ("shifted", replace(STEPWISE, block_size=BLOCK, guidance=1.0)),
    "prefix": ("masked", replace(STEPWISE, block_size=BLOCK, cache="prefix")),
    "dual": ("shifted", replace(STEPWISE, block_size=BLOCK, cache="dual", refresh_every=2)),
    "blocks": ("blocks", STEPWISE),
    "blocks without a cache": ("blocks", replace(STEPWISE, cache="none")),
    "next": ("next", replace(PLAIN, ends_at_eos=True)),
}


@pytest.mark.parametrize("way", WAYS)
def test_prompts_of_unlike_lengths_go_together_and_each_is_what_it_is_alone(
    doubles: dict[str, OpenModel], way: str
) -> None:
    """Of 16 to 20 tokens: few of whatever batch are padding."""
    name, config = WAYS[way]
    model, step = doubles[name], BLOCK if name == "blocks" else 1
    sizes = [16 + step * (3 * i % 5) for i in range(16)]
    canvases = [prompted(model, range(20 + i, 20 + i + size - 8), 8, 50 + i) for i, size in enumerate(sizes)]
    found, calls = {}, {}
    for batch_rows in (1, 7, 32):
        seen: list[int] = []
        handle = model.denoiser.embedding.register_forward_hook(lambda _, args, out, seen=seen: seen.append(len(out)))
        try:
            found[batch_rows] = _all(model, canvases, replace(config, batch_rows=batch_rows), keep_frames=True)
        finally:
            handle.remove()
        calls[batch_rows] = len(seen)
    assert found[1] == found[7] == found[32]
    num_batches = {"blocks": 5}.get(name, 3)
    assert calls[32] < calls[7] <= num_batches * max(one.nfe + 1 for one in found[1])
    assert calls[1] > 4 * calls[32]


# Costs and frames


@pytest.mark.parametrize(("name", "commits"), [("masked", 0), ("shifted", 0), ("blocks", 2), ("next", 0)])
def test_every_forward_pass_is_counted(doubles: dict[str, OpenModel], name: str, commits: int) -> None:
    """A pass a token; of a model of blocks one more for the prompt and for each block but the last."""
    model, calls = doubles[name], []
    handle = model.denoiser.embedding.register_forward_hook(lambda *_: calls.append(1))
    try:
        (filled,) = _all(model, [prompted(model, range(20, 24), 8, 5)], _config(name))
    finally:
        handle.remove()
    assert filled.nfe == len(calls) == 8 + commits


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_the_row_before_each_of_its_passes_and_at_the_end(doubles: dict[str, OpenModel], name: str) -> None:
    model = doubles[name]
    canvases = _prompts(model)
    for canvas, filled in zip(canvases, _all(model, canvases, _config(name), keep_frames=True), strict=True):
        assert filled.frames[0] == canvas.ids
        assert filled.frames[-1] == filled.ids
        for earlier, later in pairwise(filled.frames):
            changed = [i for i, (a, b) in enumerate(zip(earlier, later, strict=True)) if a != b]
            assert all(earlier[i] == model.mask_token_id for i in changed)
            assert len(changed) == 1 or (name == "blocks" and not changed)  # a token behind the row


@pytest.mark.parametrize("name", KINDS)
def test_a_canvas_without_a_mask_costs_nothing(doubles: dict[str, OpenModel], name: str) -> None:
    found = _all(doubles[name], [Canvas([5, 6, 7], 0, num_cut=2), Canvas([], 1)], PLAIN, keep_frames=True)
    assert found == [Filled([5, 6, 7], 0, 2, [[5, 6, 7]]), Filled([], 0, 0, [[]])]


@pytest.mark.parametrize("name", KINDS)
def test_each_pass_is_heard_of_with_the_rows_of_its_batch(doubles: dict[str, OpenModel], name: str) -> None:
    model, heard = doubles[name], []
    canvases = [prompted(model, (20, 21), 6, 0), prompted(model, (22, 23), 6, 1), prompted(model, (), 2, 2)]
    filled = _all(model, canvases, _config(name), on_pass=lambda n, rows: heard.append((n, rows)), keep_frames=True)
    pairs = [(n, rows) for n, rows in heard if 0 in rows]
    taken_in = 1 if name == "blocks" else 0  # the first block, of which there is nothing to hear
    numbers = [n for n, _ in pairs]
    assert numbers == sorted(set(numbers))
    assert (numbers[0], numbers[-1]) == (1, len(pairs) + taken_in)
    assert all(set(rows) == {0, 1} for _, rows in pairs)
    assert [rows[0] for _, rows in pairs] == filled[0].frames[1:]
    assert {place: ids for _, rows in heard for place, ids in rows.items()} == {
        n: one.ids for n, one in enumerate(filled)
    }


@pytest.mark.parametrize("name", KINDS)
def test_a_change_of_logits_knows_sample_and_position(doubles: dict[str, OpenModel], name: str) -> None:
    """Token 30 + position for odd samples, 60 + position for others."""
    model = doubles[name]

    def change(logits: torch.Tensor, sample_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        wanted = torch.where(sample_ids % 2 == 1, 30, 60) + positions
        return torch.nn.functional.one_hot(wanted, logits.shape[1]) * 1e4

    prompts = [((5, 6), 7), ((5, 6), 7), ((5,), 4), ((5, 6, 7, 8), 7)]
    canvases = [prompted(model, prompt, length, number) for number, (prompt, length) in enumerate(prompts, 1)]
    found = _all(model, canvases, _config(name), change=change)
    for canvas, filled in zip(canvases, found, strict=True):
        for place, (old, new) in enumerate(zip(canvas.ids, filled.ids, strict=True)):
            base = 30 if canvas.sample_id % 2 else 60
            assert new == (base + place if old == model.mask_token_id else old)


# Guidance


def _naive_guided(model: OpenModel, canvas: Canvas, w: float) -> list[int]:
    """One token a pass in falling order of u, under c + w (c - u)."""
    mask, offset, ids = model.mask_token_id, model.record.target_offset, list(canvas.ids)
    is_prompt = [token != mask and place >= offset for place, token in enumerate(ids)]
    uniform = [float(hash_uniform(3, Stream.REVEAL, canvas.sample_id, place, 0)) for place in range(len(ids))]
    for place in sorted((p for p in range(len(ids)) if ids[p] == mask), key=lambda p: -uniform[p]):
        bare = [mask if given else token for given, token in zip(is_prompt, ids, strict=True)]
        c, u = (model.denoiser(torch.tensor([row]))[place - offset] for row in (ids, bare))
        logits = c + w * (c - u)
        logits[mask] = -torch.inf
        ids[place] = int(
            draw(Proposal(), logits[None], hash_uniform(3, Stream.CATEGORICAL, canvas.sample_id, place, 0)[None]).x0
        )
    return ids


@pytest.mark.parametrize("name", ["masked", "shifted"])
def test_guidance_follows_a_naive_loop_and_counts_two_passes_for_one(doubles: dict[str, OpenModel], name: str) -> None:
    model, calls = doubles[name], []
    canvases = [*_prompts(model)[1:4], *_gaps(model)]
    with torch.no_grad():
        wanted = [_naive_guided(model, canvas, 1.5) for canvas in canvases]
    assert [one.ids for one in _all(model, canvases, replace(STEPWISE, guidance=1.5))] == wanted
    assert [one.ids for one in _all(model, canvases, STEPWISE)] != wanted
    handle = model.denoiser.embedding.register_forward_hook(lambda _, args, out: calls.append(len(args[0])))
    try:
        (filled,) = _all(model, canvases[:1], replace(STEPWISE, guidance=1.5))
    finally:
        handle.remove()
    assert calls == [2] * 8  # both branches are one pass of two rows
    assert filled.nfe == 16


def test_windows_have_the_same_prompt_under_guidance(doubles: dict[str, OpenModel]) -> None:
    """What a window has filled is no prompt of the next."""
    model, config = doubles["masked"], replace(STEPWISE, guidance=1.0, block_size=1, temperature=0.0)
    (canvas,) = [prompted(model, (20, 21, 22), 4, 0)]
    ids = list(canvas.ids)
    for place in range(3, 7):
        bare = [model.mask_token_id] * 3 + ids[3:]
        c, u = (model.denoiser(torch.tensor([row]))[place] for row in (ids, bare))
        logits = 2 * c - u
        logits[model.mask_token_id] = -torch.inf
        ids[place] = int(logits.argmax())
    assert _all(model, [canvas], config)[0].ids == ids


@pytest.mark.parametrize("name", ["masked", "shifted"])
def test_no_guidance_is_the_plain_sampler_bit_for_bit(doubles: dict[str, OpenModel], name: str) -> None:
    """Its context with w 0 gives the same logits, and w 0 takes no second branch."""
    model, seen = doubles[name], []

    def look(logits: torch.Tensor, sample_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return logits

    (canvas,) = _prompts(model)[1:2]
    plain = _all(model, [canvas], STEPWISE, change=look)
    zero = _all(model, [canvas], replace(STEPWISE, guidance=0.0), change=look)
    assert plain == zero
    assert all(torch.equal(a, b) for a, b in zip(seen[:8], seen[8:], strict=True))


# Ends of texts


@pytest.mark.parametrize("name", ["masked", "blocks", "next"])
def test_a_row_ends_with_its_first_end_and_its_text_before_it(doubles: dict[str, OpenModel], name: str) -> None:
    model = doubles[name]
    eos = model.vocabulary.special.eos_token_id
    windows = {"block_size": BLOCK} if name == "masked" else {}
    config = replace(_config(name), ends_at_eos=True, **windows)

    def ends_at_nine(logits: torch.Tensor, sample_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        wanted = torch.where(positions == 9, eos, 40 + positions)
        return torch.nn.functional.one_hot(wanted, logits.shape[1]) * 1e4

    canvas = prompted(model, (eos, 20, 21, 22), 16, 0)
    (filled,) = _all(model, [canvas], config, change=ends_at_nine, keep_frames=True)
    drawn = [44, 45, 46, 47, 48]
    assert filled.ids == [eos, 20, 21, 22, *drawn, *[eos] * 11] if name == "next" else filled.ids[9:] == [eos] * 11
    assert filled.frames[-1] == filled.ids
    assert before_end(drawn_ids(model, canvas, filled), eos) == drawn
    assert filled.nfe == {"masked": 8, "blocks": 8 + 2, "next": 6}[name]


@pytest.mark.parametrize("name", KINDS)
def test_suppressed_tokens_are_never_drawn(doubles: dict[str, OpenModel], name: str) -> None:
    model, special = doubles[name], doubles[name].vocabulary.special
    allowed = {30, 31, 32}
    suppressed = tuple(i for i in range(special.vocab_size) if i not in {*allowed, special.eos_token_id})
    config = replace(_config(name), suppressed=suppressed, suppresses_eos=True)
    (filled,) = _all(model, [prompted(model, (5, 6), 20, 0)], config)
    assert set(filled.ids[2:]) == allowed


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig("threshold", tau=0.015),
        SamplerConfig("factor", factor=2.93),
        SamplerConfig("entropy_bound", gamma=6.8),
    ],
    ids=lambda sampler: sampler.kind,
)
def test_looking_less_often_makes_more_passes_and_the_same_rows(
    doubles: dict[str, OpenModel], sampler: SamplerConfig
) -> None:
    """Of settings that take several tokens in most passes."""
    cached: dict[str, Any] = {"block_size": BLOCK, "cache": "dual", "refresh_every": 2}
    found: dict[int, list[Filled]] = {1: [], 5: []}
    heard: dict[int, list[int]] = {1: [], 5: []}
    for name, options in [("masked", {}), ("masked", cached), ("blocks", {"ends_at_eos": True})]:
        canvases = [prompted(doubles[name], range(20, 20 + n), 3 * BLOCK, n) for n in (0, 4, 8, 16)]
        for look_every, told in heard.items():
            config = SamplingConfig(replace(sampler, look_every=look_every), temperature=1.0, noise_seed=3, **options)
            hear = lambda n, rows, told=told: told.append(n)  # noqa: E731
            found[look_every] += _all(doubles[name], canvases, config, keep_frames=True, on_pass=hear)
    assert found[1] == found[5]
    assert len(heard[1]) < len(heard[5])


@pytest.mark.parametrize("kind", [kind for kind, settings in TAKES.items() if "takes_eos_last" in settings])
def test_the_end_of_a_text_is_the_surest_of_all_unless_it_is_to_be_taken_last(
    doubles: dict[str, OpenModel], kind: Kind
) -> None:
    """Where every even position is an end, and nobody knows what the others are."""
    model = doubles["masked"]
    eos = model.vocabulary.special.eos_token_id

    def change(logits: torch.Tensor, sample_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        is_end = torch.arange(logits.shape[1]) == eos
        return torch.where(is_end == (positions % 2 == 0)[:, None], 0.0, -torch.inf)

    seen: list[bool] = []
    for takes_eos_last in (False, True):
        config = SamplingConfig(SamplerConfig(kind, takes_eos_last=takes_eos_last), temperature=1.0)
        (filled,) = _all(model, [Canvas([5, *[model.mask_token_id] * 12], 0)], config, change=change, keep_frames=True)
        first = next(frame for frame in filled.frames if eos in frame)
        seen.append(all(i != model.mask_token_id for i in first[1::2]))
    assert seen == [False, True]


# Prompts


def test_a_prompt_is_cut_from_the_left_where_it_leaves_no_room(doubles: dict[str, OpenModel]) -> None:
    for name, model in doubles.items():
        mask, eos = model.mask_token_id, model.vocabulary.special.eos_token_id
        assert prompted(model, range(20, 60), 12, 5) == Canvas([*range(40, 60), *[mask] * 12], 5, num_cut=20), name
        assert prompted(model, range(20, 25), 12, 5) == Canvas([*range(20, 25), *[mask] * 12], 5)
        assert prompted(model, (), 3, 5).ids == ([eos] if name == "shifted" else []) + [mask] * 3
        with pytest.raises(UserError, match="33 tokens are to be drawn, but rows of the model have 32"):
            prompted(model, (5,), 33, 0)
    with pytest.raises(UserError, match=r"32 tokens are to be drawn, .* of which the first must be given; ask for"):
        prompted(doubles["shifted"], (5,), 32, 0)


# Bad input


@pytest.mark.parametrize(
    ("name", "ids", "changes", "words"),
    [
        ("masked", [0] * 33, {}, "a row has 33 tokens, those of the model have 32"),
        ("shifted", [0, 5], {}, "the first token of a row is masked, which a shifted model cannot predict"),
        ("next", [5, 0, 6], {}, "text stands behind a mask, which a model that predicts the next token does not see"),
        ("blocks", [5, 0, 6, 7, 8], {}, "1 tokens stand behind the block of the last mask"),
        ("masked", [0, 0], {"guidance": 1.0}, "guidance is 1.0, but nothing is given"),
        ("shifted", [1, 0], {"guidance": 1.0}, "guidance is 1.0, but nothing is given"),
        ("blocks", [5, 0], {"guidance": 1.0}, "guidance is 1.0, but the model is of blocks"),
        ("next", [5, 0], {"guidance": 1.0}, "guidance is 1.0, but the model predicts the next token"),
        ("next", [5, 0], {"block_size": 4}, "block_size is 4, but the model predicts the next token"),
        ("next", [5, 0], {"cache": "none"}, "cache is 'none', but the model predicts the next token"),
        ("next", [5, 0], {"sampler": SamplerConfig("random")}, "sampler is 'random', but the model predicts"),
        ("blocks", [5, 0], {"block_size": 8}, "block_size is 8, but the model was trained on blocks of 4"),
        ("blocks", [5, 0], {"cache": "dual"}, 'cache is "dual", an approximation for models of full attention'),
        ("masked", [5, 0, 0, 0], {"block_size": 2}, "a row has 3 tokens from its first mask on, which windows of 2"),
        ("masked", [5, 0], {"suppressed": (300,)}, r"suppressed has the id 300; the model has the ids 0\.\.299"),
        ("masked", [5, 0], {"suppressed": tuple(range(300))}, "leaves no token to draw"),
    ],
)
def test_what_a_model_cannot_fill_or_use_is_refused_before_any_pass(
    doubles: dict[str, OpenModel], name: str, ids: list[int], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        next(fill(doubles[name], [Canvas([5, 6], 0), Canvas(ids, 1)], replace(PLAIN, **changes)))


def test_an_end_that_is_never_drawn_cannot_be_taken_last(doubles: dict[str, OpenModel]) -> None:
    model = doubles["masked"]
    end = model.vocabulary.special.eos_token_id
    config = SamplingConfig(SamplerConfig("confidence", takes_eos_last=True), temperature=1.0, suppressed=(end,))
    with pytest.raises(UserError, match=f"suppressed has the end of a text, {end}, which is then never drawn"):
        _all(model, [Canvas([5, model.mask_token_id], 0)], config)
