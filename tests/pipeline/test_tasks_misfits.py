"""What a model cannot be asked: refused before its weights are read, or one question's failure and no other's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import NumericsError, UserError
from pipeline.inference.likelihood import LikelihoodConfig
from pipeline.inference.model import OpenModel
from pipeline.inference.sampler import SamplerConfig
from pipeline.inference.sampling import SamplingConfig
from pipeline.sandbox.isolation import Isolation
from pipeline.sandbox.limits import Outcome
from pipeline.tasks.config import TaskConfig, TasksConfig
from pipeline.tasks.likelihoods import choose, roll
from tests.support.model_kinds import KINDS, spoilt
from tests.support.questions import ask, choices, write
from tests.support.tiny_run import Artifacts

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("torch_settings")]
CONFIG = TasksConfig(device="cpu", track=False, num_shards=2)
WINDOWS = SamplingConfig(SamplerConfig("confidence", num_steps=2), block_size=4)
GUIDED = SamplingConfig(SamplerConfig("confidence", num_steps=2), guidance=1.0)
PROBLEM = {"task_id": "a", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "", "test": ""}


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes every program unread."""
    monkeypatch.setattr("pipeline.tasks.run.choose_isolation", lambda **_: Isolation("namespaces", "in words"))
    monkeypatch.setattr(
        "pipeline.sandbox.isolation.run_many",
        lambda programs, *, isolation: [Outcome("passed", "", 0.0, "")] * len(programs),
    )


GAPS = [
    {"prefix": "one", "middle": "abcd", "suffix": ""},
    {"prefix": "one", "middle": "abcdefgh", "suffix": " two"},
    {"prefix": "one", "middle": "x", "suffix": ""},
]
PROMPTS = [{"prompt": "one", "answer": "two"}, {"prompt": "", "answer": "two"}, {"prompt": "three", "answer": "four"}]
PROGRAMS = [PROBLEM, {**PROBLEM, "task_id": "b", "prompt": ""}, {**PROBLEM, "task_id": "c"}]
NOTHING_GIVEN = "guidance is 1.0, but nothing is given that it could strengthen"
CHOICES = [
    {"context": "one", "choices": [" two", " three"], "answer": 0},
    {"context": " ", "choices": ["two", "three"], "answer": 0},
    {"context": "four", "choices": [" two", " three"], "answer": 1},
]


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    ("kind", "questions", "settings", "model", "failed", "reason"),
    [
        ("infill", GAPS, {"sampling": WINDOWS}, "masked", None, "which windows of 4 tokens do not divide"),
        ("infill", GAPS, {"sampling": SamplingConfig()}, "blocks", [1], "behind the block of the last mask"),
        ("infill", [{**GAPS[0], "prefix": ""}, GAPS[2]], {"sampling": GUIDED}, "masked", [0], NOTHING_GIVEN),
        ("match", PROMPTS, {"length": 4, "sampling": GUIDED}, "masked", [1], NOTHING_GIVEN),
        ("match", PROMPTS, {"length": 4, "sampling": GUIDED}, "shifted", [1], NOTHING_GIVEN),
        ("code", PROGRAMS, {"length": 4, "num_samples": 2, "sampling": GUIDED}, "masked", [1], NOTHING_GIVEN),
    ],
)
def test_what_cannot_be_written_fails_by_itself(
    kind: Any, questions: list[Any], settings: dict[str, Any], model: str, failed: list[int] | None, reason: str,
    saved: dict[str, Path], made: Artifacts, tmp_path: Path,
) -> None:  # fmt: skip
    task = TaskConfig(kind, str(write(tmp_path / "q.jsonl", questions)), **settings)
    found = ask(replace(CONFIG, tasks={"q": task}), saved[model], made.tokenizer, tmp_path / "out")["q"]
    numbers = [one["number"] for one in found["failed"]]
    assert 0 < len(numbers) == found["num_failed"] < len(questions)
    assert failed is None or numbers == failed
    assert found["n"] == len(questions) - len(numbers)
    for one in found["failed"]:
        assert reason in one["reason"]


