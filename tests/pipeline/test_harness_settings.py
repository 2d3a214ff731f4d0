"""What stands in model_args, what a task wants written, and files of tasks: all that is refused."""

import errno
import json
import os
from pathlib import Path, PosixPath
from typing import Any

import pytest
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig

from dlm_core.models.config import ModelConfig
from pipeline.errors import UserError
from pipeline.harness import task_data
from pipeline.harness.command import TASKS, check_model_args, with_ours
from pipeline.harness.config import read_config, with_theirs
from pipeline.harness.generation import wish_of
from pipeline.harness.task_data import choices, gsm8k, wikitext2
from pipeline.inference.stops import before_stops
from pipeline.weights import ModelRecord
from tests.support.exports import LLAMA
from tests.support.harness import ARTICLES, write_task_data
from tests.support.tiny_run import Artifacts

PLACES = {"weights": "w", "tokenizer": "t"}


def record(seq_len: int) -> ModelRecord:
    """Of a model of masked diffusion."""
    return ModelRecord(ModelConfig(LLAMA, 300, 0), seq_len, "masked_nelbo")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_mask": 8}, "unknown setting num_mask of the model dlm; did you mean num_masks"),
        ({"pretrained": "gpt2"}, "unknown setting pretrained of the model dlm; it is weights here"),
        ({"workers": 0}, "^model_args: workers is 0; it must be at least 1"),
        ({"length": -1}, "length is -1; it must be 0 or more"),
        ({"num_masks": 4}, "num_masks is 4; a standard error needs at least 8"),
        ({"is_greedy": "often"}, "^model_args.is_greedy is 'often'"),
        ({"sampler": "ancestor"}, "kind is 'ancestor'"),
        ({"sampler": "confidence", "tau": 0.5}, "tau is 0.5, but kind 'confidence' has no use for it"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 or more"),
        ({"temperature": 0.0, "top_k": 3}, "^sampling: top_k and top_p change nothing at temperature 0"),
        ({"batch_rows": 0}, "batch_rows is 0; it must be at least 1"),
        ({"batch_size": 4}, "unknown setting batch_size of the model dlm; it is batch_rows here"),
        (
            {"top_k": 3},
            r"top_k and top_p change nothing at temperature 0.*A task without do_sample has that temperature unless",
        ),
        (
            {"sampler": "self_speculative"},
            r"temperature is 1\.0, but the sampler self_speculative.*A task with do_sample has that temperature unless",
        ),
    ],
)
def test_settings_that_are_unknown_or_out_of_range_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_config(PLACES | given)


@pytest.mark.parametrize("missing", ["weights", "tokenizer"])
def test_weights_and_their_tokenizer_are_needed(missing: str) -> None:
    with pytest.raises(UserError, match=f"{missing} is missing"):
        read_config({name: place for name, place in PLACES.items() if name != missing})


def test_settings_reach_what_they_are_of() -> None:
    config = read_config(PLACES | {"noise_seed": 7, "num_masks": 9, "sampler": "entropy", "num_steps": 5, "workers": 2})
    sampling = config.sampling_of({})
    assert (config.likelihood.noise_seed, config.likelihood.num_masks, config.own.workers) == (7, 9, 2)
    assert (sampling.noise_seed, sampling.sampler.kind, sampling.sampler.num_steps) == (7, "entropy", 5)


@pytest.mark.parametrize(
    ("given", "wanted", "drawn"),
    [
        ({}, {}, (0.0, None, 1.0)),
        ({}, {"do_sample": False, "temperature": 0.7, "top_k": 5}, (0.0, None, 1.0)),
        ({}, {"temperature": 0.7, "top_k": 5}, (0.7, 5, 1.0)),
        ({}, {"do_sample": True, "top_p": 0.9}, (1.0, None, 0.9)),
        ({}, {"do_sample": True, "temperature": 0.0, "top_p": 0.9}, (0.0, None, 1.0)),
        ({"temperature": 0.5}, {"do_sample": False, "temperature": 0.0}, (0.5, None, 1.0)),
        ({"temperature": 0.0}, {"do_sample": True, "temperature": 0.8, "top_k": 5}, (0.0, None, 1.0)),
        ({"temperature": 0.5, "top_k": 3}, {"do_sample": False, "top_k": 5, "top_p": 0.5}, (0.5, 3, 1.0)),
        ({"temperature": 0.5, "top_k": 3}, {"do_sample": True, "top_k": 5, "top_p": 0.5}, (0.5, 3, 0.5)),
        ({"temperature": 0.0, "sampler": "self_speculative"}, {"do_sample": True}, (0.0, None, 1.0)),
    ],
)
def test_a_tasks_wishes_hold_where_the_model_has_no_setting_of_its_own(
    given: dict[str, Any], wanted: dict[str, Any], drawn: tuple[Any, ...]
) -> None:
    sampling = read_config(PLACES | given).sampling_of(wanted)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == drawn


