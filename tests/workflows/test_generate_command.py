"""``dlm generate``: text from every kind of source, resumed to the same bytes, live, as a film, and what it refuses."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pipeline.artifact import load_manifest
from pipeline.data.vocabulary import load_vocabulary
from pipeline.generate.config import STAGE as GENERATE
from pipeline.generate.config import GenerateConfig
from pipeline.import_checkpoint.config import ImportConfig
from pipeline.inference.sampler import SamplerConfig
from pipeline.stage import environment
from pipeline.tokenizer.config import TokenizerConfig
from tests.support.executors import Inline
from tests.support.exports import LLAMA, QWEN2, SHIFTED, Pair, export
from tests.support.interchange import drawn, random_model, save_model
from tests.support.tiny_run import Artifacts, run_stage
from tests.support.toy_workflow import coordinate
from tests.workflows.conftest import Dlm, Done
from workflows import runs
from workflows.emerging import MASK, Emerging
from workflows.emerging import runs as runs_of
from workflows.plan import make_plan
from workflows.report.text import visible
from workflows.requests import parse_pattern, read_requests
from workflows.step import Step, Workflow
from workflows.store import Store

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).parents[2]
QUICK = ("--set", "generate.sampler.num_steps=6")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(made: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of several kinds, of rows of 32 tokens."""
    special, root = load_vocabulary(made.tokenizer).special, tmp_path_factory.mktemp("models")
    records: dict[str, dict[str, Any]] = {
        "masked": {},
        "shifted": {"target_offset": 1},
        "blocks": {"objective": "block_nelbo", "block_size": 8},
        "next": {"objective": "autoregressive_nll"},
    }
    own = load_manifest(made.tokenizer).fingerprint
    model = random_model(drawn(LLAMA), special.vocab_size, special.mask_token_id)
    return {name: save_model(root / name, model, tokenizer=own, **record) for name, record in records.items()}


@pytest.fixture
def write(dlm: Dlm, models: dict[str, Path], made: Artifacts):
    """The command for one of the models, with its tokenizer."""

    def call(name: str, *arguments: str) -> Done:
        quick = () if name == "next" else QUICK
        return dlm("generate", str(models[name]), *arguments, "--tokenizer", str(made.tokenizer), *quick)

    return call


def ok(done: Done) -> str:
    assert done.code == 0, done.stderr
    return done.stdout


# From every source


@pytest.mark.parametrize("name", ["masked", "shifted", "blocks", "next"])
def test_every_kind_of_model_goes_on_with_a_prompt(write, made: Artifacts, name: str) -> None:
    (record,) = json.loads(ok(write(name, "ba de", "--length", "9", "--json")))
    vocabulary = load_vocabulary(made.tokenizer)
    prompt = vocabulary.tokenizer.encode("ba de", add_special_tokens=False).ids
    assert record["ids"][: len(prompt)] == prompt
    assert len(record["ids"]) == len(prompt) + 9
    assert record["text"] == vocabulary.decode(record["ids"])
    assert record["drawn"] == [vocabulary.decode(record["ids"][len(prompt) :])]
    assert vocabulary.special.mask_token_id not in record["ids"]
    assert (record["prompt"], record["length"], record["num_cut"]) == ("ba de", 9, 0)
    assert json.loads(ok(write(name, "--prompt", "ba de", "--length", "9", "--json"))) == [record]
    assert f"ba de{record['drawn'][0]}"[:5] in ok(write(name, "ba de", "--length", "9"))


