import gzip
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import stage
from pipeline.artifact import load_manifest
from pipeline.config import from_json
from pipeline.corpus import plan
from pipeline.corpus.config import STAGE, CorpusConfig, for_source
from pipeline.corpus.files import SourceFile
from pipeline.corpus.identity import external_data
from pipeline.corpus.pieces import Piece, cut_row_groups, cut_runs
from pipeline.corpus.plan import _piece_identity
from pipeline.corpus.run import finish, list_shards, run_shard
from pipeline.errors import UserError
from pipeline.stage import StageContext, Stopped, shard_fingerprint, stage_fingerprint
from tests.pipeline.conftest import write_jsonl
from tests.support.corpus_runs import TEXTS, corpus_config, jsonl, make_corpus, planned

FILES = [SourceFile(f"f{number:03d}.txt", "", 50 + number * 37 % 250, "") for number in range(60)]


def _changed(before: Sequence[SourceFile], after: Sequence[SourceFile], shard_bytes: int) -> tuple[int, int]:
    """How many runs are gone, and how many are new."""
    runs = [set(cut_runs(files, shard_bytes)) for files in (before, after)]
    return len(runs[0] - runs[1]), len(runs[1] - runs[0])


def test_runs_hold_every_file_once_in_order_and_are_of_about_the_size() -> None:
    runs = list(cut_runs(FILES, 1000))
    assert [file for run in runs for file in run.files] == FILES
    total = sum(file.size_bytes for file in FILES)
    assert total / 1000 / 2 < len(runs) < total / 1000 * 2


@settings(deadline=None)
@given(
    numbers=st.sets(st.integers(0, 500), max_size=40),
    sizes=st.integers(0, 300),
    one=st.integers(0, 500),
    new_size=st.integers(0, 300),
)
def test_one_file_more_or_less_or_changed_changes_two_runs_at_most(
    numbers: set[int], sizes: int, one: int, new_size: int
) -> None:
    files = [SourceFile(f"{n:03d}", "", (n * 7919 + sizes) % 300, "") for n in sorted(numbers - {one})]
    more = sorted([*files, SourceFile(f"{one:03d}", "", 100, "")], key=lambda file: file.name)
    changed = sorted([*files, SourceFile(f"{one:03d}", "", new_size, "x")], key=lambda file: file.name)
    assert max(_changed(files, more, 1000)) <= 2
    assert max(_changed(more, changed, 1000)) <= 2


def test_a_large_file_is_a_run_of_its_own_and_leaves_the_others() -> None:
    large = SourceFile("f030b.txt", "", 5000, "")
    more = sorted([*FILES, large], key=lambda file: file.name)
    assert Piece((large,)) in set(cut_runs(more, 1000))
    assert _changed(FILES, more, 1000)[0] <= 1


def test_a_run_that_chance_does_not_end_is_ended() -> None:
    names = [name for name in map(str, range(2000)) if _share(name) > 0.5][:500]
    files = [SourceFile(name, "", 400, "") for name in names]
    assert {len(run.files) for run in cut_runs(files, 1000)} == {20}


def _share(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") / 2**64


def test_row_groups_are_taken_together_until_the_size_is_reached() -> None:
    file = SourceFile("a.parquet", "", 10**6, "")
    pieces = list(cut_row_groups(file, [40, 70, 200, 10, 20, 80, 5], 100))
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 2), (2, 3), (3, 6), (6, 7)]


@settings(deadline=None, max_examples=30)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1, max_size=12),
    shard_bytes=st.integers(100, 3000),
    end=st.booleans(),
)
def test_byte_ranges_of_lines_give_what_the_whole_file_gives(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], shard_bytes: int, end: bool
) -> None:
    root = tmp_path_factory.mktemp("ranges")
    data = jsonl([*TEXTS[:20], *texts, *TEXTS[20:]]) + b"\n\njunk\n"
    (root / "a.jsonl").write_bytes(data if end else data.rstrip())
    whole = make_corpus(root, root / "a.jsonl", max_bad_ratio=0.5)
    parts = make_corpus(root, root / "a.jsonl", max_bad_ratio=0.5, shard_bytes=shard_bytes)
    for split in ("train", "held_out"):
        assert parts.texts(split) == whole.texts(split)
    assert parts.rejects() == whole.rejects()
    assert parts.stats == whole.stats