@pytest.mark.parametrize(
    ("given", "ends"), [({}, True), ({"suppresses_eos": True}, False), ({"ends_at_eos": False}, False)]
)
def test_nothing_is_drawn_behind_an_end_unless_it_is_wanted(given: dict[str, Any], ends: bool) -> None:
    assert read_config(PLACES | given).sampling_of({}).ends_at_eos is ends


def test_what_the_harness_passes_beside_the_settings_is_taken_at_its_word() -> None:
    given = {"device": "cpu", "batch_rows": 4}
    assert with_theirs(given, None, None, None) == with_theirs(given, "auto", "auto", None) == given
    assert with_theirs({}, "cpu", "auto", None) == {"device": "cpu"}
    assert with_theirs({}, "cuda:0", "8", None) == {"device": "cuda:0", "batch_rows": 8}
    assert with_theirs({}, None, 1, None) == with_theirs({}, None, "1", None) == {"batch_rows": 1}
    assert with_theirs({"batch_rows": 8}, None, 8, None) == {"batch_rows": 8}
    for wrong in (0, "0", "-1", "auto:4", "2.5"):
        with pytest.raises(UserError, match=r"batch_size is .*; it must be a number of rows, or auto, which searches"):
            with_theirs({}, None, wrong, None)
    with pytest.raises(UserError, match="device is 'cpu' in model_args and 'cuda:1' beside them; leave one out"):
        with_theirs(given, "cuda:1", None, None)
    with pytest.raises(UserError, match="batch_rows is 4 in model_args and 2 beside them"):
        with_theirs(given, None, 2, None)
    with pytest.raises(UserError, match="max_batch_size is 8, but batches are not searched for"):
        with_theirs(given, None, None, 8)


@pytest.mark.parametrize(
    ("words", "file", "wanted"),
    [
        ([], "", ("auto", "auto")),
        (["--batch_size", "1", "--device", "cuda:0"], "", ("1", "cuda:0")),
        (["-b", "4"], "batch_size: 2\ndevice: cpu\n", ("4", "cpu")),
        ([], "batch_size: 1\n", (1, "auto")),
        (["--model", "hf"], "", (1, "cuda:0")),
    ],
)
def test_the_command_line_says_nothing_that_nobody_said(
    words: list[str], file: str, wanted: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(f"model: dlm\n{file}")
    said = ["--tasks", "dlm_choices", *words]
    said += ["--config", str(tmp_path / "run.yaml")] if file else ["--model", "dlm"][: 0 if "--model" in words else 2]
    monkeypatch.setattr("sys.argv", ["lm_eval", "run", *said])
    meant = EvaluatorConfig.from_cli(with_ours(HarnessCLI().parse_args()))
    assert (meant.batch_size, meant.device) == wanted
    assert meant.include_path == str(TASKS)
    monkeypatch.setattr("sys.argv", ["lm_eval", "ls", "tasks", "--include_path", "mine"])
    assert with_ours(HarnessCLI().parse_args()).include_path == "mine"


def test_arguments_of_the_model_are_looked_at_before_the_tasks(
    saved: dict[str, Path], made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.inference.model.load_denoiser", lambda *_: pytest.fail("the weights are read"))

    def check(*words: str) -> None:
        monkeypatch.setattr("sys.argv", ["lm_eval", "run", "--tasks", "t", *words])
        check_model_args(with_ours(HarnessCLI().parse_args()))

    places = ["--model", "dlm", "--model_args", f"weights={saved['masked']}", f"tokenizer={made.tokenizer}"]
    (tmp_path / "run.yaml").write_text("model: dlm\nmodel_args: weights=w,tokenizer=t,worker=2\n")
    (tmp_path / "details.jsonl").write_text("of before\n")
    check(*places, f"details={tmp_path / 'details.jsonl'}")
    assert (tmp_path / "details.jsonl").read_text() == "of before\n", "nothing was asked yet"
    check("--model", "hf", "--model_args", "worker=2")
    for words, reason in (
        ([*places, "worker=2"], "unknown setting worker of the model dlm; did you mean workers"),
        ([*places, "batch_rows=2", "--batch_size", "3"], "batch_rows is 2 in model_args and 3 beside them"),
        ([*places[:-1], "tokenizer=absent"], "absent"),
        (["--model", "dlm"], "weights is missing"),
        (["--config", str(tmp_path / "run.yaml")], "unknown setting worker"),
    ):
        with pytest.raises(UserError, match=reason):
            check(*words)


def test_length_and_ends_are_those_of_the_task() -> None:
    config, long = read_config(PLACES), record(512)
    wish = wish_of({"until": ["Q:", ""], "max_gen_toks": 8}, config, record(32))
    assert (wish.length, wish.until) == (8, ("Q:",))
    assert wish_of({"until": "\n\n"}, config, long).until == ("\n\n",)
    assert [wish_of({}, config, record(size)).length for size in (1024, 512, 256)] == [256, 256, 128]
    shorter = read_config(PLACES | {"length": 16})
    assert [wish_of({"max_gen_toks": most}, shorter, long).length for most in (8, 64)] == [8, 16]
    with pytest.raises(UserError, match=r"256 tokens are to be generated.*no room.*rows of 256; set length=128"):
        wish_of({"max_gen_toks": 256}, config, record(256))
    with pytest.raises(UserError, match="the task sets num_beams for what is generated"):
        wish_of({"num_beams": 4}, config, long)
    for wrong in (0, "many"):
        with pytest.raises(UserError, match=r"the task sets max_gen_toks to .*; it must be a number of tokens"):
            wish_of({"max_gen_toks": wrong}, config, long)
    many = {"max_completion_tokens": 4, "max_tokens": 5, "max_new_tokens": 6, "max_gen_toks": 7}
    for name, most in many.items():  # each goes before those that stand before it
        assert wish_of({other: many[other] for other in many if many[other] <= most}, config, long).length == most
        with pytest.raises(UserError, match=rf"600 tokens are to be generated \({name}\)"):
            wish_of({name: 600}, config, long)
        with pytest.raises(UserError, match=f"the task sets {name} to 0; it must be a number of tokens"):
            wish_of({name: 0}, config, long)
    assert wish_of({"max_gen_toks": None, "max_tokens": 5}, config, long).length == 5
    windows = read_config(PLACES | {"block_size": 32})
    with pytest.raises(UserError, match="40 tokens from its first mask on, which windows of 32 tokens do not divide"):
        wish_of({"max_gen_toks": 40}, windows, long)


@pytest.mark.parametrize(
    ("text", "until", "wanted"),
    [
        ("a b Q: c", ["Q:"], "a b "),
        ("a\n\nQ: c", ["Q:", "\n\n"], "a"),
        ("a b", ["Q:"], "a b"),
        ("Q: b", ["Q:"], ""),
        ("a b", [], "a b"),
    ],
)
def test_text_ends_before_the_first_string_that_ends_it(text: str, until: list[str], wanted: str) -> None:
    assert before_stops(text, until) == wanted


def test_documents_are_those_of_the_files(tmp_path: Path) -> None:
    folder = str(write_task_data(tmp_path / "data"))
    assert {name: len(found) for name, found in gsm8k(folder, num_masks=8).items()} == {"train": 2, "test": 3}
    pages = [document["page"] for document in wikitext2(folder)["test"]]
    assert [page.strip() for page in pages] == [article.strip() for article in ARTICLES]
    assert [len(document["choices"]) for document in choices(folder)["test"]] == [3] * 5


@pytest.mark.parametrize(
    ("load", "file", "text", "words"),
    [
        (gsm8k, "gsm8k/test.jsonl", '{"question": "a"', "line 1 is no JSON"),
        (gsm8k, "gsm8k/test.jsonl", '{"question": "a", "answer": 1}', r'line 1: "answer" is 1; it must be a text'),
        (gsm8k, "gsm8k/train.jsonl", "", "train.jsonl has no question; give one a line"),
        (gsm8k, "gsm8k/train.jsonl", None, "train.jsonl cannot be read: No such file .*; its folder is DLM"),
        (gsm8k, "gsm8k/train.jsonl", b"\xff", "train.jsonl, line 1 is not UTF-8"),
        (gsm8k, "gsm8k/train.jsonl", '\n \n{"question": "a"}', """line 3 has no "answer"; it has 'question'"""),
        (wikitext2, "wikitext2/test.txt", "text", "that a line of one blank follows; no line is such a title"),
        (wikitext2, "wikitext2/test.txt", " = = A = = \n \n", "no line is such a title"),
        (wikitext2, "wikitext2/test.txt", "a\n = A = \n\n b", 'line 2 is such a title, and the next is ""'),
        (choices, "choices.jsonl", {"context": "", "choices": ["a"], "answer": 0}, r'line 1: "choices" is \["a"\]; it'),
        (choices, "choices.jsonl", {"context": "", "choices": ["a", ""], "answer": 0}, r'"choices"\[1\] is empty'),
        (choices, "choices.jsonl", {"context": "", "choices": ["a", 1], "answer": 0}, r'"choices"\[1\] is 1; it must'),
        (choices, "choices.jsonl", {"context": "", "choices": ["a", "b"], "answer": 2}, "the right choice, 0 to 1"),
        (choices, "choices.jsonl", {"context": "", "choices": ["a", "b"], "answer": True}, '"answer" is true; it must'),
        (
            choices,
            "choices.jsonl",
            {"context": "", "choices": "ab", "answer": 0},
            '"choices" is "ab"; it must be a list',
        ),
        (choices, "choices.jsonl", [], r"line 1 is \[\]; a JSON object is wanted"),
        (choices, "choices.jsonl", {"choices": ["a", "b"], "answer": 0}, 'line 1 has no "context"'),
    ],
)
def test_files_of_tasks_that_do_not_parse_are_refused_by_line(
    load: Any, file: str, text: Any, words: str, tmp_path: Path
) -> None:
    folder = write_task_data(tmp_path / "data")
    if text is None:
        (folder / file).unlink()
    else:
        content = text if isinstance(text, str | bytes) else json.dumps(text)
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        load(str(folder))


@pytest.mark.parametrize(
    ("load", "file"), [(gsm8k, "gsm8k/train.jsonl"), (wikitext2, "wikitext2/test.txt"), (choices, "choices.jsonl")]
)
@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("folder", "Is a directory"),
        ("circle", "Too many levels of symbolic links"),
        ("behind a file", "Not a directory"),
        ("f" * 300, "File name too long"),
    ],
)
def test_a_path_that_leads_to_no_file_is_refused(load: Any, file: str, place: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / place / file
    if place == "folder":
        path.mkdir(parents=True)
    elif place == "circle":
        path.parent.mkdir(parents=True)
        path.symlink_to(path)
    elif place == "behind a file":
        (tmp_path / place).touch()
    with pytest.raises(UserError, match=rf"\.(jsonl|txt) cannot be read: {words}"):
        load(str(tmp_path / place))


@pytest.mark.parametrize("load", [wikitext2, choices])
def test_an_error_of_the_storage_is_not_called_the_users(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(PosixPath):
        def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
            raise OSError(errno.EIO, "Input/output error")

        def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(task_data, "Path", Failing)
    with pytest.raises(OSError, match="Input/output error"):
        load("data")


def test_a_folder_of_data_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLM_TASK_DATA", raising=False)
    with pytest.raises(UserError, match="set DLM_TASK_DATA, or --metadata task_data=DIR"):
        choices()
