"""Tasks and lm-evaluation-harness: the same figures for the same questions, where no mask is drawn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

import pipeline.harness
from pipeline.inference.pairs import encode_pair
from pipeline.tasks.config import TaskConfig
from tests.support.model_kinds import KINDS, save_models
from tests.support.questions import CONFIG, ask, write
from tests.support.tiny_run import Artifacts

pytestmark = pytest.mark.timeout(120)
QUESTIONS = [
    {"context": "ba be", "choices": [" bi", " bó", " du da"], "answer": 1},
    {"context": "ba be ", "choices": ["bi", "é"], "answer": 0},
    {"context": "ba be\n", "choices": ["bi", "bu"], "answer": 1},
    {"context": "", "choices": ["da", " d"], "answer": 0},
    {"context": "du d", "choices": ["e", "a be"], "answer": 1},
    {"context": "ga", "choices": [" ge", " gé"], "answer": 0},
]
TASK = {
    "task": "ours",
    "output_type": "multiple_choice",
    "test_split": "test",
    "dataset_path": "json",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm", "acc_bytes")
    ],
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "next"])
def test_choices_have_the_figures_of_the_harness(
    kind: str, made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of answers so short that no mask is drawn: the harness addresses masks by a question's text, we by its number.

    A model of next tokens is asked by the harness without the end of a text before its context (test_harness_parity).
    """
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    weights = save_models(tmp_path / "weights", made.tokenizer, kind)[kind]
    file = write(tmp_path / "q.jsonl", QUESTIONS)
    likelihood = replace(CONFIG.likelihood, num_masks=64)
    config = replace(CONFIG, tasks={"q": TaskConfig("multiple_choice", str(file))}, likelihood=likelihood)
    found = ask(config, weights, made.tokenizer, tmp_path / "out")["q"]["metrics"]
    data: dict[str, Any] = {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")}
    theirs = simple_evaluate(
        model=pipeline.harness.NAME,
        model_args={"weights": str(weights), "tokenizer": str(made.tokenizer), "num_masks": 64},
        tasks=[{**TASK, "dataset_kwargs": data}],  # type: ignore[list-item]
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    assert theirs is not None
    for metric in ("acc", "acc_norm", "acc_bytes"):
        assert found[metric]["value"] == theirs["results"]["ours"][f"{metric},none"], metric
    nats = [[-float(ll) for ((ll, _),) in sample["resps"]] for sample in theirs["samples"]["ours"]]
    mean = sum(costs[one["answer"]] for costs, one in zip(nats, QUESTIONS, strict=True)) / len(QUESTIONS)
    (answer,) = (row for name, row in found.items() if name.startswith("answer_"))
    assert answer["mc_se"] == 0.0, "a weak test"
    assert answer["value"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    ("context", "answer", "wanted"),
    [
        ("ba be", " bi", (["ba", "be"], ["bi"])),
        ("ba be ", "bi", (["ba", "be"], ["bi"])),
        ("ba be \n", "bi", (["ba", "be"], ["bi"])),
        ("", "bi", ([], ["bi"])),
        ("ba b", "e bi", (["ba", "b"], ["e", "bi"])),  # as one text: ba be bi
        ("ba b", "e", (["ba", "b"], ["e"])),
    ],
)
def test_an_answer_has_all_its_tokens_and_no_others(context: str, answer: str, wanted: Any) -> None:
    assert encode_pair(str.split, context, answer) == wanted  # type: ignore[arg-type]
