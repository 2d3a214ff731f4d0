"""A next-token model of ours beside the harness's own model of what we export: the same numbers, the same texts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pipeline.artifact import load_manifest
from pipeline.data.special_tokens import load_special_tokens
from pipeline.export.config import STAGE, ExportConfig
from pipeline.harness.command import TASKS
from pipeline.harness.model import DenoiserLM
from pipeline.harness.pieces import begins_with, next_token_request
from pipeline.inference.likelihood import Request
from tests.support.exports import LLAMA, NEXT_TOKEN
from tests.support.harness import asked, questions, write_task_data
from tests.support.interchange import random_model, save_model
from tests.support.tiny_run import Artifacts, run_stage

pytestmark = pytest.mark.timeout(180)
SEQ_LEN = 32
ONE_TOKEN = {"until": [], "max_gen_toks": 1}
LONG = "ba be bi bo " * 12
"""More tokens than a row has."""


@pytest.fixture(scope="module")
def both(made: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Ours, without a mask as an import leaves it, and theirs of its export."""
    root, special = tmp_path_factory.mktemp("parity"), load_special_tokens(made.tokenizer)
    tokenizer = load_manifest(made.tokenizer).fingerprint
    model = random_model(LLAMA, special.vocab_size, None)
    with torch.no_grad():
        model.head.weight[special.mask_token_id] = 0.0  # never the most likely: we would not draw it, they would
    weights = save_model(root / "weights", model, tokenizer=tokenizer, **NEXT_TOKEN)
    config, inputs = (
        ExportConfig("llama", "float32", proof="tensors"),
        {"weights": weights, "tokenizer": made.tokenizer},
    )
    exported = run_stage(STAGE, config, inputs, root / "exported")
    ours = DenoiserLM(weights=str(weights), tokenizer=str(made.tokenizer), is_greedy=True, batch_rows=3)
    theirs = HFLM(str(exported), device="cpu", dtype="float32", batch_size=2, max_length=SEQ_LEN)
    return {"dlm": ours, "hf": theirs}


def test_likelihoods_and_greedy_answers_are_theirs(both: dict[str, Any]) -> None:
    """Nothing stands before a context; an empty one is the end of a text.  Too long ones keep as much."""
    requests = questions(
        ("ba be bi", [" bo", " bu da", "de di"]), ("ga ", ["ge"]), ("", ["ba be"]), (LONG, [" da", " de"])
    )
    for number, context in enumerate(("ba be bi", "ga", "du da de")):
        (likely,) = both["hf"].generate_until(asked("generate_until", [(context, ONE_TOKEN)]), disable_tqdm=True)
        requests += asked("loglikelihood", [(context, likely)], doc_id=number, task="greedy")
    ours, theirs = (both[name].loglikelihood(requests, disable_tqdm=True) for name in ("dlm", "hf"))
    for (nats, is_greedy), (their_nats, their_greedy) in zip(ours, theirs, strict=True):
        assert nats == pytest.approx(their_nats, abs=1e-4)
        assert is_greedy == their_greedy
    assert {is_greedy for _, is_greedy in ours} == {True, False}
    assert both["dlm"].get_model_info()["accounts"]["loglikelihood"]["task"]["num_cut_requests"] == 2


def test_tasks_give_their_results(both: dict[str, Any], tmp_path: Path) -> None:
    data = {"task_data": str(write_task_data(tmp_path / "data"))}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=data)
    found = {}
    for name, lm in both.items():
        settings = {"gen_kwargs": {"max_gen_toks": 9, "until": ["e", "Question:"]}, "bootstrap_iters": 0}
        tasks = ["dlm_gsm8k", "dlm_wikitext2", "dlm_choices"]
        found[name] = simple_evaluate(model=lm, tasks=tasks, task_manager=manager, **settings)["samples"]
    texts = [[sample["resps"][0][0] for sample in found[name]["dlm_gsm8k"]] for name in both]
    assert texts[0] == texts[1]
    assert any(texts[0])
    for task in ("dlm_wikitext2", "dlm_choices"):
        ours, theirs = ([flat(sample["filtered_resps"]) for sample in found[name][task]] for name in both)
        assert len(ours) > 1
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, abs=1e-4, rel=1e-6)


def flat(responses: list[Any]) -> list[float]:
    """The log-likelihoods among the responses of one document."""
    return [one[0] if isinstance(one, tuple | list) else one for one in responses]


@pytest.mark.parametrize("prompt", ["ba be bi", "ga", LONG])
def test_texts_are_theirs_up_to_whatever_ends_them(both: dict[str, Any], prompt: str) -> None:
    whole = {"until": [], "max_gen_toks": 12}
    ours, theirs = (
        both[name].generate_until(asked("generate_until", [(prompt, whole)]), disable_tqdm=True)[0] for name in both
    )
    assert ours == theirs
    assert len(ours) > 3
    wish = {"until": [ours[3], "zzz"], "max_gen_toks": 12}
    for lm in both.values():
        (text,) = lm.generate_until(asked("generate_until", [(prompt, wish)]), disable_tqdm=True)
        assert text == ours[: ours.index(ours[3])]


def test_what_a_tokenizer_begins_texts_with_stands_before_a_context() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "</s>": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert begins_with(tokenizer) == ()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert begins_with(tokenizer) == ()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert begins_with(tokenizer) == (0,)
    assert next_token_request((0,), (5, 6), (7,), 3) == Request((5, 6), (7,), 3, before=0)
    assert next_token_request((0,), (), (7,), 3) == Request((), (7,), 3, before=0)
    assert next_token_request((), (5, 6), (7,), 3) == Request((6,), (7,), 3, before=5)
    assert next_token_request((), (), (7,), 3) == Request((), (7,), 3)
