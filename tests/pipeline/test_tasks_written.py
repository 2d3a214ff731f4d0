"""Tasks by what a model writes: what a naive loop over one question at a time finds, and figures from enumeration."""

import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlm_core.intervals import mean_interval
from pipeline.config import to_json
from pipeline.errors import UserError
from pipeline.harness.config import read_config
from pipeline.harness.generation import wish_of
from pipeline.inference.filling import Canvas, Filled, fill, prompted
from pipeline.inference.likelihood import LikelihoodConfig, Request, score
from pipeline.inference.model import OpenModel, forget_models, open_model, read_about
from pipeline.inference.sampler import SamplerConfig
from pipeline.inference.sampling import SamplingConfig
from pipeline.sandbox import isolation
from pipeline.sandbox.isolation import Isolation
from pipeline.sandbox.limits import Outcome, SandboxError
from pipeline.stage import main
from pipeline.tasks import generations, tables
from pipeline.tasks.config import STAGE, TaskConfig, TasksConfig, check_scorer
from pipeline.tasks.fit import check_fit, length_of
from pipeline.tasks.likelihoods import mask_id
from pipeline.tasks.questions import TaskFile
from pipeline.tasks.run import read_records
from pipeline.tracking import WandbRun
from pipeline.weights import load_denoiser, load_record
from tests.support.model_kinds import KINDS, save_models
from tests.support.questions import FakeWandbRun, ask, words, write
from tests.support.tiny_run import Artifacts, make_artifacts

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("torch_settings")]
CONFIG = TasksConfig(device="cpu", track=False, num_shards=3)
SAMPLING = SamplingConfig(SamplerConfig("confidence", num_steps=4), temperature=0.7, noise_seed=5)
NEXT = SamplingConfig(temperature=0.7, noise_seed=5)


def sampling(name: str) -> SamplingConfig:
    return NEXT if name == "next" else SAMPLING


def alone(model: OpenModel, canvas: Canvas, config: SamplingConfig) -> list[int]:
    """What is drawn in the places of the masks of one canvas."""
    ((_, filled),) = fill(model, [canvas], config)
    return [new for new, old in zip(filled.ids, canvas.ids, strict=True) if old == model.mask_token_id]


def before_end(model: OpenModel, drawn: list[int]) -> list[int]:
    """Those of a text, which ends where its end is drawn."""
    end = model.vocabulary.special.eos_token_id
    return drawn[: drawn.index(end)] if end in drawn else drawn


@pytest.mark.parametrize("name", list(KINDS))
def test_answers_are_those_of_a_loop_over_one_prompt_at_a_time(
    name: str, saved: dict[str, Path], made: Artifacts, tmp_path: Path
) -> None:
    chance = random.Random(3)
    prompts = [words(chance, 0, 8) for _ in range(9)] + [words(chance, 30, 40)]
    pattern, stop = "([a-z]{2,})", ("é",)
    model = open_model(saved[name], made.tokenizer, "cpu")
    wanted = []
    for number, prompt in enumerate(prompts):
        drawn = alone(model, prompted(model, model.encode(prompt), 12, mask_id(number)), sampling(name))
        text = model.vocabulary.decode(before_end(model, drawn)).split("é")[0]
        found = re.search(pattern, text)
        wanted.append(found[1] if found else None)
    questions = [
        {"prompt": prompt, "answer": f"so it is {found}" if number % 2 and found else f"{number}"}
        for number, (prompt, found) in enumerate(zip(prompts, wanted, strict=True))
    ]
    # taken out of the right answer too: of "so it is x" the pattern takes "so", of a bare number nothing
    questions = [{**q, "answer": q["answer"].removeprefix("so it is ")} for q in questions]
    file = write(tmp_path / "q.jsonl", questions)
    task = TaskConfig("match", str(file), length=12, pattern=pattern, stop=stop, sampling=sampling(name))
    found = ask(replace(CONFIG, tasks={"q": task}), saved[name], made.tokenizer, tmp_path / "out")["q"]
    records = read_records(tmp_path / "out" / "q.jsonl")
    assert [record["found"] for record in records] == wanted
    hits = [bool(number % 2 and one) for number, one in enumerate(wanted)]
    assert 0 < sum(hits) < len(hits), "a weak test"
    assert [record["hit"] for record in records] == hits
    assert found["metrics"]["exact_match"]["value"] == sum(hits) / len(hits)
    assert found["metrics"]["no_answer"]["value"] == wanted.count(None) / len(wanted)
    lengths = [max(len(model.encode(prompt)), model.record.target_offset) for prompt in prompts]
    assert [record["cut"] for record in records] == [max(0, length - 20) for length in lengths]
    assert found["num_cut"] == sum(length > 20 for length in lengths) > 0