@pytest.mark.parametrize("shard_bytes", range(1, 12))
def test_byte_ranges_at_every_place_of_a_line_lose_none(tmp_path: Path, shard_bytes: int) -> None:
    lines = [f'{{"text":"{c}"}}' for c in "abcdefgh"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert sorted(make_corpus(tmp_path, tmp_path / "a.jsonl", shard_bytes=shard_bytes).texts()) == list("abcdefgh")


def test_row_groups_of_a_large_parquet_give_what_the_whole_file_gives(tmp_path: Path) -> None:
    values = [*TEXTS, None, *(f"more {i}" for i in range(300))]
    pq.write_table(pa.table({"text": values, "id": range(341)}), tmp_path / "a.parquet", row_group_size=30)
    whole = make_corpus(tmp_path, tmp_path / "a.parquet")
    parts = make_corpus(tmp_path, tmp_path / "a.parquet", shard_bytes=700)
    assert len(planned(tmp_path / "a.parquet", shard_bytes=700)) > 3
    assert parts.texts("train") == whole.texts("train")
    assert parts.stats == whole.stats
    assert parts.rejects() == whole.rejects() == [{"file": "a.parquet", "line": 41, "reason": "'text' holds NoneType"}]


def test_a_compressed_file_is_one_shard_whatever_its_size(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    assert len(planned(tmp_path / "a.jsonl.gz", shard_bytes=1)) == 1


# The whole fan-out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of several kinds and sizes."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for number in range(30):
        write_jsonl(folder / f"{number:02d}.jsonl", [f"small {number} {i}" for i in range(number % 4 + 1)])
    write_jsonl(folder / "deep" / "large.jsonl", [*TEXTS, "small 3 1"])
    (folder / "z.txt").write_text("a text\n\nof two pieces")
    return folder


def _config(folder: Path) -> CorpusConfig:
    return corpus_config(str(folder), shard_bytes=400)


def _run(config: CorpusConfig, shards: Sequence[dict[str, Any]], root: Path) -> list[Path]:
    directories = [root / shard["name"] for shard in shards]
    for shard, directory in zip(shards, directories, strict=True):
        directory.mkdir(parents=True, exist_ok=True)
        stage.run_shard(STAGE, config, {}, shard, StageContext(directory, root, "f"))
    return directories


def _finished(config: CorpusConfig, directories: Sequence[Path], out: Path) -> dict[str, bytes]:
    out.mkdir()
    stats = finish(config, {}, directories, StageContext(out, out, "f"))
    return {path.name: path.read_bytes() for path in out.iterdir()} | {"stats": json.dumps(stats).encode()}


def test_shards_in_another_order_of_completion_give_the_same_corpus(tmp_path: Path, folder: Path) -> None:
    config = _config(folder)
    shards = list_shards(config, {}, StageContext(tmp_path, tmp_path, "f"))
    assert len(shards) > 8
    assert len({shard["name"] for shard in shards}) == len(shards)
    first = _finished(config, _run(config, shards, tmp_path / "a"), tmp_path / "first")
    shuffled = random.Random(0).sample(shards, len(shards))
    _run(config, json.loads(json.dumps(shuffled)), tmp_path / "b")
    second = _finished(config, [tmp_path / "b" / shard["name"] for shard in shards], tmp_path / "second")
    assert first == second
    for number, _ in enumerate(shards):
        train = tmp_path / "a" / f"text-{number:05d}" / "train.arrow"
        named = tmp_path / "first" / f"train-text-{number:05d}.arrow"
        assert train.exists() == named.exists()
        assert not train.exists() or train.stat().st_ino == named.stat().st_ino


def test_the_order_of_a_directory_listing_does_not_matter(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = planned(folder, shard_bytes=400)
    walk = os.walk

    def reversed_walk(root: Any, onerror: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for here, folders, names in walk(root, onerror=onerror):
            yield here, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert planned(folder, shard_bytes=400) == before


def _by_identity(config: CorpusConfig, shards: Sequence[dict[str, Any]], root: Path) -> dict[str, dict[str, bytes]]:
    directories = _run(config, shards, root)
    return {
        json.dumps(shard["identity"], sort_keys=True): {
            record.path: (directory / record.path).read_bytes() for record in load_manifest(directory).files
        }
        | {"stats": json.dumps(load_manifest(directory).stats).encode()}
        for shard, directory in zip(shards, directories, strict=True)
    }


def test_shards_of_one_identity_are_the_same_bytes_and_few_change_with_a_file(tmp_path: Path, folder: Path) -> None:
    config = _config(folder)
    before = _by_identity(config, planned(folder, shard_bytes=400), tmp_path / "before")
    write_jsonl(folder / "10b.jsonl", ["one more file"])
    (folder / "20.jsonl").unlink()
    after = _by_identity(config, planned(folder, shard_bytes=400), tmp_path / "after")
    shared = before.keys() & after.keys()
    assert 0 < len(before) - len(shared) <= 4
    assert len(after) - len(shared) <= 4
    assert all(before[key] == after[key] for key in shared)


def test_identity_of_shards_follows_neither_place_nor_time_nor_other_sources(tmp_path: Path, folder: Path) -> None:
    before = [shard["identity"] for shard in planned({"b": str(folder)}, shard_bytes=400)]
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    source = {"a": str(write_jsonl(tmp_path / "other.jsonl", TEXTS)), "b": str(moved)}
    shards = planned(source, shard_bytes=400)
    assert [shard["identity"] for shard in shards if shard["source"] == "b"] == before
    assert str(tmp_path) not in json.dumps(before)


def _fingerprints(source: Any, settings: dict[str, Any]) -> tuple[str, list[str]]:
    """That of the artifact, and those of its shards."""
    config = corpus_config(source, **settings)
    shards = [shard_fingerprint(STAGE, config, shard) for shard in planned(source, **settings)]
    return stage_fingerprint(STAGE, config, {}, external_data(config)), shards


@pytest.mark.parametrize(
    "settings",
    [
        {"text_field": "body"},
        {"filters": {"min_chars": 2}},
        {"filters": {"max_chars": 99}},
        {"filters": {"quality": ["pipeline.corpus.filters:compressibility"]}},
        {"undecodable": "skip"},
        {"max_line_bytes": 99},
        {"txt_document_chars": 99},
        {"held_out_fraction": 0.4},
        {"split_seed": 1},
        {"shard_bytes": 99_000_000},
    ],
    ids=str,
)
def test_what_changes_a_shard_is_in_its_identity(folder: Path, settings: dict[str, Any]) -> None:
    before, after = (_fingerprints(str(folder), changed) for changed in ({}, settings))
    assert before[0] != after[0]
    assert set(before[1]).isdisjoint(after[1])
    own = {key: value for key, value in settings.items() if key in ("text_field", "filters")}
    if own:
        in_source = _fingerprints({"text": {"paths": str(folder), **own}}, {})
        assert in_source[1] == after[1]


@pytest.mark.parametrize("drop", [True, False])
def test_what_changes_the_artifact_alone_is_not_in_the_identity_of_its_shards(folder: Path, drop: bool) -> None:
    before = _fingerprints(str(folder), {"filters": {"min_chars": 2, "drop_duplicates": not drop}})
    filters = {"min_chars": 2, "drop_duplicates": drop}
    for source, own in (
        (str(folder), {"filters": filters}),
        ({"text": {"paths": str(folder), "filters": filters}}, {}),
        (str(folder), {"filters": {**filters, "drop_duplicates": not drop}, "max_bad_ratio": 0.5}),
    ):
        after = _fingerprints(source, own)
        assert before[0] != after[0]
        assert before[1] == after[1]


def test_how_much_a_file_may_decompress_to_is_in_no_identity(folder: Path) -> None:
    assert _fingerprints(str(folder), {"max_decompression_ratio": 9.0}) == _fingerprints(str(folder), {})


def test_every_part_of_a_piece_is_in_the_identity_of_its_shard(tmp_path: Path) -> None:
    a, b = write_jsonl(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", TEXTS[1:])
    file = SourceFile("a.jsonl", str(a), 1, "")
    pieces = [
        Piece((file,)),
        Piece((replace(file, name="c.jsonl"),)),
        Piece((replace(file, url=str(b)),)),
        Piece((file, replace(file, name="c.jsonl"))),
        Piece((file,), start=1),
        Piece((file,), stop=1),
        Piece(dataset="hf:some/set"),
        Piece(dataset="hf:other/set"),
    ]
    config = corpus_config(str(a))
    found = [shard_fingerprint(STAGE, config, {"name": "s", "identity": _piece_identity(piece)}) for piece in pieces]
    assert len(set(found)) == len(pieces)
    same = Piece((replace(file, size_bytes=2, stamp="later"),))
    assert shard_fingerprint(STAGE, config, {"name": "t", "identity": _piece_identity(same)}) == found[0]


def test_a_file_of_another_name_or_source_makes_another_shard(folder: Path) -> None:
    before = set(_fingerprints(str(folder / "z.txt"), {})[1])
    assert before.isdisjoint(_fingerprints({"a": str(folder / "z.txt")}, {})[1])
    (folder / "z.txt").rename(folder / "y.txt")
    assert before.isdisjoint(_fingerprints(str(folder / "y.txt"), {})[1])


def test_sources_are_read_by_name(tmp_path: Path, folder: Path) -> None:
    other = str(write_jsonl(tmp_path / "o.jsonl", TEXTS))
    names = [shard["source"] for shard in planned({"zoo": other, "Ape": str(folder), "bee": other}, shard_bytes=400)]
    assert names == sorted(names)
    assert [names.count(name) > 1 for name in ("Ape", "bee", "zoo")] == [True, True, True]


@pytest.mark.parametrize("change", ["touch", "grow", "remove", "overwrite", "replace"])
def test_a_file_that_changed_since_the_plan_is_refused(tmp_path: Path, folder: Path, change: str) -> None:
    config = _config(folder)
    shards = planned(folder, shard_bytes=400)
    path = folder / "z.txt"
    if change == "touch":
        os.utime(path, ns=(0, 0))
    elif change == "grow":
        path.write_text(path.read_text() + "more")
    elif change in ("overwrite", "replace"):
        before, other = path.stat(), path if change == "overwrite" else folder / "other"
        other.write_text(path.read_text().swapcase())
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.rename(path)
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"z\.txt (has changed since|cannot be read any more)"):
        _run(config, shards, tmp_path / "out")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    from pipeline.corpus.ledger import Ledger
    from pipeline.corpus.read import read_piece

    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (shard,) = planned(path)
    with (tmp_path / "rejects").open("w") as rejects:
        piece = from_json(Piece, shard["piece"])
        documents = read_piece(piece, for_source(corpus_config(str(path)), "text"), Ledger(rejects), True)
        assert next(documents) == TEXTS[0]
        os.utime(path, ns=(0, 0))
        with pytest.raises(UserError, match=r"a\.jsonl has changed since the run was planned"):
            list(documents)


def _stopped_after(root: Path, source: str, asked: int) -> bool:
    """Whether a shard stops when it is asked for the given time, and is asked so often at all."""
    answers = iter([False] * (asked - 1))
    context = StageContext(root, root, "f", should_stop=lambda: next(answers, True))
    try:
        run_shard(corpus_config(source, max_bad_ratio=1.0), {}, planned(source)[0], context)
    except Stopped:
        return True
    return False


def test_a_shard_that_is_asked_to_stop_stops(tmp_path: Path, folder: Path) -> None:
    assert _stopped_after(tmp_path, str(folder), 1)


@pytest.mark.parametrize("name", ["broken.jsonl", "broken.parquet", "giant.md", "bad_giant.md"])
def test_a_shard_stops_where_no_document_comes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "broken.jsonl":
        path.write_text('{"text": 5}\n' * 10)
    elif name == "broken.parquet":
        pq.write_table(pa.table({"text": pa.nulls(2000)}), path)
    else:
        path.write_bytes(b"a giant line\n" * 2_000_000 + b"\xff" * name.startswith("bad"))
    for asked in (1, 2, 4):
        assert _stopped_after(tmp_path, str(path), asked)


def test_a_source_of_too_many_shards_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_MAX_PIECES", 3)
    with pytest.raises(UserError, match=r"corpus\.source\.text makes more than 3 shards .* raise corpus\.shard_bytes"):
        planned(folder, shard_bytes=400)


def test_the_size_of_shards_is_identity_and_their_data_are_not_in_the_config(folder: Path) -> None:
    from pipeline.config import fingerprint, identity

    a, b = _config(folder), corpus_config(str(folder), shard_bytes=401)
    assert fingerprint(identity(a)) != fingerprint(identity(b))
    assert external_data(a) == external_data(b)


def test_counts_of_a_source_are_the_sum_over_its_shards(tmp_path: Path, folder: Path) -> None:
    whole = make_corpus(tmp_path, folder)
    parts = make_corpus(tmp_path, folder, shard_bytes=400)
    assert parts.stats == whole.stats
    assert (whole.source["files"], whole.source["dropped"]) == (32, {"duplicate": 1})