def test_samples_of_nothing_are_those_of_the_stage(
    write, models: dict[str, Path], made: Artifacts, tmp_path: Path
) -> None:
    records = json.loads(ok(write("masked", "--samples", "3", "--json")))
    config = GenerateConfig(num_samples=3, sampler=SamplerConfig(num_steps=6))
    run_stage(GENERATE, config, {"weights": models["masked"], "tokenizer": made.tokenizer}, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [record["ids"] for record in records] == [line["ids"] for line in lines]


def test_gaps_are_filled_and_what_stands_between_them_stays(write, made: Artifacts) -> None:
    vocabulary = load_vocabulary(made.tokenizer)
    encode = lambda text: vocabulary.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    (record,) = json.loads(ok(write("masked", "--infill", r"ba[MASK:3] \[MASK][MASK]", "--json")))
    ids, head, middle = record["ids"], encode("ba"), encode(" [MASK]")
    assert ids[: len(head)] == head
    assert ids[len(head) + 3 : -1] == middle
    assert [vocabulary.decode(part) for part in (ids[len(head) : len(head) + 3], ids[-1:])] == record["drawn"]
    (record,) = json.loads(ok(write("shifted", "--infill", "[MASK:2]ba", "--json")))
    assert record["ids"][0] == vocabulary.special.eos_token_id  # nothing predicts the first token of a shifted model


def test_a_checkpoint_of_transformers_a_run_and_a_training_are_sources(
    dlm: Dlm, store: Store, tokenizer_artifact: Path, alone: Path, made: Artifacts, tmp_path: Path
) -> None:
    _, exported = export(Pair("dream", QWEN2, SHIFTED), tokenizer_artifact, tmp_path)
    dlm("inspect", str(exported))  # takes what the stages have printed here
    (first,) = json.loads(ok(dlm("generate", str(exported), "ab", "--length", "5", "--json", *QUICK)))
    assert first["text"].startswith("ab")
    steps = (
        Step("theirs", "pipeline.import_checkpoint", ImportConfig(path=str(exported), proof="tensors")),
        Step("words", "pipeline.tokenizer", TokenizerConfig(), {"checkpoint": "theirs"}),
    )
    run = runs.create_run(store, make_plan(Workflow("toy", "", steps), environment()), "local", "r1")
    coordinate(store, run, Inline)
    (of_run,) = json.loads(ok(dlm("generate", "r1", "ab", "--length", "5", "--json", *QUICK)))
    assert of_run["ids"] == first["ids"]
    line = ("generate", str(alone), "--tokenizer", str(made.tokenizer), "--json", *QUICK)
    assert len(json.loads(ok(dlm(*line)))[0]["ids"]) == 32


def test_the_commands_of_the_readme_write_what_they_say(
    dlm: Dlm, made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("### Generate") : readme.index("### From a next-token checkpoint")]
    commands = re.findall(r"^    dlm (generate first .*)$", section, re.MULTILINE)
    assert len(commands) == 4
    special, own = load_vocabulary(made.tokenizer).special, load_manifest(made.tokenizer).fingerprint
    model = random_model(LLAMA, special.vocab_size, special.mask_token_id)
    weights = save_model(tmp_path / "weights", model, tokenizer=own, seq_len=64)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ba"}\n{"infill": "a[MASK:3]b"}\n')
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = shlex.split(command)
        ok(dlm(words[0], str(weights), *words[2:], "--tokenizer", str(made.tokenizer)))
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 8
    assert "</html>" in (tmp_path / "film.html").read_text(encoding="utf-8")


# A file of samples


def test_a_file_that_was_interrupted_goes_on_to_the_bytes_of_an_unbroken_run(write, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "ba de"}, {"id": "gap", "infill": "ba[MASK:4]de"}, {"prompt": "", "length": 6}, {"prompt": "k"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = ("--prompts", str(prompts), "--samples", "3", "--length", "5", "--set", "generate.batch_rows=2")
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    done = write("masked", *line, "--out", str(whole))
    assert "12 drawn, 0 were there already" in done.stderr
    data = whole.read_bytes()
    ends = [match.end() for match in re.finditer(rb"\n", data)]
    assert {(r["id"], r["sample"]) for r in map(json.loads, data.splitlines())} == {
        (name, n) for name in ("1", "gap", "3", "4") for n in range(3)
    }
    for size in (0, 1, 7, ends[0], ends[2] - 1, ends[2], ends[2] + 1, ends[6] + 40, len(data) - 1, len(data)):
        broken.write_bytes(data[:size])
        done = write("masked", *line, "--out", str(broken))
        assert broken.read_bytes() == data, done.stderr
        kept = sum(end <= size for end in ends)
        assert f"{12 - kept} drawn, {kept} were there already" in done.stderr


def test_a_sample_depends_on_its_id_and_number_alone(write, tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"id": "a", "prompt": "ba"}\n{"id": "b", "prompt": "de"}\n')
    two.write_text('{"id": "c", "prompt": "ba"}\n\n{"id": "b", "prompt": "de"}\n{"id": "a", "prompt": "ba"}\n')
    found = []
    for path, samples in ((one, 1), (two, 2)):
        line = ("--prompts", str(path), "--samples", str(samples), "--length", "8", "--json")
        found.append({(r["id"], r["sample"]): r["ids"] for r in json.loads(ok(write("masked", *line)))})
    assert all(found[1][key] == ids for key, ids in found[0].items())
    assert len({tuple(ids) for ids in found[1].values()}) == 6


def test_a_file_of_other_settings_another_model_or_other_requests_is_left_alone(write, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    ok(write("masked", "ba", "--length", "4", "--out", str(out)))
    data = out.read_bytes()
    for name, arguments, words in (
        ("masked", ("ba", "--length", "4", "--set", "generate.noise_seed=1"), "line 1 was drawn with other settings"),
        ("shifted", ("ba", "--length", "4"), "line 1 was drawn with other settings or from another model"),
        ("masked", ("ba", "--length", "5"), "line 1 has the id '' of another request"),
        ("masked", ("de", "--length", "4"), "line 1 has the id '' of another request"),
    ):
        done = write(name, *arguments, "--out", str(out))
        assert done.code == 2
        assert words in done.stderr
        assert out.read_bytes() == data
    for other in (b"my notes", b"my notes\n", b'{"id": 1}\n', data + b"[]\n"):
        out.write_bytes(other)
        done = write("masked", "ba", "--length", "4", "--out", str(out))
        assert done.code == 2
        assert "no sample of dlm generate" in done.stderr
        assert out.read_bytes() == other
    out.write_bytes(data)
    done = write("masked", "ba", "--length", "4", "--out", str(out), "--set", "generate.batch_rows=3")
    assert "0 drawn, 1 were there already" in done.stderr  # that changes nothing


# Frames


def test_live_frames_lead_from_masks_to_the_text_one_sample_after_another(write) -> None:
    done = write("masked", "ba", "--length", "8", "--samples", "2", "--live")
    frames = re.findall(r"^-- sample (\d): pass (\d+)\n(.*?)(?=^-- |\Z)", ok(done), re.MULTILINE | re.DOTALL)
    numbers = [(int(sample), int(number)) for sample, number, _ in frames]
    assert numbers == sorted(numbers)
    records = json.loads(ok(write("masked", "ba", "--length", "8", "--samples", "2", "--json")))
    for sample, record in enumerate(records, 1):
        own = [text for number, _, text in frames if int(number) == sample]
        assert len(own) == record["nfe"] + 1
        assert own[0] == "ba" + MASK * 8 + "\n"
        counts = [text.count(MASK) for text in own]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == 0
    assert "\x1b" not in done.stdout


def test_in_a_terminal_frames_are_drawn_over_each_other_and_new_text_is_marked() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=40, color_system="standard", legacy_windows=False)
    words = {1: "one ", 2: "two\x1b[2J "}
    with Emerging(console, lambda ids: "".join(words[i] for i in ids), mask_token_id=0) as show:
        show.look("sample 1", 1, [1, 0, 0], [1, 2, 0])
        show.look("sample 1", 2, [1, 0, 0], [1, 2, 1])
    drawn = screen.getvalue()
    assert drawn.count("\x1b[1A") >= 2  # up again, for the next frame
    assert "\x1b[2J" not in drawn  # what the model writes is no command
    assert "two␛[2J" in drawn
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    assert MASK * 2 in plain
    assert plain.rstrip().endswith("one two␛[2J one")


def test_runs_of_a_frame_are_masked_new_or_old() -> None:
    assert list(runs_of([5, 0, 0, 7, 8, 9], [5, 0, 4, 0, 0, 9], 0)) == [
        ("old", [5]), ("masked", [0, 0]), ("new", [7, 8]), ("old", [9]),
    ]  # fmt: skip


class _Page(HTMLParser):
    """Scripts, attributes and whether tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.scripts, self.tags = list[str](), list[str](), list[tuple[str, dict[str, str | None]]]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def test_a_film_is_one_page_with_the_path_of_each_sample(write, tmp_path: Path) -> None:
    film = tmp_path / "deep" / "film.html"
    line = ("</script><u>ba", "--length", "8", "--samples", "2", "--film", str(film))
    (first, second) = json.loads(ok(write("masked", *line, "--json")))
    text = film.read_text(encoding="utf-8")
    page = _Page(text)
    assert not page.open
    assert "http" not in text.replace("http-equiv", "")
    assert not [tag for tag, attributes in page.tags if tag in ("link", "img", "u") or "src" in attributes]
    labels = {attributes["for"] for tag, attributes in page.tags if tag == "label"}
    assert labels == {attributes["id"] for tag, attributes in page.tags if tag == "input"} == {"film-1", "film-2"}
    *films, _ = [script for script in page.scripts if script.strip()]
    for record, script in zip((first, second), films, strict=True):
        data = json.loads(script)
        assert len(data["changes"]) == record["nfe"]
        pieces = list(data["first"])
        assert pieces.count(None) == 8
        for change in data["changes"]:
            for place, piece in change:
                pieces[place] = piece
        assert "".join(pieces) == visible(record["text"])


# Bad input


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("masked", ("a", "--prompt", "b"), "PROMPT and --prompt are given"),
        ("masked", ("a", "--infill", "b[MASK]"), "PROMPT and --infill are given"),
        ("masked", ("--infill", "no gap"), r"--infill has no gap to fill: \[MASK\] is a gap"),
        ("masked", ("--infill", r"\[MASK]"), "--infill has no gap to fill"),
        ("masked", ("--infill", "a[MASK:0]"), r"--infill has \[MASK:0\]: its number must be a whole one from 1 on"),
        ("masked", ("--infill", "a[MASK:x]"), r"--infill has \[MASK:x\]"),
        ("masked", ("--infill", "a[MASK:40]"), "those of the model have 32; shorten it"),
        ("masked", ("--infill", "a[MASK]", "--length", "3"), "--length is 3, but the gaps of --infill say"),
        ("next", ("--infill", "a[MASK]b"), "text stands behind a mask, which a model that predicts the next token"),
        ("masked", ("ba " * 90,), "which leaves nothing to draw of rows of 32"),
        ("masked", ("--length", "33"), "33 tokens are to be drawn, but rows of the model have 32; ask for fewer"),
        ("masked", ("--set", "generate.block_size=5", "--length", "12"), "windows of 5 tokens do not divide"),
        ("masked", ("--set", "generate.guidance=1"), "guidance is 1.0, but nothing is given"),
        ("masked", ("--set", "generate.temprature=1"), "did you mean temperature"),
        ("masked", ("--device", "tpu"), 'device is "tpu", which this machine lacks'),
        ("masked", ("--live", "--json"), "--live shows text and --json prints records"),
        ("masked", ("--out", "a.txt"), "--out a.txt is no .jsonl file"),
        ("masked", ("--film", "a.jsonl"), "--film a.jsonl is no .html file"),
        ("masked", ("--prompts", "no.jsonl"), "--prompts no.jsonl cannot be read: No such file"),
        ("masked", ("--prompts", "no.csv"), "--prompts no.csv is neither a .jsonl nor a .txt file"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(write, name: str, arguments: tuple[str, ...], words: str) -> None:
    done = write(name, *arguments)
    assert done.code == 2, done.stdout
    assert re.search(words, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_sources_without_weights_or_tokenizer_are_refused(
    dlm: Dlm, models: dict[str, Path], made: Artifacts, tmp_path: Path
) -> None:
    bare = save_model(tmp_path / "bare", random_model(LLAMA))
    for arguments, words in (
        (("no-run",), "there is no file or directory no-run, and no run of that name"),
        ((str(made.tokens),), "is an artifact of the stage tokenization, which holds no weights"),
        ((str(bare),), r"brings no tokenizer; give the artifact of the stage tokenizer"),
        ((str(bare), "--tokenizer", str(made.tokenizer)), "is not that of the weights"),
        ((str(bare), "--tokenizer", str(tmp_path / "no")), "there is no such directory"),
        ((str(models["masked"]), "--tokenizer", str(made.tokens)), "is an artifact of the stage tokenization"),
        ((str(models["masked"] / "model.safetensors"),), "its model is not known without the config.json"),
    ):
        done = dlm("generate", *arguments)
        assert done.code == 2
        assert re.search(words, done.stderr.replace("\n", " ")), done.stderr


def test_a_prompt_that_is_too_long_is_cut_from_the_left_and_counted(write, made: Artifacts) -> None:
    prompt = "ba de fi " * 20
    size = len(load_vocabulary(made.tokenizer).tokenizer.encode(prompt, add_special_tokens=False).ids)
    done = write("masked", prompt, "--length", "12", "--json")
    (record,) = json.loads(ok(done))
    assert (len(record["ids"]), record["num_cut"]) == (32, size - 20)
    assert f"note: 1 of 1 prompts were too long; {size - 20} tokens were cut from their left" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "p.jsonl, line 2 is no JSON"),
        ("[]\n", r"p.jsonl, line 1 is \[\]; a JSON object is wanted"),
        ('{"promt": "a"}\n', r"unknown setting p.jsonl, line 1.promt; did you mean prompt"),
        ('{"prompt": 3}\n', "p.jsonl, line 1.prompt is 3"),
        ('{"id": "a"}\n', "p.jsonl, line 1 has neither prompt and infill; give one"),
        ('{"prompt": "a", "infill": "[MASK]"}\n', "p.jsonl, line 1 has both prompt and infill"),
        ('\n{"infill": "a"}\n', "p.jsonl, line 2 has no gap to fill"),
        ('{"infill": "[MASK]", "length": 3}\n', "p.jsonl, line 1: length is 3; the gaps of infill say"),
        ('{"prompt": "a", "length": -3}\n', "p.jsonl, line 1: length is -3; it must be 0 or more"),
        ('{"prompt": "a"}\n{"id": "1", "prompt": "b"}\n', "p.jsonl, line 2: the id '1' is that of line 1 too"),
        ('{"prompt": "a", "prompt": "b"}\n', "p.jsonl, line 1: the key 'prompt' stands twice"),
        ("\n \n", "p.jsonl has no prompt"),
        ("\udcff", "is not UTF-8"),
    ],
)  # fmt: skip
def test_a_file_of_prompts_that_does_not_parse_names_the_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=words):
        read_requests(path, 0)


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one\n\n two  \n[MASK]\n")
    found = [(one.id, one.kind, one.text, one.length) for one in read_requests(path, 7)]
    assert found == [("1", "prompt", "one", 7), ("3", "prompt", " two  ", 7), ("4", "prompt", "[MASK]", 7)]


def test_a_pattern_is_text_and_gaps() -> None:
    assert parse_pattern("a [MASK] b[MASK:12][MASK:2]", "x") == ["a ", 1, " b", 12, 2]
    assert parse_pattern(r"[MASK:3]\[MASK:x] [mask] [MASKS]", "x") == [3, "[MASK:x] [mask] [MASKS]"]


def test_what_needs_no_model_needs_no_torch(models: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from workflows.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code)\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    for arguments in (("--help",), (str(models["masked"]),)):
        command = [sys.executable, "-c", code, "generate", *arguments, "--store", str(tmp_path / "no-store")]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr
