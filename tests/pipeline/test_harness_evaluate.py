"""Tasks through lm-evaluation-harness without a network: one and two workers, same digits, in its own format."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import pipeline.harness
from pipeline.errors import UserError
from pipeline.harness.addresses import address_of
from pipeline.harness.model import DenoiserLM
from pipeline.inference.filling import fill, prompted
from pipeline.inference.model import open_model
from pipeline.inference.sampling import SamplingConfig
from pipeline.inference.stops import before_end
from tests.support.harness import asked, write_task_data
from tests.support.model_kinds import KINDS
from tests.support.tiny_run import Artifacts

pytestmark = pytest.mark.timeout(180)
TASKS = Path(pipeline.harness.__file__).parent / "tasks"
SETTINGS = {"num_masks": 8, "batch_rows": 2, "length": 8, "temperature": 1.0}
"""Small batches: every kind of request is several pieces of work."""


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    data = write_task_data(tmp_path_factory.mktemp("harness") / "data")
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"task_data": str(data)})


@pytest.fixture(scope="module")
def evaluate(saved: dict[str, Path], made: Artifacts, manager: TaskManager) -> Any:
    def call(tasks: list[str], **settings: Any) -> dict[str, Any]:
        given = {"weights": str(saved["masked"]), "tokenizer": str(made.tokenizer)} | SETTINGS
        more = {
            name: settings.pop(name) for name in ("samples", "apply_chat_template", "num_fewshot") if name in settings
        }
        found = simple_evaluate(
            model="dlm", model_args=given | settings, tasks=tasks, task_manager=manager, bootstrap_iters=0, **more
        )
        return json.loads(json.dumps(found, default=str))

    return call


@pytest.fixture(scope="module")
def alone(evaluate: Any) -> dict[str, Any]:
    return evaluate(["dlm_gsm8k", "dlm_wikitext2", "dlm_choices"])


def test_results_are_in_the_format_of_the_harness(alone: dict[str, Any]) -> None:
    assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "samples"} <= set(alone)
    metrics = {
        "dlm_gsm8k": {"exact_match,strict-match", "exact_match,flexible-extract"},
        "dlm_wikitext2": {"word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"},
        "dlm_choices": {"acc,none", "acc_norm,none"},
    }
    for task, names in metrics.items():
        assert names <= set(alone["results"][task])
    assert {task: counts["effective"] for task, counts in alone["n-samples"].items()} == {
        "dlm_gsm8k": 3,
        "dlm_wikitext2": 2,
        "dlm_choices": 5,
    }
    config = alone["config"]
    assert (config["model"], config["model_objective"], config["likelihood_num_masks"]) == ("dlm", "masked_nelbo", 8)
    assert (config["likelihood_noise_seed"], config["generation_noise_seed"]) == (2000, 0)
    accounts = config["accounts"]
    assert set(accounts) == {"generate_until", "loglikelihood", "loglikelihood_rolling"}
    assert accounts["loglikelihood"]["dlm_choices"]["rms_mc_se"] > 0
    assert accounts["loglikelihood_rolling"]["dlm_wikitext2"]["nats_mc_se"] > 0


def test_two_workers_give_the_digits_of_one(evaluate: Any, alone: dict[str, Any]) -> None:
    both = evaluate(["dlm_choices", "dlm_wikitext2", "dlm_gsm8k"], workers=2)
    assert both["config"].pop("workers") == 2
    for task, samples in alone["samples"].items():
        assert both["samples"][task] == samples
        assert both["results"][task] == alone["results"][task]
    assert both["config"]["accounts"] == alone["config"]["accounts"]


def test_choices_are_counted_by_their_likelihoods(alone: dict[str, Any]) -> None:
    samples = alone["samples"]["dlm_choices"]
    best = [max(range(3), key=lambda i: one["filtered_resps"][i][0]) == one["target"] for one in samples]
    assert alone["results"]["dlm_choices"]["acc,none"] == pytest.approx(sum(best) / 5)


def test_documents_that_are_left_out_change_no_mask_of_the_others(evaluate: Any, alone: dict[str, Any]) -> None:
    """The harness numbers those that are left anew."""
    some = evaluate(["dlm_choices"], samples={"dlm_choices": [1, 4]})["samples"]["dlm_choices"]
    for one, number in zip(some, (1, 4), strict=True):
        likelihoods = [
            [choice[0] for choice in sample["filtered_resps"]]
            for sample in (one, alone["samples"]["dlm_choices"][number])
        ]
        assert likelihoods[0] == pytest.approx(likelihoods[1], rel=1e-5)


def test_examples_before_a_question_are_of_the_training_file(evaluate: Any) -> None:
    (sample,) = evaluate(["dlm_gsm8k"], num_fewshot=2, samples={"dlm_gsm8k": [0]})["samples"]["dlm_gsm8k"][:1]
    prompt = sample["arguments"][0][0]
    assert sorted(line for line in prompt.splitlines() if line.startswith("#")) == ["#### 3", "#### 4"]
    assert prompt.endswith("Question: ba be 0?\nAnswer:")


def test_a_chat_template_is_refused_before_anything_is_computed(evaluate: Any) -> None:
    with pytest.raises(UserError, match="a chat template is asked for"):
        evaluate(["dlm_choices"], apply_chat_template=True)


def test_settings_may_come_as_one_string(saved: dict[str, Path], made: Artifacts) -> None:
    words = f"weights={saved['masked']},tokenizer={made.tokenizer},num_masks=9,device=cpu"
    lm = get_model("dlm").create_from_arg_string(f"{words},noise_seed=7", {"batch_size": 3, "device": "auto"})
    told = lm.get_model_info()
    assert (told["likelihood_num_masks"], told["likelihood_batch_rows"], told["generation_batch_rows"]) == (9, 3, 3)
    assert told["likelihood_noise_seed"] == told["generation_noise_seed"] == 7
    with pytest.raises(UserError, match="unknown setting batchrows of the model dlm; did you mean batch_rows"):
        get_model("dlm").create_from_arg_string(f"{words},batchrows=2")


def prompts(count: int, **wanted: Any) -> list[Instance]:
    texts = ["ba be bi", "", "du " * 40, "ga ge"]
    wish = {"until": ["zzz"], "max_gen_toks": 6} | wanted
    return [asked("generate_until", [(texts[i % 4], wish)], doc_id=i)[0] for i in range(count)]


@pytest.mark.parametrize("kind", list(KINDS))
def test_text_is_that_of_fill_whatever_the_order(kind: str, saved: dict[str, Path], made: Artifacts) -> None:
    model, requests = open_model(saved[kind], made.tokenizer, "cpu"), prompts(6, do_sample=True)
    lm = DenoiserLM(weights=str(saved[kind]), tokenizer=str(made.tokenizer), batch_rows=2)
    found = lm.generate_until(requests, disable_tqdm=True)
    wanted = []
    for instance in requests:
        ids, before = model.encode(instance.args[0])[-26:], None
        if kind == "next" and ids:
            before, *ids = ids
        canvas = replace(prompted(model, ids, 6, address_of(instance).number(0)), before=before)
        ((_, filled),) = fill(model, [canvas], SamplingConfig(temperature=1.0))
        wanted.append(model.vocabulary.decode(before_end(filled.ids[-6:], model.vocabulary.special.eos_token_id)))
    assert found == wanted
    assert lm.generate_until(requests[::-1], disable_tqdm=True)[::-1] == found
    told = lm.get_model_info()["accounts"]["generate_until"]["task"]
    assert (told["num_requests"], told["num_cut_requests"]) == (12, 2)


@pytest.mark.parametrize("kind", list(KINDS))
def test_text_ends_with_the_first_end_that_is_drawn(kind: str, saved: dict[str, Path], made: Artifacts) -> None:
    """As if all had been drawn; what goes from left to right makes no pass behind the end."""
    model = open_model(saved[kind], made.tokenizer, "cpu")
    special, requests = model.vocabulary.special, prompts(6, do_sample=True)
    suppressed = tuple({*range(special.vocab_size)} - {special.eos_token_id, special.mask_token_id, 70, 71})
    lm = DenoiserLM(weights=str(saved[kind]), tokenizer=str(made.tokenizer), suppressed=suppressed)
    found, num_ended, num_passes = lm.generate_until(requests, disable_tqdm=True), 0, 0
    for instance, text in zip(requests, found, strict=True):
        ids, before = model.encode(instance.args[0])[-26:], None
        if kind == "next" and ids:
            before, *ids = ids
        canvas = replace(prompted(model, ids, 6, address_of(instance).number(0)), before=before)
        ((_, filled),) = fill(model, [canvas], SamplingConfig(temperature=1.0, suppressed=suppressed))
        drawn = filled.ids[-6:]
        stop = drawn.index(special.eos_token_id) if special.eos_token_id in drawn else 6
        num_ended += 0 < stop < 5
        num_passes += filled.nfe
        assert text == model.vocabulary.decode(drawn[:stop])
    assert num_ended > 0
    told = lm.get_model_info()["accounts"]["generate_until"]["task"]["num_passes"]
    assert told < num_passes if kind in ("blocks", "next") else told == num_passes


def test_text_stops_where_the_task_says(saved: dict[str, Path], made: Artifacts) -> None:
    lm = DenoiserLM(weights=str(saved["masked"]), tokenizer=str(made.tokenizer))
    (whole,) = lm.generate_until(prompts(1, do_sample=True), disable_tqdm=True)
    end = whole[len(whole) // 2]
    (cut,) = lm.generate_until(prompts(1, do_sample=True, until=["zzz", end]), disable_tqdm=True)
    assert cut == whole[: whole.index(end)]


def test_a_task_that_wants_several_answers_gets_different_ones_and_the_same_again(
    saved: dict[str, Path], made: Artifacts
) -> None:
    lm = DenoiserLM(weights=str(saved["masked"]), tokenizer=str(made.tokenizer))
    (instance,) = prompts(1, do_sample=True)
    answers = lm.generate_until([instance] * 4, disable_tqdm=True)
    assert len(set(answers)) == 4
    assert lm.generate_until([instance] * 4, disable_tqdm=True) == answers


def test_an_empty_prompt_under_guidance_is_refused_before_any_is_gone_on_with(
    saved: dict[str, Path], made: Artifacts
) -> None:
    lm = DenoiserLM(weights=str(saved["masked"]), tokenizer=str(made.tokenizer), guidance=1.0)
    with pytest.raises(UserError, match=r"task task, document 1: guidance is 1\.0, but the prompt is empty"):
        lm.generate_until(prompts(2), disable_tqdm=True)


def test_a_task_that_is_not_known_is_refused_in_one_line(saved: dict[str, Path], made: Artifacts) -> None:
    places = f"weights={saved['masked']},tokenizer={made.tokenizer}"
    words = ["--model", "dlm", "--tasks", "dlm_choices,dlm_choice,nothing", "--model_args", places]
    done = subprocess.run([sys.executable, "-m", "pipeline.harness", *words], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("20")]  # those of the log
    assert (done.returncode, errors) == (
        2,
        [
            "error: there is no task dlm_choice, nothing; this project's are dlm_choices, dlm_gsm8k, dlm_wikitext2, "
            "and all are listed by: python -m pipeline.harness ls tasks"
        ],
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_line_knows_the_model_and_the_tasks(
    saved: dict[str, Path], made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLM_TASK_DATA", str(write_task_data(tmp_path / "data")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-m", "pipeline.harness", "--model", "dlm", "--tasks", "dlm_choices", "--model_args"]
        places = [f"weights={saved['masked']}", f"tokenizer={made.tokenizer}", "num_masks=8"]
        return subprocess.run([*start, *places, *words], capture_output=True, text=True)

    done = run("workers=2", "batch_rows=2", "--output_path", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "|dlm_choices|" in done.stdout
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["accounts"]["loglikelihood"]["dlm_choices"]["num_requests"] == 15
    wrong = run("worker=2")
    assert (wrong.returncode, wrong.stderr.splitlines()[-1]) == (
        2,
        "error: unknown setting worker of the model dlm; did you mean workers?",
    )