@pytest.mark.parametrize("model", KINDS)
def test_a_question_that_costs_no_number_ends_its_task_and_is_named(model: str, doubles: dict[str, OpenModel]) -> None:
    broken, config = spoilt(doubles[model], "q"), LikelihoodConfig(num_masks=8)
    words = "question 7: a token costs nan nats"
    whole, bad = ({"context": f"one{end}", "choices": [" two", " three"], "answer": 0} for end in ("", " q"))
    assert len(choose(broken, [(3, whole)], config)) == 1
    with pytest.raises(NumericsError, match=words):
        choose(broken, [(3, whole), (7, bad), (8, bad)], config)
    texts = [(5, {"text": "one two " * 20}), (7, {"text": "one two " * 20 + "q three"})]
    assert len(roll(broken, texts[:1], config)) == 1
    with pytest.raises(NumericsError, match=words):
        roll(broken, texts, config)


@pytest.mark.parametrize("model", ["masked", "shifted"])
def test_a_choice_behind_nothing_under_guidance_fails_by_itself(
    model: str, saved: dict[str, Path], made: Artifacts, tmp_path: Path
) -> None:
    task = TaskConfig("multiple_choice", str(write(tmp_path / "q.jsonl", CHOICES)))
    config = replace(CONFIG, tasks={"q": task}, likelihood=LikelihoodConfig(num_masks=8, guidance=1.0))
    found = ask(config, saved[model], made.tokenizer, tmp_path / "out")["q"]
    (failed,) = found["failed"]
    assert (found["n"], failed["number"]) == (2, 1)
    assert failed["reason"].startswith("choice 0: guidance is 1.0, but no context stands before the answer")


@pytest.mark.parametrize(
    ("kind", "settings", "model", "words"),
    [
        ("match", {"length": 10, "sampling": WINDOWS}, "masked",
         r"tasks\.q\.sampling: a row has 10 tokens .* windows of 4 tokens do not divide"),
        ("samples", {"sampling": replace(WINDOWS, block_size=5)}, "shifted",
         "a row has 31 tokens .* windows of 5 tokens do not divide"),
        ("infill", {"sampling": replace(WINDOWS, block_size=8)}, "blocks", "the model was trained on blocks of 4"),
        ("match", {"sampling": GUIDED, "length": 4}, "blocks", "guidance is 1.0, but the model is of blocks"),
        ("samples", {"sampling": SamplingConfig(cache="dual")}, "blocks", 'cache is "dual", an approximation'),
        ("infill", {"sampling": WINDOWS}, "next", "sampler is 'confidence', but the model predicts the next token"),
        ("samples", {"sampling": SamplingConfig(suppressed=(10**6,))}, "masked", "suppressed has the id 1000000"),
    ],
)  # fmt: skip
def test_what_fits_no_question_is_refused_before_weights_are_read(
    kind: Any, settings: dict[str, Any], model: str, words: str,
    saved: dict[str, Path], made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pipeline.inference.model.load_denoiser", lambda *_: pytest.fail("the weights are read"))
    file = (
        {} if kind == "samples" else {"file": str(write(tmp_path / "q.jsonl", GAPS if kind == "infill" else PROMPTS))}
    )
    config = replace(CONFIG, tasks={"q": TaskConfig(kind, **file, **settings)})
    with pytest.raises(UserError, match=words):
        ask(config, saved[model], made.tokenizer, tmp_path / "out")


@pytest.mark.parametrize(("model", "words"), [("blocks", "is of blocks"), ("next", "predicts the next token")])
def test_guidance_of_a_likelihood_that_no_model_has_is_refused_before_weights_are_read(
    model: str, words: str, saved: dict[str, Path], made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.inference.model.load_denoiser", lambda *_: pytest.fail("the weights are read"))
    task = TaskConfig("multiple_choice", str(write(tmp_path / "q.jsonl", choices())))
    config = replace(CONFIG, tasks={"q": task}, likelihood=LikelihoodConfig(guidance=0.5))
    with pytest.raises(UserError, match=f"likelihood.guidance is 0.5, but the model of 'q' {words}"):
        ask(config, saved[model], made.tokenizer, tmp_path / "out")


def test_guidance_of_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling\.guidance is 1\.0, but kind 'samples' writes from nothing"):
        TaskConfig("samples", sampling=GUIDED)