def test_answers_have_half_a_row_unless_a_task_says_how_long(
    saved: dict[str, Path], made: Artifacts, tmp_path: Path, sandbox: list[str]
) -> None:
    """A prompt keeps what it has in the other half."""
    prompt = words(random.Random(0), 6, 6)
    model = open_model(saved["masked"], made.tokenizer, "cpu")
    assert len(model.encode(prompt)) > 16
    files = {
        "m": write(tmp_path / "m.jsonl", [{"prompt": prompt, "answer": "x"}]),
        "c": write(tmp_path / "c.jsonl", [{**PROBLEMS[0], "prompt": prompt}]),
    }
    tasks = {
        "m": TaskConfig("match", str(files["m"]), sampling=SAMPLING),
        "c": TaskConfig("code", str(files["c"]), sampling=SAMPLING),
    }
    found = ask(replace(CONFIG, tasks=tasks), saved["masked"], made.tokenizer, tmp_path / "out")
    for name in files:
        assert found[name]["settings"]["length"] == 16
        (record,) = read_records(tmp_path / "out" / f"{name}.jsonl")
        assert record["cut"] == len(model.encode(prompt)) - 16
    for size, wanted in ((256, 128), (4096, 128), (200, 100)):
        assert length_of(tasks["m"], replace(model.record, seq_len=size)) == wanted
    assert length_of(replace(tasks["c"], length=150), replace(model.record, seq_len=256)) == 150
    assert length_of(TaskConfig("samples"), replace(model.record, seq_len=256, target_offset=1)) == 255


@pytest.mark.parametrize(
    ("text", "pattern", "found"),
    [
        ("so #### 1,234\n", r"####\s*([-\d.,]+)", "1234"),
        ("a, b 1,23", None, "a, b 1,23"),
        (" seven ", None, "seven"),
        ("x42y", r"\d+", "42"),
        ("none", r"\d+", None),
        ("b", "(a)?b", ""),
    ],
)
def test_an_answer_is_taken_out_by_its_pattern(text: str, pattern: str | None, found: str | None) -> None:
    assert generations._taken_out(text, pattern) == found


@pytest.mark.parametrize("name", list(KINDS))
def test_gaps_are_those_of_a_loop_over_one_gap_at_a_time(
    name: str, saved: dict[str, Path], made: Artifacts, tmp_path: Path
) -> None:
    chance = random.Random(4)
    suffix = "" if name in ("blocks", "next") else " " + words(chance, 1, 2)
    model = open_model(saved[name], made.tokenizer, "cpu")
    questions, wanted = [], []
    for number in range(8):
        prefix = words(chance, 0 if number == 1 else 1, 3)
        middle = chance.choice("abdeg") if number % 2 else " " + words(chance, 1, 2)
        before = model.encode(prefix) or [model.vocabulary.special.eos_token_id] * model.record.target_offset
        row = [*before, *[model.mask_token_id] * len(model.encode(middle)), *model.encode(suffix)]
        drawn = alone(model, Canvas(row, mask_id(number)), sampling(name))
        if number % 2 and len(model.encode(text := model.vocabulary.decode(drawn))) == len(drawn):
            middle = text
        questions.append({"prefix": prefix, "middle": middle, "suffix": suffix})
        wanted.append((drawn, middle))
    file = write(tmp_path / "q.jsonl", questions)
    task = TaskConfig("infill", str(file), sampling=sampling(name))
    found = ask(replace(CONFIG, tasks={"q": task}), saved[name], made.tokenizer, tmp_path / "out")["q"]
    hits = [model.vocabulary.decode(drawn) == middle for drawn, middle in wanted]
    assert 0 < sum(hits) < len(hits), "a weak test"
    assert found["metrics"]["exact_match"]["value"] == sum(hits) / len(hits)
    pairs = [pair for drawn, middle in wanted for pair in zip(drawn, model.encode(middle), strict=True)]
    right = sum(new == old for new, old in pairs)
    assert found["metrics"]["token_acc"]["value"] == pytest.approx(right / len(pairs), rel=1e-12)


