import gzip
import http.server
import json
import os
import re
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.corpus.config import Source
from pipeline.corpus.files import list_source, open_source
from pipeline.corpus.identity import external_data
from pipeline.errors import UserError, classify
from tests.pipeline.conftest import write_jsonl
from tests.support.corpus_runs import TEXTS, corpus_config, jsonl, make_corpus, planned

# Remote files


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    """A folder of an fsspec file system in memory, gone after the test."""
    url = f"memory://{request.node.name}"
    fs, path = fsspec.core.url_to_fs(url)
    fs.makedirs(path)
    yield url
    fs.rm(path, recursive=True)


def _put(url: str, data: bytes) -> None:
    with fsspec.open(url, "wb") as handle:
        handle.write(data)  # pyright: ignore[reportAttributeAccessIssue]


def test_every_kind_is_read_through_fsspec(tmp_path: Path, memory: str) -> None:
    parts = [TEXTS[i::7] for i in range(7)]
    table = [pa.table({"text": part}) for part in parts]
    pq.write_table(table[0], tmp_path / "x.parquet")
    for name, write in (("x.arrow", pa.ipc.new_file), ("y.arrow", pa.ipc.new_stream)):
        with write(str(tmp_path / name), table[0].schema) as writer:
            writer.write_table(table[1 if name[0] == "x" else 2])
    for name in ("x.parquet", "x.arrow", "y.arrow"):
        _put(f"{memory}/in/{name}", (tmp_path / name).read_bytes())
    _put(f"{memory}/in/deep/a.jsonl", jsonl(parts[3]))
    _put(f"{memory}/in/a.jsonl.gz", gzip.compress(jsonl(parts[4])))
    _put(f"{memory}/in/a.jsonl.zst", zstandard.compress(jsonl(parts[5])))
    for number, text in enumerate(parts[6]):
        _put(f"{memory}/in/{number}.txt", text.encode())
    _put(f"{memory}/in/.hidden/a.jsonl", jsonl(["hidden"]))
    _put(f"{memory}/in/notes.csv", b"of no known kind")
    for shard_bytes in (64_000_000, 100):
        assert sorted(make_corpus(tmp_path, f"{memory}/in", shard_bytes=shard_bytes).texts()) == sorted(TEXTS)
    names = [file.name for file in list_source("text", Source((f"{memory}/in/d*/*.jsonl",)))]
    assert names == ["deep/a.jsonl"]
    assert [file.name for file in list_source("text", Source((f"{memory}/in/x.arrow",)))] == ["x.arrow"]


def test_a_remote_file_that_changes_is_another_and_is_not_read(tmp_path: Path, memory: str) -> None:
    from pipeline.corpus.run import run_shard
    from pipeline.stage import StageContext

    _put(f"{memory}/a.jsonl", jsonl(TEXTS))
    config = corpus_config(f"{memory}/a.jsonl")
    before = external_data(config)
    assert before == external_data(config)
    (shard,) = planned(f"{memory}/a.jsonl")
    _put(f"{memory}/a.jsonl", jsonl(TEXTS[::-1]))
    assert external_data(config) != before
    with pytest.raises(UserError, match=r"a\.jsonl has changed since the run was planned"):
        run_shard(config, {}, shard, StageContext(tmp_path, tmp_path, "f"))


def test_a_url_that_leads_nowhere_is_named(memory: str) -> None:
    with pytest.raises(UserError, match=r"no file or folder 'memory://.*absent\.jsonl'"):
        planned(f"{memory}/absent.jsonl")
    with pytest.raises(UserError, match="holds no file of a known kind"):
        planned(f"{memory}/*.jsonl")
    with pytest.raises(UserError, match=r"nonsense://x/y\.jsonl cannot be opened: Protocol not known: nonsense"):
        planned("nonsense://x/y.jsonl")


@pytest.fixture
def answers() -> Iterator[tuple[str, dict[str, Any]]]:
    """The URL of a file on a server, and how the server answers for it."""
    answer: dict[str, Any] = {"status": 200, "headers": {"Content-Length": "9", "ETag": "x"}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer["status"])
            for name, value in answer["headers"].items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(b"some text")

        def log_message(self, format: str, *args: Any) -> None:
            """Tests are quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/x.jsonl", answer
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.jsonl", "http://127.0.0.1:1/*.jsonl", "ftp://127.0.0.1:1/x.md"])
def test_a_host_that_cannot_be_reached_is_named(url: str) -> None:
    with pytest.raises(UserError, match=rf"corpus\.source: '{re.escape(url)}' cannot be read: .*[Cc]onnect"):
        planned(url)


def test_a_server_that_fails_is_the_users_in_the_plan_and_passing_in_the_run(
    answers: tuple[str, dict[str, Any]],
) -> None:
    url, answer = answers
    (file,) = list_source("text", Source((url,)))
    answer["status"] = 503
    with pytest.raises(UserError, match=rf"corpus\.source: .*{url}.*503"):
        planned(url)
    with pytest.raises(ConnectionError, match=rf"{url} cannot be reached: .*503") as caught:
        open_source(file)
    assert classify(caught.value) == "transient"
    answer["status"] = 404
    with pytest.raises(UserError, match=rf"{url} cannot be read any more"):
        open_source(file)


def test_a_remote_file_without_a_size_is_refused(answers: tuple[str, dict[str, Any]]) -> None:
    url, answer = answers
    answer["headers"] = {}
    with pytest.raises(UserError, match=rf"{url} has no known size.*Download it"):
        planned(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("zip://x.jsonl::/data/a.zip", "is a chain of file systems"),
        ("simplecache::s3://bucket/x.jsonl", "is a chain of file systems"),
        ("ftp://me:secret@host/x.jsonl", "the URL of 'host' holds a password"),
        ("https://me:secret@host/x.jsonl", "the URL of 'host' holds a user name, token or password"),
        ("https://secret@host/x.jsonl", "the URL of 'host' holds a user name, token or password"),
        ("HTTP://secret@host:80/*.jsonl", "the URL of 'host' holds a user name, token or password"),
        ("http://[::1/x.jsonl", "is no URL"),
    ],
)
def test_a_url_that_cannot_be_kept_is_refused(url: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"corpus\.source\.text\.paths: .*{message}") as caught:
        corpus_config(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["ssh://me@host/x.jsonl", "s3://bucket/a@b.jsonl", "https://host/a@b.jsonl?c@d"])
def test_a_url_with_the_name_of_a_place_before_an_at_is_kept(url: str) -> None:
    assert corpus_config(url).source["text"].paths == (url,)


def test_a_url_of_a_local_file_is_that_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert corpus_config(f"file://{path}") == corpus_config(str(path))


# The hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``datasets`` opens without a network, a folder with three shards, under a name of the hub."""
    import datasets

    folder = tmp_path / "dataset"
    folder.mkdir()
    for number in range(3):
        write_jsonl(folder / f"train-{number}.jsonl", TEXTS[number::3])
    load_dataset = datasets.load_dataset

    def load_local(name: str, subset: None, *, split: str, revision: str | None, streaming: bool) -> Any:
        assert name == "some/set"
        return load_dataset(str(folder), subset, split=split, streaming=streaming)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", load_local)
    return "hf:some/set"


def test_a_dataset_is_streamed_with_a_shard_for_each_of_its_own(tmp_path: Path, dataset: str) -> None:
    more = [f"more {i}" for i in range(9)]
    made = make_corpus(tmp_path, {"hub": dataset, "local": str(write_jsonl(tmp_path / "l.jsonl", more))})
    assert sorted(made.texts()) == sorted([*TEXTS, *more])
    assert {"train-hub-00002.arrow", "held_out-hub-00000.arrow"} <= set(made.files())
    assert made.stats["sources"]["hub"]["records"] == len(TEXTS)
    shards = planned(dataset)
    assert [shard["piece"]["start"] for shard in shards] == [0, 1, 2]
    assert not any("identity" in shard for shard in shards)


def test_a_dataset_of_a_pinned_commit_has_shards_of_known_identity(dataset: str) -> None:
    shards = planned(dataset, hub_revision=COMMIT)
    assert len({json.dumps(shard["identity"]) for shard in shards}) == 3


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", COMMIT[:8], COMMIT + "0", "g" * 40])
def test_a_dataset_of_a_branch_has_shards_of_no_known_identity(dataset: str, revision: str) -> None:
    assert not any("identity" in shard for shard in planned(dataset, hub_revision=revision))


@pytest.mark.parametrize("item", ["", "/data/set", "./set", "../set", "~/set", "a/b/c", "set:", "/data/set:part"])
def test_a_dataset_that_is_none_of_the_hub_is_refused(item: str) -> None:
    with pytest.raises(UserError, match=r"corpus\.source\.text\.paths: 'hf:.*names no dataset .* Name the files"):
        corpus_config(f"hf:{item}")


def test_a_dataset_that_a_folder_here_would_hide_is_refused(
    tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some" / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'hf:some/set' datasets would open .*some/set, .* without hf:"):
        planned(dataset)


def test_a_dataset_with_other_shards_than_planned_is_refused(tmp_path: Path, dataset: str) -> None:
    from pipeline.corpus.run import run_shard
    from pipeline.stage import StageContext

    shard = planned(dataset)[0]
    os.unlink(tmp_path / "dataset" / "train-0.jsonl")
    with pytest.raises(UserError, match="has 2 shards, 3 when the run was planned"):
        run_shard(corpus_config(dataset), {}, shard, StageContext(tmp_path, tmp_path, "f"))


def test_hub_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:some/set needs the package datasets: pip install"):
        planned("hf:some/set")


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach the Hub"), FileNotFoundError("no such set"), ValueError("no such subset")]
)
def test_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"cannot open 'some/set:part': {error}"):
        planned("hf:some/set:part")


def test_hub_that_cannot_be_reached_any_more_may_be_tried_again(
    tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from pipeline.corpus.run import run_shard
    from pipeline.stage import StageContext

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    shard = planned(dataset)[0]
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError, match="Couldn't reach the Hub") as caught:
        run_shard(corpus_config(dataset), {}, shard, StageContext(tmp_path, tmp_path, "f"))
    assert classify(caught.value) == "transient"


def test_hub_is_asked_for_name_subset_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, **settings: Any) -> Any:
        asked.append((names, settings))
        return types.SimpleNamespace(num_shards=2)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    assert len(planned("hf:some/set:part", hub_split="test", hub_revision="abc")) == 2
    assert asked == [(("some/set", "part"), {"split": "test", "revision": "abc", "streaming": True})]
