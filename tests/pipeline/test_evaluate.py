"""The held-out bound: exact where it can be, the same however it is cut up, over every token of the split."""

import json
import lzma
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from torch import Tensor

from pipeline.artifact import MANIFEST, Manifest, checked_files, load_manifest, record_files, write_json
from pipeline.data.shards import open_stream
from pipeline.data.vocabulary import load_vocabulary
from pipeline.errors import UserError
from pipeline.evaluate.config import STAGE, EvaluateConfig
from pipeline.held_out import HeldOutRows, Questions
from pipeline.inference.model import forget_models
from pipeline.scoring import Scoring
from pipeline.weights import load_denoiser, save_weights
from tests.support.tiny_run import Artifacts, make_artifacts, run_stage

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("torch_settings")]
CUTS = 1e-8
"""Relative bar for other shards and batches, whose float32 products sum in another order: 3e-10 is found.

One mask drawn differently would show at 1e-4.
"""


def evaluate(config: EvaluateConfig, weights: Path, made: Artifacts, out: Path) -> dict[str, Any]:
    """Results of an evaluation."""
    inputs = {"weights": weights, "tokens": made.tokens, "tokenizer": made.tokenizer, "corpus": made.corpus}
    run_stage(STAGE, config, inputs, out)
    results = json.loads((out / "results.json").read_text())
    assert results == load_manifest(out).stats
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, weights: Path, made: Artifacts) -> dict[str, Any]:
    """An evaluation of the trained model with the defaults."""
    return evaluate(EvaluateConfig(), weights, made, tmp_path_factory.mktemp("evaluate") / "out")


def changed(weights: Path, directory: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Weights with other values in a committed artifact of their own."""
    model, record = load_denoiser(weights)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    change(tensors)
    directory.mkdir()
    save_weights(directory, tensors, record)
    write_json(directory / MANIFEST, Manifest("convert", "0" * 64, 1, {}, {}, record_files(directory)))
    return directory


def held_out(artifact: Path, column: str) -> list[Any]:
    """A column of the held-out split."""
    found: list[Any] = []
    for path in sorted(artifact.glob("held_out-*.arrow")):
        with pa.OSFile(str(path)) as source:
            found += pa.ipc.open_file(source).read_all().column(column).to_pylist()
    return found


@pytest.mark.parametrize(("num_shards", "batch_rows"), [(1, 1), (1, 1000), (7, 5), (1000, 3)])
def test_shards_and_batches_do_not_change_the_result(
    results: dict[str, Any], weights: Path, made: Artifacts, tmp_path: Path, num_shards: int, batch_rows: int
) -> None:
    config = EvaluateConfig(num_shards=num_shards, batch_rows=batch_rows)
    found = evaluate(config, weights, made, tmp_path / "out")
    assert found.keys() == results.keys()
    for name, value in results.items():
        # a standard error is a difference of sums, a perplexity an exponential: what is small in nelbo grows there
        slack = CUTS * results["nelbo"] * (value if name == "ppl_bound" else name.endswith("_se"))
        assert found[name] == pytest.approx(value, rel=CUTS, abs=slack), name


def test_a_process_reads_the_weights_once_for_all_its_shards(
    weights: Path, made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(
        "pipeline.inference.model.load_denoiser", lambda path: (opened.append(path), load_denoiser(path))[1]
    )
    forget_models()
    evaluate(EvaluateConfig(num_shards=5, device="cpu"), weights, made, tmp_path / "out")
    assert len(list((tmp_path / "out.state" / "shards").iterdir())) == 5
    assert opened == [weights]


def test_every_held_out_token_counts_those_of_the_last_partial_row_too(
    results: dict[str, Any], made: Artifacts
) -> None:
    documents = held_out(made.tokens, "tokens")
    num_tokens = sum(map(len, documents))
    assert num_tokens % 32, "the last row is full: a weak test"
    assert results["num_tokens"] == num_tokens == load_manifest(made.tokens).stats["held_out_tokens"]
    assert results["num_docs"] == len(documents)


def test_yardsticks_are_those_recomputed_from_the_text(results: dict[str, Any], made: Artifacts) -> None:
    text = "".join(held_out(made.corpus, "text")).encode()
    counts = Counter(token for document in held_out(made.tokens, "tokens") for token in document)
    total = sum(counts.values())
    entropy = -math.fsum(n / total * math.log(n / total) for n in counts.values())
    compressed = lzma.compress(text, preset=9)
    assert lzma.decompress(compressed) == text
    assert results["num_bytes"] == len(text)
    assert results["unigram_entropy"] == pytest.approx(entropy, rel=1e-12)
    assert results["unigram_bpb"] == pytest.approx(entropy * total / len(text) / math.log(2), rel=1e-12)
    assert results["xz_bytes"] == len(compressed)
    assert results["xz_bpb"] == pytest.approx(8 * len(compressed) / len(text), rel=1e-12)


def test_units_fit_together(results: dict[str, Any]) -> None:
    bits_per_byte = results["num_tokens"] / results["num_bytes"] / math.log(2)
    assert results["bpb_bound"] == pytest.approx(results["nelbo"] * bits_per_byte, rel=1e-12)
    assert results["bpb_bound_mc_se"] == pytest.approx(results["nelbo_mc_se"] * bits_per_byte, rel=1e-12)
    assert results["ppl_bound"] == pytest.approx(math.exp(results["nelbo"]), rel=1e-12)
    assert 0 < results["nelbo_mc_se"] < 0.02 * results["nelbo"]
    assert results["nelbo_doc_se"] > 0


def test_a_trained_model_is_better_than_uniform(results: dict[str, Any], weights: Path) -> None:
    assert results["nelbo"] < math.log(load_denoiser(weights)[1].model.vocab_size - 1) - 0.3


def test_uniform_logits_cost_log_of_the_real_vocabulary_without_noise(
    weights: Path, made: Artifacts, tmp_path: Path
) -> None:
    def forget_everything(tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            tensor.zero_()

    zero = changed(weights, tmp_path / "zero", forget_everything)
    found = evaluate(EvaluateConfig(), zero, made, tmp_path / "out")
    vocab_size = load_manifest(made.tokenizer).stats["vocab_size"]
    assert found["nelbo"] == pytest.approx(math.log(vocab_size - 1), abs=1e-6)
    assert found["nelbo_mc_se"] == pytest.approx(0.0, abs=1e-6)


def test_a_context_free_model_hits_its_closed_form(weights: Path, made: Artifacts, tmp_path: Path) -> None:
    def forget_context(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("attention.out.weight", "feed_forward.down.weight")):
                tensor.zero_()

    path = changed(weights, tmp_path / "weights", forget_context)
    found = evaluate(EvaluateConfig(num_replicates=32), path, made, tmp_path / "out")
    model, record = load_denoiser(path)
    tensors = {name: value.double() for name, value in model.state_dict().items()}
    mask_token_id = record.model.mask_token_id
    x = tensors["embedding.weight"][mask_token_id]
    x = x / (x.square().mean() + record.model.architecture.norm_eps).sqrt() * tensors["norm.weight"]
    logits = tensors["embedding.weight"] @ x
    logits[mask_token_id] = -math.inf
    cost = (-logits.log_softmax(dim=0)).tolist()
    stream = [token for document in held_out(made.tokens, "tokens") for token in document]
    exact = math.fsum(cost[token] for token in stream) / len(stream)
    assert exact != pytest.approx(math.log(record.model.vocab_size - 1), abs=0.05), "as good as uniform: a weak test"
    assert 0 < found["nelbo_mc_se"] < 0.01
    assert abs(found["nelbo"] - exact) < 4 * found["nelbo_mc_se"]
    assert found["nelbo"] > found["unigram_entropy"] - 4 * found["nelbo_mc_se"]  # the floor of every such model


def test_replicates_mask_other_places_not_only_other_numbers_of_them(made: Artifacts) -> None:
    rows = HeldOutRows(open_stream(checked_files(made.tokens, "held_out-*.arrow")), 32)
    special = load_vocabulary(made.tokenizer).special
    masked: list[list[set[int]]] = []

    questions = Questions(rows, range(rows.num_rows), Scoring("masked_nelbo", 0, 1_000), special)
    for replicate in range(2):
        xt = questions.ask(list(range(rows.stream.num_tokens // 32)), replicate).xt
        masked.append([set(row.nonzero().flatten().tolist()) for row in xt == special.mask_token_id])
    telling = [(a, b) for a, b in zip(*masked, strict=True) if 4 <= len(a) <= 28 and 4 <= len(b) <= 28]
    nested = [(a, b) for a, b in telling if a <= b or b <= a]
    assert len(telling) > 20
    assert len(nested) < len(telling) / 4


def test_another_noise_seed_gives_another_estimate_within_the_error(
    results: dict[str, Any], weights: Path, made: Artifacts, tmp_path: Path
) -> None:
    found = evaluate(EvaluateConfig(noise_seed=5), weights, made, tmp_path / "out")
    assert found["nelbo"] != results["nelbo"]
    error = math.hypot(found["nelbo_mc_se"], results["nelbo_mc_se"])
    assert abs(found["nelbo"] - results["nelbo"]) < 5 * error


def test_inputs_of_another_run_are_refused(weights: Path, made: Artifacts, tmp_path: Path) -> None:
    other = make_artifacts(tmp_path, seed=1)
    mixtures = {
        "is not that of the weights": other,
        "made with another corpus": replace(made, corpus=other.corpus),
        "made with another tokenizer": replace(made, tokens=other.tokens),
    }
    for number, (words, mixture) in enumerate(mixtures.items()):
        with pytest.raises(UserError, match=words):
            evaluate(EvaluateConfig(), weights, mixture, tmp_path / f"out{number}")


@pytest.mark.parametrize(("field", "value"), [("num_replicates", 7), ("num_shards", 0), ("batch_rows", 0)])
def test_a_setting_out_of_range_names_the_field_and_the_value(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        EvaluateConfig(**{field: value})


def test_losses_of_documents_add_up_to_the_result(made: Artifacts, weights: Path, tmp_path: Path) -> None:
    results = evaluate(EvaluateConfig(device="cpu"), weights, made, tmp_path / "out")
    with np.load(tmp_path / "out" / "documents.npz") as found:
        losses, tokens = found["losses"], found["tokens"]
    assert losses.shape == (results["num_replicates"], results["num_docs"])
    assert tokens.tolist() == [len(document) for document in held_out(made.tokens, "tokens")]
    assert losses.mean(axis=0).sum() / tokens.sum() == pytest.approx(results["nelbo"], rel=1e-12)
    assert (losses.mean(axis=0) / tokens).std() > 0.01


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": -0.5}, r"gpus is -0\.5; it must lie in \[0, 1\]"),
        ({"gpus": 0.5, "device": "cpu"}, 'gpus is 0.5, but device is "cpu", which leaves them idle'),
        ({"device": "tpu"}, "device is 'tpu'; it must be"),
    ],
)
def test_places_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvaluateConfig(**changes)
