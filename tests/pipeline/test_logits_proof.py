"""What a process of its own returns or raises comes back as it was; logits are compared to the last bit."""

import os
from pathlib import Path

import pytest
import torch

from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.transformer import Denoiser
from pipeline.errors import CorruptionError, UserError
from pipeline.logits_proof import check_equal, in_fresh_process, logits_of, pseudo_tokens

HERE = "tests.support.fresh"


def test_a_value_comes_back_from_another_process(tmp_path: Path):
    value = in_fresh_process(f"{HERE}:answer", "a b", tmp_path)
    assert value["given"] == ["a b", str(tmp_path)]
    assert value["pid"] != os.getpid()


@pytest.mark.parametrize(
    ("function", "given", "kind", "words"),
    [
        ("refuse", ["user"], UserError, "^about user$"),
        ("refuse", ["corruption"], CorruptionError, "^about corruption$"),
        ("refuse", ["other"], RuntimeError, "refuse failed in a process of its own:(.|\n)*KeyError: 'about other'"),
        ("be_killed", [], MemoryError, "be_killed was killed in a process of its own.*set proof=tensors"),
        ("absent", [], RuntimeError, "has no attribute 'absent'"),
    ],
)
def test_an_error_there_is_an_error_here(function: str, given: list[str], kind: type[Exception], words: str):
    with pytest.raises(kind, match=words):
        in_fresh_process(f"{HERE}:{function}", *given)


def test_who_needs_the_memory_says_what_else_would_do():
    with pytest.raises(MemoryError, match=r"where memory is short: it held a planet\. Take a smaller one$"):
        in_fresh_process(f"{HERE}:be_killed", less_memory="it held a planet. Take a smaller one")


def test_tokens_are_the_same_at_every_call_and_all_over_the_vocabulary():
    tokens = pseudo_tokens(50)
    assert torch.equal(tokens, pseudo_tokens(50))
    assert tokens.shape == (2, 48)
    assert 0 <= tokens.min() < 10 < 40 < tokens.max() < 50


@pytest.mark.parametrize("time_conditioning", [False, True])
def test_logits_are_those_of_the_model_whoever_sees_whom(time_conditioning: bool):
    cond_dim = 4 if time_conditioning else None
    a = Architecture(16, 2, 2, d_ff=16, cond_dim=cond_dim, time_conditioning=time_conditioning, tied_head=True)
    model = Denoiser(ModelConfig(a, 23, 22)).eval()
    for parameter in model.parameters():  # fresh, the gates of adaLN-zero would let nothing of the attention through
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    tokens = pseudo_tokens(23)
    full, causal = logits_of(model, tokens), logits_of(model, tokens, "causal")
    assert full.shape == (*tokens.shape, 23)
    check_equal(full, logits_of(model, tokens), "they")
    assert not torch.equal(full, causal)


def test_logits_that_differ_in_one_bit_are_told_with_how_many_and_how_far():
    wanted = torch.tensor([[1.0, -torch.inf, 3.0]])
    check_equal(wanted.clone(), wanted, "the weights")
    found = wanted.clone()
    found[0, 2] += 2**-22
    with pytest.raises(CorruptionError, match=r"^the weights do not give .*: 1 of 3 differ, by up to 2\.38419e-07$"):
        check_equal(found, wanted, "the weights")
    with pytest.raises(CorruptionError, match="1 of 3 differ"):
        check_equal(torch.tensor([[1.0, torch.nan, 3.0]]), wanted, "the weights")
