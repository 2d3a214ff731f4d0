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
from pipeline.artifact import load_manifest
from pipeline.data.vocabulary import load_vocabulary
from pipeline.inference.filling import Canvas, Filled, fill, prompted
from pipeline.inference.model import OpenModel, open_model
from pipeline.inference.sampler import SamplerConfig
from pipeline.inference.sampling import SamplingConfig
from tests.support.exports import LLAMA
from tests.support.interchange import drawn, random_model, save_model
from tests.support.tiny_run import Artifacts, make_artifacts

pytestmark = pytest.mark.timeout(120)
SEQ_LEN, BLOCK = 32, 4
RECORDS: dict[str, dict[str, Any]] = {
    "masked": {},
    "shifted": {"target_offset": 1},
    "blocks": {"objective": "block_nelbo", "block_size": BLOCK},
    "next": {"objective": "autoregressive_nll"},
}
STEPWISE = SamplingConfig(SamplerConfig("first_hitting"), temperature=1.0, noise_seed=3)
PLAIN = SamplingConfig(temperature=1.0, noise_seed=3)
"""What a model of next tokens takes."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return make_artifacts(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def models(made: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, OpenModel]:
    """One of each kind, in float64."""
    special = load_vocabulary(made.tokenizer).special
    root = tmp_path_factory.mktemp("weights")
    opened = {}
    for name, record in RECORDS.items():
        model = random_model(drawn(LLAMA), special.vocab_size, special.mask_token_id)
        weights = save_model(root / name, model, tokenizer=load_manifest(made.tokenizer).fingerprint, **record)
        opened[name] = open_model(weights, made.tokenizer, "cpu")
        opened[name].denoiser.double()
    return opened


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


@pytest.mark.parametrize("name", RECORDS)
def test_prompts_are_continued_as_a_naive_loop_does_it(models: dict[str, OpenModel], name: str) -> None:
    model, naive = models[name], _naive_next_tokens if name == "next" else _naive_first_hitting
    canvases = _prompts(model)
    with torch.no_grad():
        wanted = [naive(model, canvas, 3) for canvas in canvases]
    found = _all(model, canvases, _config(name))
    assert [filled.ids for filled in found] == wanted
    assert found[1].ids != found[7].ids


@pytest.mark.parametrize("name", ["masked", "shifted", "blocks"])
def test_gaps_are_filled_as_a_naive_loop_does_it_and_what_is_given_stays(
    models: dict[str, OpenModel], name: str
) -> None:
    model = models[name]
    canvases = _gaps(model)
    with torch.no_grad():
        wanted = [_naive_first_hitting(model, canvas, 3) for canvas in canvases]
    found = _all(model, canvases, STEPWISE)
    assert [filled.ids for filled in found] == wanted
    for canvas, filled in zip(canvases, found, strict=True):
        assert all(new == old or old == model.mask_token_id for new, old in zip(filled.ids, canvas.ids, strict=True))


@pytest.mark.parametrize("sampler", [SamplerConfig("first_hitting"), SamplerConfig("remdm", num_steps=9, eta=0.3)])
@pytest.mark.parametrize("name", RECORDS)
def test_a_canvas_is_filled_alike_in_any_batch_order_and_company(
    models: dict[str, OpenModel], name: str, sampler: SamplerConfig
) -> None:
    model = models[name]
    config = PLAIN if name == "next" else replace(STEPWISE, sampler=sampler)
    canvases = _prompts(model) + (_gaps(model) if name != "next" else [])
    together = _all(model, canvases, config, keep_frames=True)
    for batch_rows in (1, 3):
        assert _all(model, canvases, replace(config, batch_rows=batch_rows), keep_frames=True) == together
    assert _all(model, canvases[::-1], config, keep_frames=True) == together[::-1]
    for canvas, filled in zip(canvases, together, strict=True):
        assert _all(model, [canvas], config, keep_frames=True) == [filled]


# Costs and frames


@pytest.mark.parametrize(("name", "commits"), [("masked", 0), ("shifted", 0), ("blocks", 2), ("next", 0)])
def test_every_forward_pass_is_counted(models: dict[str, OpenModel], name: str, commits: int) -> None:
    """A pass a token; of a model of blocks one more for the prompt and for each block but the last."""
    model, calls = models[name], []
    handle = model.denoiser.embedding.register_forward_hook(lambda *_: calls.append(1))
    try:
        (filled,) = _all(model, [prompted(model, range(20, 24), 8, 5)], _config(name))
    finally:
        handle.remove()
    assert filled.nfe == len(calls) == 8 + commits


@pytest.mark.parametrize("name", RECORDS)
def test_frames_are_the_row_before_each_of_its_passes_and_at_the_end(models: dict[str, OpenModel], name: str) -> None:
    model = models[name]
    canvases = _prompts(model)
    for canvas, filled in zip(canvases, _all(model, canvases, _config(name), keep_frames=True), strict=True):
        assert filled.frames[0] == canvas.ids
        assert filled.frames[-1] == filled.ids
        for earlier, later in pairwise(filled.frames):
            changed = [i for i, (a, b) in enumerate(zip(earlier, later, strict=True)) if a != b]
            assert all(earlier[i] == model.mask_token_id for i in changed)
            assert len(changed) == 1 or (name == "blocks" and not changed)  # a token behind the row


@pytest.mark.parametrize("name", RECORDS)
def test_a_canvas_without_a_mask_costs_nothing(models: dict[str, OpenModel], name: str) -> None:
    found = _all(models[name], [Canvas([5, 6, 7], 0, num_cut=2), Canvas([], 1)], PLAIN, keep_frames=True)
    assert found == [Filled([5, 6, 7], 0, 2, [[5, 6, 7]]), Filled([], 0, 0, [[]])]


@pytest.mark.parametrize("name", RECORDS)
def test_each_pass_is_heard_of_with_the_rows_of_its_batch(models: dict[str, OpenModel], name: str) -> None:
    model, heard = models[name], []
    canvases = [prompted(model, (20, 21), 6, 0), prompted(model, (22, 23), 6, 1), prompted(model, (20,), 3, 2)]
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


@pytest.mark.parametrize("name", RECORDS)
def test_a_change_of_logits_knows_sample_and_position(models: dict[str, OpenModel], name: str) -> None:
    """Token 30 + position for odd samples, 60 + position for others."""
    model = models[name]

    def change(logits: torch.Tensor, sample_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        wanted = torch.where(sample_ids % 2 == 1, 30, 60) + positions
        return torch.nn.functional.one_hot(wanted, logits.shape[1]) * 1e4

    canvases = [prompted(model, (5, 6), 7, 1), prompted(model, (5, 6), 7, 2), prompted(model, (5,), 4, 3)]
    found = _all(model, canvases, _config(name), change=change)
    for canvas, filled in zip(canvases, found, strict=True):
        for place, (old, new) in enumerate(zip(canvas.ids, filled.ids, strict=True)):
            base = 30 if canvas.sample_id % 2 else 60
            assert new == (base + place if old == model.mask_token_id else old)
