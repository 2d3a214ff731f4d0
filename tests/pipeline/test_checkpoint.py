"""Which checkpoint counts, how one is published, and which are deleted."""

import errno
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import training_state
from pipeline.artifact import MANIFEST, FileRecord, record_files
from pipeline.config import fingerprint
from pipeline.errors import CorruptionError, UserError
from pipeline.pretrain import checkpoint as checkpoint_module
from pipeline.pretrain.checkpoint import (
    changes_of_identity,
    clear_staging,
    load_checkpoint_manifest,
    newest_valid,
    publish,
    retain,
    share_of,
)
from pipeline.training_state import (
    CheckpointManifest,
    checkpoint_name,
    file_name,
    list_checkpoints,
    read_manifest,
    write_manifest,
)
from tests.pipeline.conftest import cut_end, damage, flip_bit
from tests.support.hand_checkpoints import IDENTITY, TOPOLOGY, all_find, alone, published, write_staging
from tests.support.hand_state import SHAPES


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are not there are waited for, but not for seconds."""
    monkeypatch.setattr(training_state, "_PATIENCE_S", (0.001,) * 4)


def _some_file(checkpoint: Path) -> Path:
    return checkpoint / file_name(1)


def _edit_manifest(checkpoint: Path, **changes: Any) -> None:
    """Change a manifest as whoever wants to deceive would: its checksum is right."""
    value = json.loads((checkpoint / MANIFEST).read_text())
    del value["sha256"]
    value |= changes
    (checkpoint / MANIFEST).write_text(json.dumps({**value, "sha256": fingerprint(value)}))


def _files(checkpoint: Path) -> list[dict[str, Any]]:
    return json.loads((checkpoint / MANIFEST).read_text())["files"]


def test_publish_of_a_complete_set_is_found_and_loaded(tmp_path: Path) -> None:
    final = published(tmp_path, 7)
    found = newest_valid(tmp_path, alone(), pytest.fail)
    assert found is not None
    checkpoint, manifest = found
    assert checkpoint == final == tmp_path / "step-00000007"
    assert (manifest.step, manifest.identity, manifest.topology) == (7, IDENTITY, TOPOLOGY)
    assert [record.path for record in manifest.files] == ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("rank", [0, 1])
def test_publish_of_an_incomplete_set_names_the_file_and_publishes_nothing(tmp_path: Path, rank: int) -> None:
    staging, manifest = write_staging(tmp_path, 3, without=file_name(rank))
    with pytest.raises(CorruptionError, match=rf"lacks \['{file_name(rank)}'\]"):
        publish(staging, manifest)
    assert newest_valid(tmp_path, alone(), pytest.fail) is None
    assert not list_checkpoints(tmp_path)


@pytest.mark.parametrize("change", [Path.unlink, cut_end])
def test_publish_of_a_file_that_is_not_there_as_it_was_written_publishes_nothing(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    staging, manifest = write_staging(tmp_path, 3)
    change(staging / file_name(1))
    with pytest.raises(CorruptionError, match=file_name(1)):
        publish(staging, manifest)
    assert not list_checkpoints(tmp_path)


def test_publish_over_a_leftover_of_the_same_step_replaces_it(tmp_path: Path) -> None:
    leftover = tmp_path / checkpoint_name(4)
    leftover.mkdir()
    (leftover / "stray").write_text("old")
    assert published(tmp_path, 4) == leftover
    assert load_checkpoint_manifest(leftover).step == 4
    assert not (leftover / "stray").exists()


def test_publish_over_a_whole_checkpoint_of_the_same_step_leaves_that_one(tmp_path: Path) -> None:
    final = published(tmp_path, 4)
    before = (final / MANIFEST).stat().st_ino
    published(tmp_path, 4)
    assert (final / MANIFEST).stat().st_ino == before
    assert list(tmp_path.iterdir()) == [final]


class Crash(BaseException):
    """The end of the process."""


@pytest.mark.parametrize("call", range(12))
@pytest.mark.parametrize("leftover", [False, True])
def test_a_crash_at_any_call_of_publish_leaves_the_checkpoint_before_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, leftover: bool
) -> None:
    published(tmp_path, 3)
    if leftover:
        cut_end(_some_file(published(tmp_path, 4)))
    staging, manifest = write_staging(tmp_path, 4)
    calls = [0]

    def crashing(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] > call:
                raise Crash
            return function(*given, **more)

        return counted

    with monkeypatch.context() as patch:
        for where, name in [(checkpoint_module, "write_manifest"), (checkpoint_module, "remove_tree")]:
            patch.setattr(where, name, crashing(getattr(where, name)))
        for where, name in [(checkpoint_module, "fsync_dir"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree")]:
            patch.setattr(where, name, crashing(getattr(where, name)))
        try:
            publish(staging, manifest)
        except Crash:
            pass
        else:
            assert calls[0] <= call
    found = newest_valid(tmp_path, alone(), lambda message: None)
    assert found is not None
    assert found[1].step == (4 if (tmp_path / checkpoint_name(4)).exists() else 3)
    clear_staging(tmp_path)
    assert not staging.exists()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated file": lambda c: cut_end(_some_file(c)),
    "emptied file": lambda c: damage(_some_file(c), lambda data: data.clear()),
    "longer file": lambda c: damage(_some_file(c), lambda data: data.append(0)),
    "flipped bit": lambda c: flip_bit(_some_file(c), 10),
    "missing file": lambda c: _some_file(c).unlink(),
    "missing manifest": lambda c: (c / MANIFEST).unlink(),
    "empty manifest": lambda c: (c / MANIFEST).write_text(""),
    "half a manifest": lambda c: cut_end(c / MANIFEST, 100),
    "manifest of zeros": lambda c: (c / MANIFEST).write_bytes(bytes(400)),
    "manifest that is a list": lambda c: (c / MANIFEST).write_text("[]"),
    "manifest of another kind": lambda c: (c / MANIFEST).write_text('{"stage": "corpus"}'),
    "manifest with a flipped digit": lambda c: (c / MANIFEST).write_text(
        (c / MANIFEST).read_text().replace('"lr": 0.1', '"lr": 0.3')
    ),
    "manifest without a checksum": lambda c: (c / MANIFEST).write_text(
        json.dumps({k: v for k, v in json.loads((c / MANIFEST).read_text()).items() if k != "sha256"})
    ),
    "manifest without a file": lambda c: _edit_manifest(c, files=_files(c)[:1]),
    "manifest with a file twice": lambda c: _edit_manifest(c, files=[*_files(c), _files(c)[0]]),
    "manifest of more workers": lambda c: _edit_manifest(c, topology={**vars(TOPOLOGY), "workers": 3}),
    "manifest of another step": lambda c: _edit_manifest(c, step=19),
    "manifest of another model": lambda c: _edit_manifest(c, shapes={**SHAPES, "gate": [2]}),
    "manifest of a larger model": lambda c: _edit_manifest(c, shapes={**SHAPES, "more": [2]}),
    "manifest with a field too many": lambda c: _edit_manifest(c, surprise=1),
    "manifest with NaN": lambda c: (c / MANIFEST).write_text(
        (c / MANIFEST).read_text().replace('"lr": 0.1', '"lr": NaN')
    ),
    "manifest that leads outside": lambda c: _edit_manifest(
        c, files=[{**r, "path": f"../{c.name}/{r['path']}"} for r in _files(c)]
    ),
    "manifest that leads to the root": lambda c: _edit_manifest(
        c, files=[{**r, "path": str(c / r["path"])} for r in _files(c)]
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_newest_valid_falls_back_past_a_damaged_checkpoint_and_sets_it_aside(tmp_path: Path, kind: str) -> None:
    older, newer = published(tmp_path, 10), published(tmp_path, 20)
    DAMAGES[kind](newer)
    warnings: list[str] = []
    found = newest_valid(tmp_path, alone(), warnings.append)
    assert found is not None
    assert (found[0], found[1].step) == (older, 10)
    assert len(warnings) == 1
    assert str(newer) in warnings[0]
    assert not newer.exists()
    (aside,) = tmp_path.glob("corrupt-step-00000020-*")
    assert aside.name in warnings[0]
    assert newest_valid(tmp_path, alone(), pytest.fail) == found


@pytest.mark.parametrize("kind", DAMAGES)
def test_newest_valid_with_every_checkpoint_damaged_refuses_to_start_over(tmp_path: Path, kind: str) -> None:
    for step in (1, 2, 3):
        DAMAGES[kind](published(tmp_path, step))
    warnings: list[str] = []
    with pytest.raises(CorruptionError, match=r"all checkpoints .* are damaged"):
        newest_valid(tmp_path, alone(), warnings.append)
    assert len(warnings) == 3
    with pytest.raises(CorruptionError, match=r"all checkpoints .* are damaged"):
        newest_valid(tmp_path, alone(), pytest.fail)


def test_newest_valid_without_any_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path, alone(), pytest.fail) is None
    write_staging(tmp_path, 5)
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-00000005.tmp").mkdir()
    (tmp_path / "step-00000006").write_text("a file")
    assert newest_valid(tmp_path, alone(), pytest.fail) is None
    assert list_checkpoints(tmp_path) == []


def test_staging_beside_a_checkpoint_is_ignored_and_cleared(tmp_path: Path) -> None:
    final = published(tmp_path, 5)
    staging, _ = write_staging(tmp_path, 6)
    found = newest_valid(tmp_path, alone(), pytest.fail)
    assert found is not None
    assert found[0] == final
    clear_staging(tmp_path)
    assert not staging.exists()
    assert final.exists()


def test_list_checkpoints_is_newest_first(tmp_path: Path) -> None:
    for step in (9, 100, 11, 2):
        published(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(s) for s in (100, 11, 9, 2)]


@pytest.mark.parametrize("text", ["", "../../elsewhere", "/etc", "step-00000005"])
def test_a_file_that_calls_itself_the_latest_is_not_asked(tmp_path: Path, text: str) -> None:
    final = published(tmp_path, 9)
    published(tmp_path, 5)
    (tmp_path / "latest").write_text(text)
    found = newest_valid(tmp_path, alone(), pytest.fail)
    assert found is not None
    assert found[0] == final


def test_a_link_that_is_named_like_a_checkpoint_is_none(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    elsewhere = published(tmp_path / "elsewhere", 9)
    final = published(tmp_path, 5)
    (tmp_path / checkpoint_name(9)).symlink_to(elsewhere)
    assert list_checkpoints(tmp_path) == [final]


@pytest.mark.parametrize(("version", "age"), [(1, "an older"), (3, "a newer")])
def test_a_checkpoint_of_another_version_of_the_program_is_refused_and_stays(
    tmp_path: Path, version: int, age: str
) -> None:
    final = published(tmp_path, 9)
    published(tmp_path, 5)
    _edit_manifest(final, schema_version=version)
    with pytest.raises(UserError, match=rf"{age} version of this program \(schema version {version}, this one reads 2"):
        newest_valid(tmp_path, alone(), pytest.fail)
    assert final.exists()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_each_file_is_hashed_by_one_rank_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    final, hashed = published(tmp_path, 7), dict[str, list[str]]()
    verify_bytes = checkpoint_module.verify_bytes

    def verify_and_tell(checkpoint: Path, records: list[FileRecord], *rest: Any) -> None:
        hashed[threading.current_thread().name] = [record.path for record in records]
        verify_bytes(checkpoint, records, *rest)

    monkeypatch.setattr(checkpoint_module, "verify_bytes", verify_and_tell)
    found = all_find(tmp_path, workers, [])
    assert [path for path, _ in found] == [final] * workers
    assert len(hashed) == workers
    assert sorted(path for paths in hashed.values() for path in paths) == [file_name(0), file_name(1)]
    assert max(map(len, hashed.values())) == (2 if workers == 1 else 1)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=20), st.integers(1, 8))
def test_shares_of_hashing_are_every_file_once_and_differ_by_one_file_at_most(sizes: list[int], workers: int) -> None:
    files = [FileRecord(file_name(rank), size, "") for rank, size in enumerate(sizes)]
    shares = [share_of(files, rank, workers) for rank in range(workers)]
    assert sorted((file for share in shares for file in share), key=lambda file: file.path) == files
    totals = [sum(file.size_bytes for file in share) for share in shares]
    assert max(totals) - min(totals) <= max(sizes)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_damaged_in_the_share_of_any_rank_makes_all_fall_back_together(tmp_path: Path, rank: int) -> None:
    older, newer = published(tmp_path, 10), published(tmp_path, 20)
    flip_bit(newer / file_name(rank))
    warnings: list[str] = []
    assert [(path, manifest.step) for path, manifest in all_find(tmp_path, 2, warnings)] == [(older, 10)] * 2
    (aside,) = tmp_path.glob("corrupt-step-00000020-*")
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{newer / file_name(rank)} is damaged: its SHA-256 differs from the manifest; set")
    assert aside.name in warnings[0]
    flip_bit(older / file_name(1 - rank))
    errors = all_find(tmp_path, 2, warnings)
    assert [type(error) for error in errors] == [CorruptionError] * 2
    assert {str(error) for error in errors} == {
        f"all checkpoints in {tmp_path} are damaged. To train again from step 0, delete that directory. If only "
        "the storage was ill and is mended, give the newest corrupt-step-* its old name back"
    }
    assert not list_checkpoints(tmp_path)


def test_a_file_that_one_rank_does_not_see_stops_all_and_sets_nothing_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = published(tmp_path, 7)
    right = training_state.file_sha256

    def see_all_but_one(path: Path) -> str:
        if path.name == file_name(1):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return right(path)

    monkeypatch.setattr(training_state, "file_sha256", see_all_but_one)
    for error in all_find(tmp_path, 2, []):
        assert isinstance(error, TimeoutError)
        assert f"{final / file_name(1)} was committed, but this machine does not see it" in str(error)
    assert list_checkpoints(tmp_path) == [final]


def test_a_checkpoint_that_cannot_be_set_aside_is_told_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_bit(published(tmp_path, 7) / file_name(1))

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    assert [type(error) for error in all_find(tmp_path, 2, [])] == [PermissionError] * 2


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_retain_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    steps = [5, 10, 15, 20]
    for step in steps:
        published(tmp_path, step)
    retain(tmp_path, keep, pytest.fail, verified=20)
    kept = list_checkpoints(tmp_path)
    assert [path.name for path in kept] == [checkpoint_name(step) for step in steps[::-1][:keep]]
    for path in kept:
        load_checkpoint_manifest(path)


def test_retain_spares_what_is_pinned_and_the_newest_that_is_known_to_be_whole(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25):
        published(tmp_path, step)
    retain(tmp_path, 2, pytest.fail, verified=10, pinned={5})
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(step) for step in (25, 20, 10, 5)]


MANIFEST_9 = CheckpointManifest(
    9, fingerprint(IDENTITY), IDENTITY, TOPOLOGY, {"p": [2, 3]}, 9, 0, {}, [], [], {}
)  # fmt: skip


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"config": {"precision": "bf16", "optimizer": {"lr": 0.1}}}, "config.precision 'fp32' -> 'bf16'"),
        ({"config": {"precision": "fp32", "optimizer": {"lr": 0.2}}}, "config.optimizer.lr 0.1 -> 0.2"),
        ({"inputs": {"rows": "c", "tokenizer": "b"}}, "inputs.rows 'a' -> 'c'"),
        ({"inputs": {"rows": "a", "tokenizer": "c"}}, "inputs.tokenizer 'b' -> 'c'"),
    ],
)
def test_a_changed_identity_is_refused_with_the_field_unless_it_is_accepted(other: dict[str, Any], words: str) -> None:
    identity = {**IDENTITY, **other}
    given = (Path("c"), MANIFEST_9, fingerprint(identity), identity, {"p": [2, 3]})
    with pytest.raises(UserError) as error:
        changes_of_identity(*given, is_accepted=False)
    assert f"differs in: {words}. Set it back" in str(error.value)
    ((field, (old, new)),) = changes_of_identity(*given, is_accepted=True).items()
    assert f"{field} {old!r} -> {new!r}" == words


def test_the_same_identity_changes_nothing_however_the_ranks_share_the_work() -> None:
    moved = replace(MANIFEST_9, topology=replace(TOPOLOGY, workers=7, zero_stage=3))
    assert changes_of_identity(Path("c"), moved, moved.fingerprint, IDENTITY, {"p": [2, 3]}, is_accepted=False) == {}


@pytest.mark.parametrize("is_accepted", [False, True])
def test_another_shape_is_refused_with_the_parameter_even_for_the_same_identity(is_accepted: bool) -> None:
    with pytest.raises(UserError, match=r"1 parameters differ, such as p \[2, 3\] -> \[3, 2\]"):
        changes_of_identity(Path("c"), MANIFEST_9, MANIFEST_9.fingerprint, IDENTITY, {"p": [3, 2]}, is_accepted)


def test_the_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    directory = tmp_path / checkpoint_name(9)
    directory.mkdir()
    rich = replace(
        MANIFEST_9,
        topology=replace(TOPOLOGY, workers=0),
        extras={"interval": [0.3, 0.8], "skips": 2, "word": "é"},
        lineage=[{"step": 4, "changed": {"config.optimizer.lr": [0.1, 0.2]}}],
    )
    write_manifest(directory, rich)
    assert read_manifest(directory) == rich
    assert record_files(directory) == []