def test_gaps_that_a_model_cannot_fill_are_counted_and_listed(
    saved: dict[str, Path], made: Artifacts, tmp_path: Path
) -> None:
    questions = [
        {"prefix": "one", "middle": " two", "suffix": ""},
        {"prefix": "one", "middle": " two", "suffix": " three"},
        {"prefix": "one", "middle": " two" * 40, "suffix": ""},
    ]
    file = write(tmp_path / "q.jsonl", questions)
    task = TaskConfig("infill", str(file), sampling=NEXT)
    found = ask(replace(CONFIG, tasks={"q": task}), saved["next"], made.tokenizer, tmp_path / "out")["q"]
    assert (found["n"], found["num_failed"]) == (1, 2)
    assert [one["number"] for one in found["failed"]] == [1, 2]
    assert "text stands behind a mask, which a model that predicts the next token" in found["failed"][0]["reason"]
    assert re.match(r"a row has \d+ tokens, those of the model have 32; shorten it", found["failed"][1]["reason"])


PROBLEMS = [
    {
        "task_id": f"t/{number}",
        "prompt": f"def add{number}(a, b):\n",
        "entry_point": f"add{number}",
        "canonical_solution": "    return a + b\n",
        "test": "def check(f):\n    assert f(1, 2) == 3\n",
    }
    for number in range(3)
]


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Judges without running anything; fails on the programs that say so."""
    seen: list[str] = []

    def run_many(programs: list[str], *, isolation: Isolation) -> list[Outcome]:
        seen.extend(programs)
        if any("sandbox" in program for program in programs):
            raise SandboxError("no pipe")
        kinds = ["passed" if "return a + b" in program else "failed" for program in programs]
        return [Outcome(kind, "" if kind == "passed" else "at 0x7f01", 1.0, "") for kind in kinds]  # type: ignore

    monkeypatch.setattr("pipeline.sandbox.isolation.run_many", run_many)
    monkeypatch.setattr("pipeline.tasks.run.choose_isolation", lambda **_: Isolation("namespaces", "in words"))
    return seen


def test_programs_that_pass_are_counted_and_a_failing_sandbox_is_listed(
    saved: dict[str, Path], made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox: list[str]
) -> None:
    written = iter(["    return a + b\ndef more", "    return a", "    return a + b", "    return b"] + ["sandbox"] * 2)
    written_of = generations._written
    monkeypatch.setattr(generations, "_written", lambda *of: replace(written_of(*of), text=next(written)))
    file = write(tmp_path / "q.jsonl", PROBLEMS)
    task = TaskConfig("code", str(file), length=4, num_samples=2, ks=(1, 2), sampling=SAMPLING)
    config = replace(CONFIG, tasks={"q": task}, num_shards=1)
    found = ask(config, saved["masked"], made.tokenizer, tmp_path / "out")["q"]
    assert (found["n"], found["failed"]) == (
        2, [{"number": 2, "reason": "the sandbox did not work: no pipe"}],
    )  # fmt: skip
    assert [found["metrics"][f"pass@{k}"]["value"] for k in (1, 2)] == [0.5, 1.0]
    assert found["settings"]["isolation"] == ["in words"]
    assert sandbox[0] == "def add0(a, b):\n    return a + b\ndef check(f):\n    assert f(1, 2) == 3\n\ncheck(add0)\n"
    assert read_records(tmp_path / "out" / "q.jsonl")[0]["outcomes"] == [["passed", ""], ["failed", "at 0x"]]


@pytest.mark.parametrize("name", list(KINDS))
def test_programs_are_those_of_a_loop_over_one_sample_at_a_time(
    name: str, saved: dict[str, Path], made: Artifacts, tmp_path: Path, sandbox: list[str]
) -> None:
    file = write(tmp_path / "q.jsonl", PROBLEMS)
    task = TaskConfig("code", str(file), length=8, num_samples=2, stop=("é",), sampling=sampling(name))
    ask(replace(CONFIG, tasks={"q": task}), saved[name], made.tokenizer, tmp_path / "out")
    model, wanted = open_model(saved[name], made.tokenizer, "cpu"), []
    for number, problem in enumerate(PROBLEMS):
        canvases = [prompted(model, model.encode(problem["prompt"]), 8, mask_id(number, sample)) for sample in (0, 1)]
        texts = [
            model.vocabulary.decode(before_end(model, alone(model, canvas, sampling(name)))) for canvas in canvases
        ]
        assert texts[0] != texts[1], "a weak test"
        wanted.append([text.split("é")[0] for text in texts])
    assert [record["completions"] for record in read_records(tmp_path / "out" / "q.jsonl")] == wanted
    assert len(sandbox) == 6


def refuse_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel that allows none."""
    monkeypatch.setattr(isolation, "_trouble", lambda *, namespaces: "not permitted" if namespaces else None)


