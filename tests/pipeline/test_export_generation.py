"""Generation of exported models: which masks go when, and what they become, on models whose output is known."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dlm_core.models.attention import AttentionMask
from pipeline.export.hf.diffusion_generation import DiffusionGenerationMixin
from tests.support.hf_exports import EOS, EXPORTS, MASK, PAD, V, config_of, random_model

IDS = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": PAD}


class Known(DiffusionGenerationMixin):
    """A model that says the same token and is as sure of it wherever it is asked, by position; it notes what it saw."""

    def __init__(self, sureness: Tensor | None = None, tokens: Tensor | None = None, **settings: Any) -> None:
        self.config = SimpleNamespace(**{**IDS, "block_size": 4, **settings})
        self.generation_config = SimpleNamespace()
        self.sureness = torch.linspace(1.0, 2.0, 64) if sureness is None else sureness
        self.tokens = 5 + torch.arange(64) % 7 if tokens is None else tokens
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Any:
        self.seen.append(input_ids.clone())
        logits = torch.zeros(*input_ids.shape, V)
        logits.scatter_(2, self.tokens[position_ids][..., None], self.sureness[position_ids][..., None])
        logits[..., MASK] = 100.0  # which must never be drawn
        return SimpleNamespace(logits=logits)

    def numbers_of_masks(self, begin: int) -> list[int]:
        return [int((x[0, begin:] == MASK).sum()) for x in self.seen]


def _prompt(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def test_a_prompt_is_kept_whatever_it_holds_and_no_mask_is_left():
    prompt = _prompt([MASK, EOS, 7, MASK], [5, PAD, EOS, 6])
    found = Known().diffusion_generate(prompt, max_new_tokens=6)
    assert torch.equal(found[:, :4], prompt)
    assert found[:, 4:].tolist() == [[9, 10, 11, 5, 6, 7]] * 2


@pytest.mark.parametrize("order", ["confidence", "entropy"])
def test_masks_of_which_the_model_is_surest_go_first(order):
    sureness = torch.tensor([0.0, 0.0, 3.0, 1.0, 5.0, 2.0, 4.0])
    model = Known(sureness)
    model.diffusion_generate(_prompt([5, 6]), max_new_tokens=5, order=order)
    order_seen = [int((b != a).nonzero()[0, 1]) for a, b in zip(model.seen, model.seen[1:], strict=False)]
    assert order_seen == [4, 6, 2, 5]


def test_entropy_and_confidence_differ_where_the_likeliest_token_does_not_say_all():
    """Position 1 has the likelier token, position 2 the lower entropy: two tokens share nearly everything there."""
    logits = torch.full((3, V), -9.0)
    logits[1, 5], logits[1, 6:] = 3.0, 0.0
    logits[2, 5], logits[2, 6] = 3.0, 3.1
    probs = logits.softmax(-1)
    assert probs[1].max() > probs[2].max()
    assert torch.special.entr(probs[1]).sum() > torch.special.entr(probs[2]).sum()

    class Two(Known):
        def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Any:
            self.seen.append(input_ids.clone())
            return SimpleNamespace(logits=logits[position_ids])

    for order, first in (("confidence", 1), ("entropy", 2)):
        model = Two()
        model.diffusion_generate(_prompt([5]), max_new_tokens=2, order=order)
        assert int((model.seen[1] != model.seen[0]).nonzero()[0, 1]) == first


@pytest.mark.parametrize(
    ("steps", "left"),
    [(None, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]), (4, [10, 7, 4, 2]), (1, [10]), (30, list(range(10, 0, -1)))],
)
def test_steps_share_the_masks_and_the_larger_shares_come_first(steps, left):
    model = Known()
    found = model.diffusion_generate(_prompt([5, 6]), max_new_tokens=10, steps=steps)
    assert model.numbers_of_masks(2) == left
    assert not (found == MASK).any()


def test_masks_above_the_threshold_go_at_once():
    sureness = torch.tensor([9.0, 0.5, 9.0, 9.0, 0.4, 0.3, 9.0])
    model = Known(sureness)
    model.diffusion_generate(_prompt([5]), max_new_tokens=6, threshold=0.9)
    assert model.numbers_of_masks(1) == [6, 3, 2, 1]


def test_blocks_are_filled_one_after_the_other_with_their_part_of_the_steps():
    model = Known()  # surest of the last position
    model.diffusion_generate(_prompt([5, 6]), max_new_tokens=6, block_length=3, steps=5)
    assert model.numbers_of_masks(2) == [6, 5, 4, 3, 1]
    assert (model.seen[3][0, 2:] == MASK).tolist() == [False] * 3 + [True] * 3


def test_shifted_model_predicts_the_next_token():
    class Shifted(Known):
        predicts_next = True

    plain, shifted = (kind().diffusion_generate(_prompt([5, 6]), max_new_tokens=5) for kind in (Known, Shifted))
    assert plain[0, 2:].tolist() == [7, 8, 9, 10, 11]
    assert shifted[0, 2:].tolist() == [6, 7, 8, 9, 10]  # what stands at position i is what i - 1 says


def test_dream_continues_a_chain_in_the_order_of_entropy():
    """Hand-made weights: token t says t + 1 and a mask says nothing, so only the place behind a token is certain."""
    from pipeline.export.hf.configuration_dream import DreamConfig
    from pipeline.export.hf.modeling_dream import DreamModel

    size = V + 1  # even, as a head must be
    sizes = {"vocab_size": size, "hidden_size": size, "intermediate_size": 4, "num_hidden_layers": 1}
    config = DreamConfig(**sizes, **IDS, num_attention_heads=1, num_key_value_heads=1)
    model = DreamModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.embed_tokens.weight[MASK] = 0.0
        for token in range(5, V):
            model.lm_head.weight[token + 1 if token + 1 < V else 5, token] = 3.0
    found = model.generate(_prompt([9, 12], [5, 17]), max_new_tokens=6)
    assert found.tolist() == [[9, 12, 13, 14, 15, 16, 17, 18], [5, 17, 18, 5, 6, 7, 8, 9]]


class BlockCausal(Known):
    is_block_causal = True


def test_blocks_of_a_block_causal_model_are_counted_from_the_first_token_of_a_row():
    model = BlockCausal()
    model.diffusion_generate(_prompt([5, 6, 7]), max_new_tokens=7)
    assert [x.shape[1] for x in model.seen] == [4, 8, 8, 8, 8, 10, 10]
    model = BlockCausal()
    found = model.diffusion_generate(
        _prompt([PAD, PAD, 5], [5, 6, 7]), torch.tensor([[0, 0, 1], [1, 1, 1]]), max_new_tokens=5
    )
    assert found.tolist() == [[PAD, PAD, 5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 10, 11, 5]]


def _llada2() -> tuple[Any, Any]:
    """LLaDA2 of the exports with random weights, and our denoiser with the same."""
    from pipeline.export.hf.configuration_llada2_moe import LLaDA2MoeConfig
    from pipeline.export.hf.modeling_llada2_moe import LLaDA2MoeModelLM
    from pipeline.hf_names import to_family

    family, architecture = EXPORTS["llada2"]
    ours = random_model(architecture)
    theirs = LLaDA2MoeModelLM(LLaDA2MoeConfig(**config_of(family, ours.config))).eval()
    theirs.load_state_dict(to_family(family, architecture, ours.state_dict()), strict=True)
    return theirs, ours


def test_later_blocks_of_llada2_never_change_earlier_ones():
    model, _ = _llada2()
    prompt = torch.randint(5, V, (3, 6), generator=torch.Generator().manual_seed(0))
    short, long = (model.generate(prompt, max_new_tokens=n, eos_token_id=[]) for n in (2, 14))
    assert torch.equal(long[:, :8], short)
    ten = model.generate(prompt, max_new_tokens=10, eos_token_id=[])
    assert torch.equal(long[:, :16], ten)


def test_llada2_generates_with_the_logits_of_our_denoiser_and_its_block_causal_mask():
    model, ours = _llada2()
    real = torch.arange(V) != MASK
    errors: list[float] = []
    full: list[float] = []

    def compare(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        x = torch.nn.functional.pad(kwargs["input_ids"], (0, -kwargs["input_ids"].shape[1] % 4), value=MASK)
        length = kwargs["input_ids"].shape[1]
        wanted = ours(x, mask=AttentionMask("block_causal", block_size=4)).view(*x.shape, V)[:, :length]
        errors.append(float((output.logits - wanted)[..., real].abs().max()))
        full.append(float((output.logits - ours(x).view(*x.shape, V)[:, :length])[..., real].abs().max()))

    model.register_forward_hook(compare, with_kwargs=True)
    prompt = torch.randint(5, V, (2, 5), generator=torch.Generator().manual_seed(0))
    model.generate(prompt, max_new_tokens=11, eos_token_id=[])
    assert len(errors) == 11
    assert max(errors) <= 1e-5
    assert max(full) > 1e-3  # else the mask was not applied


def test_behind_an_end_of_text_there_is_padding_and_blocks_behind_it_are_not_computed():
    tokens = torch.full((64,), 7)
    tokens[5] = EOS
    model = Known(tokens=tokens)
    found = model.diffusion_generate(_prompt([EOS, 6]), max_new_tokens=12, block_length=4)
    assert found.tolist() == [[EOS, 6, 7, 7, 7, EOS, *[PAD] * 8]]
    assert len(model.seen) == 4
    found = Known(tokens=tokens).diffusion_generate(
        _prompt([5, 6]), max_new_tokens=6, eos_token_id=[9, 7], pad_token_id=3
    )
    assert found.tolist() == [[5, 6, 7, 3, 3, 3, 3, 3]]
    found = Known(tokens=tokens).diffusion_generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=6)
    assert found.tolist() == [[7] * 5 + [EOS]]  # the last token has nothing behind it
    found = Known(tokens=tokens, eos_token_id=None).diffusion_generate(_prompt([5, 6]), max_new_tokens=6)
    assert found.tolist() == [[5, 6, 7, 7, 7, EOS, 7, 7]]
    found = Known(tokens=tokens, pad_token_id=None).diffusion_generate(_prompt([5, 6]), max_new_tokens=6)
    assert found.tolist() == [[5, 6, 7, 7, 7, EOS, EOS, EOS]]


def test_ids_of_the_generation_config_go_before_those_of_the_config():
    tokens = torch.full((64,), 7)
    tokens[4] = 9
    model = Known(tokens=tokens, mask_token_id=None)
    model.generation_config = SimpleNamespace(mask_token_id=MASK, eos_token_id=[9], pad_token_id=3)
    assert model.diffusion_generate(_prompt([5, 6]), max_new_tokens=5).tolist() == [[5, 6, 7, 7, 9, 3, 3]]


@pytest.mark.parametrize(
    ("options", "share"),
    [({"temperature": 1.0}, 0.7), ({"temperature": 0.5}, 0.49 / 0.58), ({"temperature": 1.0, "top_p": 0.6}, 1.0)],
)
def test_tokens_are_drawn_from_the_tempered_and_cut_distribution(options, share):
    class Two(Known):
        def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Any:
            logits = torch.full((*input_ids.shape, V), -torch.inf)
            logits[..., 7], logits[..., 8] = torch.tensor([0.7, 0.3]).log()
            return SimpleNamespace(logits=logits)

    n = 20_000
    answers = [
        Two().diffusion_generate(_prompt([5]), max_new_tokens=n, steps=1, seed=s, **options)[0, 1:] for s in (0, 1)
    ]
    found = float((answers[0] == 7).double().mean())
    assert abs(found - share) <= 4 * (share * (1 - share) / n) ** 0.5
    assert torch.equal(answers[0], answers[1]) == (share == 1.0)
    torch.manual_seed(0)
    unseeded = Two().diffusion_generate(_prompt([5]), max_new_tokens=n, steps=1, **options)
    assert torch.equal(unseeded[0, 1:], answers[0])  # torch's own generator with the same seed


def test_threshold_asks_for_the_probability_of_the_token_that_was_drawn():
    class Two(Known):
        def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Any:
            self.seen.append(input_ids.clone())
            logits = torch.full((*input_ids.shape, V), -torch.inf)
            logits[..., 7], logits[..., 8] = torch.tensor([0.7, 0.3]).log()
            return SimpleNamespace(logits=logits)

    model = Two()
    found = model.diffusion_generate(_prompt([5]), max_new_tokens=400, threshold=0.5, temperature=1.0, seed=0)
    unsure, drawn = model.numbers_of_masks(1)[1], int((found == 8).sum())
    assert 60 < unsure < 180  # those that drew the token of 0.3, of 400
    assert drawn <= len(model.seen) < 60  # a step takes one of them at most, and asks the others again


@pytest.mark.parametrize(
    ("stem", "name", "order", "predicts_next", "is_block_causal"),
    [
        ("llada", "LLaDAModelLM", "confidence", False, False),
        ("dream", "DreamModel", "entropy", True, False),
        ("lladamoe", "LLaDAMoEModelLM", "confidence", False, False),
        ("llada2_moe", "LLaDA2MoeModelLM", "confidence", False, True),
    ],
)
def test_each_family_generates_its_own_way_and_never_causally(stem, name, order, predicts_next, is_block_causal):
    model = getattr(importlib.import_module(f"pipeline.export.hf.modeling_{stem}"), name)
    assert (model.order, model.predicts_next, model.is_block_causal) == (order, predicts_next, is_block_causal)
    assert model.generate is model.diffusion_generate is DiffusionGenerationMixin.diffusion_generate
    assert model.can_generate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"block_length": 0}, "block_length is 0; it must be at least 1"),
        ({"steps": 1, "block_length": 2}, r"steps is 1; the answer has 2 block\(s\), and each needs a step"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p is 0\.0; it must lie in \(0, 1\]"),
        ({"threshold": 1.5}, r"threshold is 1\.5"),
        ({"top_p": 0.9}, r"top_p is 0\.9, which temperature 0 ignores"),
        ({"order": "random"}, 'order is "random"; it must be one of confidence, entropy'),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask is \[1, 3\]; wanted \[1, 2\]"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "attention_mask has padding behind tokens; pad on the left"),
        ({"input_ids": torch.tensor([5, 6])}, r"input_ids are \[2\]; wanted \[B, P\]"),
    ],
)
def test_setting_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Known().diffusion_generate(**{"input_ids": _prompt([5, 6]), "max_new_tokens": 4, **options})


def test_model_without_a_mask_token_is_refused():
    with pytest.raises(ValueError, match="no mask_token_id; give mask_token_id"):
        Known(mask_token_id=None).diffusion_generate(_prompt([5, 6]))


def test_shifted_model_needs_a_first_token_and_the_others_do_not():
    class Shifted(Known):
        predicts_next = True

    empty = torch.zeros(1, 0, dtype=torch.long)
    with pytest.raises(ValueError, match="a row of input_ids has no token"):
        Shifted().diffusion_generate(empty, max_new_tokens=3)
    with pytest.raises(ValueError, match="a row of input_ids has no token"):
        Shifted().diffusion_generate(_prompt([PAD], [5]), torch.tensor([[0], [1]]), max_new_tokens=3)
    assert Known().diffusion_generate(empty, max_new_tokens=3).tolist() == [[5, 6, 7]]