def code_config(tmp_path: Path) -> TasksConfig:
    task = TaskConfig("code", str(write(tmp_path / "q.jsonl", PROBLEMS)), length=4, sampling=SAMPLING)
    return replace(CONFIG, tasks={"q": task}, num_shards=1)


def test_without_namespaces_programs_are_refused_before_weights_are_read(
    saved: dict[str, Path], made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_namespaces(monkeypatch)
    monkeypatch.setattr("pipeline.inference.model.load_denoiser", lambda *_: pytest.fail("the weights are read"))
    with pytest.raises(UserError, match=r"not allowed here \(not permitted\).*or give --allow-unsandboxed"):
        ask(code_config(tmp_path), saved["masked"], made.tokenizer, tmp_path / "out")
    assert not (tmp_path / "out.state" / "shards").exists()  # nor are the pieces of other tasks begun


def test_the_option_of_the_stage_alone_runs_programs_without_namespaces_and_results_and_wandb_say_so(
    saved: dict[str, Path], made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_namespaces(monkeypatch)
    monkeypatch.setattr(isolation, "run_all", lambda programs, **_: [Outcome("passed", "", 0.0, "")] * len(programs))
    fake = FakeWandbRun()
    monkeypatch.setattr(WandbRun, "_start", lambda *_: fake)
    config = replace(code_config(tmp_path), track=True)
    (tmp_path / "c.json").write_text(json.dumps(to_json(config)))
    inputs = [f"--input={name}={path}" for name, path in (("weights", saved["masked"]), ("tokenizer", made.tokenizer))]
    words = ["tasks", f"--config={tmp_path / 'c.json'}", *inputs, f"--out={tmp_path / 'out'}", "--allow-unsandboxed"]
    monkeypatch.setattr("sys.argv", words)
    main(STAGE)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["q"]
    (told,) = found["settings"]["isolation"]
    assert told.startswith("rlimits and a time limit alone")
    assert told.endswith("no namespaces (not permitted)")
    assert fake.summary["tasks/q/isolation"] == told
    assert found["metrics"]["pass@1"]["value"] == 1.0


def test_permission_for_programs_that_nobody_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="allow_unsandboxed is true, but no task is of kind 'code'"):
        replace(CONFIG, tasks={"s": TaskConfig("samples")}, allow_unsandboxed=True)


def test_pass_at_k_is_that_of_all_subsets() -> None:
    passed, n = (0, 1, 3), 4
    records = [{"completions": [""] * n, "passed": c, "nfe": 1} for c in passed]
    found = tables.programs_table(records, (1, 2, 4))
    for k in (1, 2, 4):
        shares = []
        for c in passed:
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            shares.append(sum(any(subset) for subset in subsets) / len(subsets))
        assert found[f"pass@{k}"]["value"] == pytest.approx(sum(shares) / len(shares), rel=1e-12)
        assert found[f"pass@{k}"]["interval"] == list(mean_interval(shares))
    assert list(found) == ["pass@1", "pass@2", "pass@4", "nfe"]
    (single,) = (tables.programs_table(records[:1], (2,))["pass@2"],)
    assert (single["doc_se"], single["interval"]) == (None, None)


@pytest.mark.parametrize("name", list(KINDS))
def test_figures_of_samples_are_those_counted_from_their_tokens(
    name: str, saved: dict[str, Path], made: Artifacts, tmp_path: Path
) -> None:
    task = TaskConfig("samples", num_samples=5, length=16, sampling=sampling(name))
    config = replace(CONFIG, tasks={"s": task})
    found = ask(config, saved[name], made.tokenizer, tmp_path / "out", scorer=saved["next"])["s"]
    model, scorer = open_model(saved[name], made.tokenizer, "cpu"), None
    drawn = [
        before_end(model, alone(model, prompted(model, (), 16, mask_id(number)), sampling(name))) for number in range(5)
    ]
    assert all(drawn), "a weak test"
    assert [record["ids"] for record in read_records(tmp_path / "out" / "s.jsonl")] == drawn
    metrics = {metric: row["value"] for metric, row in found["metrics"].items()}

    def entropy(ids: list[int]) -> float:
        return -math.fsum(n / len(ids) * math.log(n / len(ids)) for n in Counter(ids).values())

    assert metrics["entropy"] == pytest.approx(sum(map(entropy, drawn)) / 5, rel=1e-12)
    assert metrics["unigram_entropy"] == pytest.approx(entropy(list(itertools.chain(*drawn))), rel=1e-12)
    for n in (1, 2, 3):
        runs = [str(ids[i : i + n]) for ids in drawn for i in range(len(ids) - n + 1)]
        assert metrics[f"distinct_{n}"] == len(set(runs)) / len(runs)
    scorer = open_model(saved["next"], made.tokenizer, "cpu")
    nats = [score(scorer, [Request((), ids, 0)], LikelihoodConfig())[0].nats for ids in drawn]
    nll = math.fsum(nats) / sum(map(len, drawn))
    assert metrics["gen_nll"] == pytest.approx(nll, rel=1e-5)
    assert metrics["gen_ppl"] == pytest.approx(math.exp(nll), rel=1e-4)


@pytest.mark.parametrize("ends", [True, False])
def test_what_is_drawn_behind_an_end_counts_for_nothing(
    ends: bool, saved: dict[str, Path], made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    sandbox: list[str],
) -> None:  # fmt: skip
    """Whether the passes behind it are saved or not; a gap has all of its tokens."""
    model = open_model(saved["masked"], made.tokenizer, "cpu")
    end, drawn = model.vocabulary.special.eos_token_id, model.encode("7 8x")
    drawn[2:2] = [end]

    def fill_with_drawn(_: Any, canvases: list[Canvas], config: SamplingConfig) -> Iterator[tuple[int, Filled]]:
        for number, canvas in enumerate(canvases):
            start = canvas.ids.index(model.mask_token_id)
            yield number, Filled([*canvas.ids[:start], *drawn], 1, 0, [])

    monkeypatch.setattr("pipeline.tasks.generations.fill", fill_with_drawn)
    how: dict[str, Any] = {"sampling": replace(SAMPLING, ends_at_eos=ends)}
    before = model.vocabulary.decode(drawn[:2])
    (record,) = generations.samples(model, [(0, {})], TaskConfig("samples", length=len(drawn), **how))
    assert (record["ids"], record["text"]) == (drawn[:2], before)
    task = TaskConfig("match", "q.jsonl", length=len(drawn), **how)
    (record,) = generations.match(model, [(0, {"prompt": "ba", "answer": before})], task)
    assert (record["text"], record["hit"]) == (before, True)
    task = TaskConfig("code", "q.jsonl", length=len(drawn), **how)
    (record,) = generations.code(model, [(0, PROBLEMS[0])], task, Isolation("namespaces", "in words"))
    assert record["completions"] == [before]
    task = TaskConfig("infill", "q.jsonl", **how)
    middle = "z" * len(drawn)
    assert len(model.encode(middle)) == len(drawn)
    (record,) = generations.infill(model, [(0, {"prefix": "ba", "middle": middle, "suffix": ""})], task)
    assert record["text"] == model.vocabulary.decode(drawn) != before


def test_a_scorer_with_another_tokenizer_reads_the_text(
    saved: dict[str, Path], made: Artifacts, tmp_path: Path
) -> None:
    other = make_artifacts(tmp_path, seed=1, vocab_size=280)
    theirs = save_models(tmp_path / "weights", other.tokenizer)["next"]
    task = TaskConfig("samples", num_samples=3, sampling=SAMPLING)
    inputs = {"scorer": theirs, "scorer_tokenizer": other.tokenizer}
    config = replace(CONFIG, tasks={"s": task})
    ask(config, saved["masked"], made.tokenizer, tmp_path / "out", **inputs)
    scorer = open_model(theirs, other.tokenizer, "cpu")
    for record in read_records(tmp_path / "out" / "s.jsonl"):
        ids = scorer.encode(record["text"])
        assert record["scored_tokens"] == len(ids)
        rows = [ids[start : start + 32] for start in range(0, len(ids), 32)]
        nats = [score(scorer, [Request((), row, 0)], LikelihoodConfig())[0].nats for row in rows]
        assert record["scored_nats"] == pytest.approx(math.fsum(nats), rel=1e-5)
    with pytest.raises(UserError, match="is not that of the weights in"):
        ask(config, saved["masked"], made.tokenizer, tmp_path / "bad", scorer=theirs)


def test_a_process_reads_model_and_scorer_once_for_all_pieces(
    saved: dict[str, Path], made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(
        "pipeline.inference.model.load_denoiser", lambda path: (opened.append(path), load_denoiser(path))[1]
    )
    forget_models()
    tasks = {name: TaskConfig("samples", num_samples=5, length=8, sampling=SAMPLING) for name in ("a", "b")}
    config = replace(CONFIG, tasks=tasks, num_shards=6)
    ask(config, saved["masked"], made.tokenizer, tmp_path / "out", scorer=saved["next"])
    assert len(list((tmp_path / "out.state" / "shards").iterdir())) == 6
    assert opened == [saved["masked"], saved["next"]]


# --- bad input ------------------------------------------------------------------------------------------------------


def test_a_scorer_that_is_not_there_or_none_is_refused(saved: dict[str, Path], made: Artifacts, tmp_path: Path) -> None:
    config = replace(CONFIG, tasks={"s": TaskConfig("samples")})
    with pytest.raises(UserError, match="nowhere"):
        ask(config, saved["masked"], made.tokenizer, tmp_path / "a", scorer=tmp_path / "nowhere")
    with pytest.raises(UserError, match='"scorer" of tasks was trained for masked_nelbo, which gives bounds'):
        ask(config, saved["masked"], made.tokenizer, tmp_path / "b", scorer=saved["masked"])
    with pytest.raises(UserError, match='"scorer_tokenizer" and no "scorer"'):
        ask(config, saved["masked"], made.tokenizer, tmp_path / "c", scorer_tokenizer=made.tokenizer)


def test_a_scorer_that_cannot_be_one_is_refused_when_planned() -> None:
    config = replace(CONFIG, tasks={"s": TaskConfig("samples")})
    upstream: dict[str, Any] = {"scorer": {}, "scorer.pretrain": {"objective": {"kind": "masked_diffusion"}}}
    with pytest.raises(UserError, match='the "scorer" of later was trained for masked_diffusion'):
        check_scorer(config, upstream, "later")
    check_scorer(config, {"scorer": {}, "scorer.pretrain": {"objective": {"kind": "autoregressive"}}}, "later")
    with pytest.raises(UserError, match='no task of kind "samples" that it would score; leave it out'):
        check_scorer(replace(CONFIG, tasks={"t": TaskConfig("text", "t.jsonl")}), {"scorer": {}}, "later")


def test_a_length_beyond_the_rows_is_refused(saved: dict[str, Path], made: Artifacts, tmp_path: Path) -> None:
    config = replace(CONFIG, tasks={"s": TaskConfig("samples", length=32)})
    with pytest.raises(UserError, match=r"tasks\.s\.length is 32, but rows of the model have room for 31 tokens"):
        ask(config, saved["shifted"], made.tokenizer, tmp_path / "out")


def asked(*prompts: str) -> dict[str, TaskFile]:
    return {"q": TaskFile("", tuple({"prompt": prompt} for prompt in prompts))}


@pytest.mark.parametrize("name", ["masked", "next"])
@pytest.mark.parametrize("kind", ["match", "code"])
def test_a_length_that_leaves_no_room_for_a_prompt_is_refused(
    kind: Any, name: str, saved: dict[str, Path], made: Artifacts
) -> None:
    record, vocabulary = read_about(saved[name], made.tokenizer)
    task = TaskConfig(kind, "q.jsonl", length=32, sampling=sampling(name))
    with pytest.raises(UserError, match=r"tasks\.q\.length is 32, .* no room for a prompt in rows of 32; set it to 16"):
        check_fit(replace(CONFIG, tasks={"q": task}), asked("ba"), record, vocabulary.special)
    check_fit(replace(CONFIG, tasks={"q": replace(task, length=31)}), asked("ba"), record, vocabulary.special)


def test_a_length_that_leaves_a_token_of_a_prompt_is_that_of_the_harness_too(
    saved: dict[str, Path], made: Artifacts, tmp_path: Path
) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "ba be", "answer": "bi"}\n')
    task = TaskConfig("match", str(tmp_path / "q.jsonl"), length=31, sampling=sampling("shifted"))
    config = replace(CONFIG, tasks={"q": task})
    found = ask(config, saved["shifted"], made.tokenizer, tmp_path / "out")["q"]
    assert (found["n"], found["num_cut"]) == (1, 1)
    given = read_config({"weights": "w", "tokenizer": "t"})
    assert wish_of({"max_gen_toks": 31}, given, load_record(saved["shifted"])).length == 31


def test_prompts_that_are_empty_need_no_room(saved: dict[str, Path], made: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "", "answer": "bi"}\n')
    task = TaskConfig("match", str(tmp_path / "q.jsonl"), length=32, sampling=sampling("masked"))
    found = ask(replace(CONFIG, tasks={"q": task}), saved["masked"], made.tokenizer, tmp_path / "out")["q"]
    assert (found["n"], found["num_cut"]) == (1, 0)


@pytest.mark.parametrize(
    ("kind", "line", "words"),
    [
        ("match", {"prompt": "a", "answer": ""}, r'tasks\.q\.file: .*line 1: "answer" is empty'),
        ("infill", {"prefix": "a", "middle": "", "suffix": ""}, r'tasks\.q\.file: .*line 1: "middle" is empty'),
        ("code", {"task_id": "a"}, r"tasks\.q\.file: .*line 1: no field prompt"),
    ],
)
def test_questions_without_what_is_wanted_are_refused(kind: Any, line: Any, words: str, tmp_path: Path) -> None:
    from pipeline.tasks.questions import external_data

    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=words):
        external_data(TasksConfig({"q": TaskConfig(kind, str(tmp_path / "q.jsonl"))}))
