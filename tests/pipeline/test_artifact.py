import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import (
    MANIFEST,
    FileRecord,
    Manifest,
    checked,
    checked_files,
    create_file,
    file_sha256,
    json_bytes,
    link_or_copy,
    list_files,
    load_manifest,
    open_artifact,
    read_json,
    record_files,
    remove_tree,
    write_atomic,
    write_json,
)
from pipeline.config import to_json
from pipeline.errors import CorruptionError, UserError, classify, is_disk_full
from tests.pipeline.conftest import cut_end, damage, flip_bit

NUM_RACERS = 6


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Three files, one of them in a folder, committed."""
    out = tmp_path / "artifact"
    (out / "sub").mkdir(parents=True)
    (out / "a.bin").write_bytes(bytes(range(256)))
    (out / "b.txt").write_text("text\n")
    (out / "sub" / "manifest.json").write_text("{}")
    manifest = Manifest("stage", "f" * 64, 2, {"x": [1, None]}, {"corpus": "e" * 64}, record_files(out), {"n": 1.5})
    write_json(out / MANIFEST, manifest)
    return out


def _edit_manifest(artifact: Path, **changes: Any) -> None:
    value = json.loads((artifact / MANIFEST).read_text())
    (artifact / MANIFEST).write_text(json.dumps({**value, **changes}))


def test_manifest_round_trip_keeps_every_field(artifact: Path) -> None:
    manifest = open_artifact(artifact)
    assert [record.path for record in manifest.files] == ["a.bin", "b.txt", "sub/manifest.json"]
    assert manifest.files[1].size_bytes == 5
    write_json(artifact / "again.json", manifest)
    assert read_json(artifact / "again.json") == to_json(manifest)
    assert dataclasses.replace(manifest, files=[]) == Manifest(
        "stage", "f" * 64, 2, {"x": [1, None]}, {"corpus": "e" * 64}, [], {"n": 1.5}
    )


def test_checked_of_an_intact_file_gives_its_path(artifact: Path) -> None:
    assert checked(artifact, "sub/manifest.json") == artifact / "sub" / "manifest.json"
    assert checked_files(artifact, "*.bin") == [artifact / "a.bin"]
    assert checked_files(artifact, "*.none") == []


@pytest.mark.parametrize("name", ["a.bin", "b.txt", "sub/manifest.json"])
def test_open_with_a_missing_file_names_it(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    with pytest.raises(CorruptionError, match=rf"{name} is missing"):
        open_artifact(artifact)
    with pytest.raises(CorruptionError, match=rf"{name} is missing"):
        checked(artifact, name)


def test_open_with_a_truncated_file_names_it_and_both_sizes(artifact: Path) -> None:
    cut_end(artifact / "a.bin")
    with pytest.raises(CorruptionError, match=r"a\.bin has 255 bytes, the manifest says 256"):
        open_artifact(artifact)
    with pytest.raises(CorruptionError, match=r"a\.bin"):
        checked(artifact, "a.bin")


@pytest.mark.parametrize("offset", [0, 100, 255])
def test_checked_with_a_flipped_bit_is_refused_although_it_was_intact_before(artifact: Path, offset: int) -> None:
    checked(artifact, "a.bin")
    flip_bit(artifact / "a.bin", offset)
    open_artifact(artifact)
    with pytest.raises(CorruptionError, match=r"a\.bin does not have the bytes"):
        checked(artifact, "a.bin")
    with pytest.raises(CorruptionError, match=r"a\.bin"):
        checked_files(artifact, "a.*")
    assert checked(artifact, "b.txt")


def test_checked_of_a_file_outside_the_manifest_is_refused(artifact: Path) -> None:
    (artifact / "late.txt").write_text("added later")
    with pytest.raises(CorruptionError, match=r"no file late\.txt"):
        checked(artifact, "late.txt")


def test_open_without_a_manifest_is_the_users_error(artifact: Path) -> None:
    (artifact / MANIFEST).unlink()
    for directory in (artifact, artifact / "absent", artifact / "b.txt"):
        with pytest.raises(UserError, match="not a finished artifact"):
            open_artifact(directory)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_open_with_another_schema_version_is_refused(artifact: Path, version: Any) -> None:
    _edit_manifest(artifact, schema_version=version)
    with pytest.raises(CorruptionError, match="schema version"):
        open_artifact(artifact)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_open_with_an_unreadable_manifest_is_corruption(artifact: Path, content: bytes) -> None:
    (artifact / MANIFEST).write_bytes(content)
    with pytest.raises(CorruptionError, match=MANIFEST):
        open_artifact(artifact)


@pytest.mark.parametrize(
    "changes",
    [{"files": [{"path": "a.bin"}]}, {"files": None}, {"inputs": {"a": 1}}, {"surprise": 1}, {"stage": None}],
)
def test_open_with_a_malformed_manifest_is_corruption(artifact: Path, changes: dict[str, Any]) -> None:
    _edit_manifest(artifact, **changes)
    with pytest.raises(CorruptionError, match="is not a manifest"):
        load_manifest(artifact)


@pytest.mark.parametrize("path", ["../b.txt", "/etc/hostname", "sub/../../x", "", ".", "a\0b"])
def test_open_with_a_path_that_leads_outside_is_refused(artifact: Path, path: str) -> None:
    _edit_manifest(artifact, files=[{"path": path, "size_bytes": 5, "sha256": "0" * 64}])
    with pytest.raises(CorruptionError, match="outside the artifact"):
        open_artifact(artifact)


@pytest.mark.parametrize("target", ["a.bin", "sub", "nowhere"])
def test_recording_a_symbolic_link_is_refused(artifact: Path, target: str) -> None:
    (artifact / "sub" / "link").symlink_to(artifact / target)
    with pytest.raises(CorruptionError, match="link is a symbolic link"):
        record_files(artifact)


def test_list_files_leaves_out_its_own_manifest_only(artifact: Path) -> None:
    (artifact / "empty").mkdir()
    assert [path.as_posix() for path in list_files(artifact)] == ["a.bin", "b.txt", "sub/manifest.json"]


def test_hash_of_a_file_is_that_of_its_bytes_now(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(path) == known
    damage(path, lambda data: data.reverse())
    assert file_sha256(path) != known


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read to be hashed."""
    names: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: names.append(Path(file.name).name) or real(file, kind)
    )
    return names


def test_sha256_of_a_file_under_another_name_is_remembered(tmp_path: Path, read_files: list[str]) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    time.sleep(0.05)
    known = file_sha256(tmp_path / "a")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert file_sha256(tmp_path / "b") == file_sha256(tmp_path / "a") == known
    assert read_files == ["a"]


def test_sha256_is_not_remembered_for_other_bytes_with_the_same_inode_size_and_mtime(tmp_path: Path) -> None:
    """As of a new file in the place of a deleted one, its mtime that of an archive."""
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    os.utime(path, (1, 1))
    time.sleep(0.05)
    before, known = path.stat(), file_sha256(path)
    path.write_bytes(b"abd")
    os.utime(path, (1, 1))
    after = path.stat()
    assert (before.st_ino, before.st_size, before.st_mtime_ns) == (after.st_ino, after.st_size, after.st_mtime_ns)
    assert file_sha256(path) != known
    link_or_copy(path, tmp_path / "other")
    assert file_sha256(tmp_path / "other") == hashlib.sha256(b"abd").hexdigest()


def test_sha256_of_a_file_that_has_only_just_changed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_files: list[str]
) -> None:
    """Another change within the same tick of the clock may leave every stamp as it was."""
    monkeypatch.setattr("pipeline.artifact._CLOCK_TICK_NS", 10**12)
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "a")
    assert read_files == ["a", "a"]


def test_write_atomic_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old and long")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_write_atomic_of_pieces_that_end_in_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise OSError("unreadable")

    write_atomic(tmp_path / "file", iter([b"ol", b"d"]))
    with pytest.raises(OSError, match="unreadable"):
        write_atomic(tmp_path / "file", pieces())
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_write_atomic_onto_a_directory_fails_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]


def test_write_json_of_nan_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_json(path, {"a": 1})
    with pytest.raises(UserError):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["file"]


def test_create_file_a_second_time_keeps_the_first(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    assert create_file(path, json_bytes({"owner": 1}))
    assert not create_file(path, json_bytes({"owner": 2}))
    assert read_json(path) == {"owner": 1}
    assert os.listdir(tmp_path) == ["lease.json"]


_RACE = """
import json, sys, time
from pathlib import Path
from pipeline.artifact import create_file, json_bytes
root, me, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
(root / f"ready-{me}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
won = []
for number in range(rounds):
    path = root / "locks" / f"{number}.json"
    if create_file(path, json_bytes({"owner": me, "filler": "x" * 100_000})):
        won.append(number)
    whole = json.loads(path.read_text())
    assert len(whole["filler"]) == 100_000
print(json.dumps(won))
"""


def test_create_file_raced_by_processes_has_one_winner_and_never_half_a_file(tmp_path: Path) -> None:
    rounds = 20
    (tmp_path / "locks").mkdir()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACE, str(tmp_path), str(me), str(rounds)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in range(NUM_RACERS)
    ]
    while len(list(tmp_path.glob("ready-*"))) < NUM_RACERS and all(racer.poll() is None for racer in racers):
        pass
    (tmp_path / "go").touch()
    found = [racer.communicate(timeout=40) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * NUM_RACERS, found
    winners = {number: me for me, (out, _) in enumerate(found) for number in json.loads(out)}
    assert sum(len(json.loads(out)) for out, _ in found) == rounds
    for number in range(rounds):
        assert read_json(tmp_path / "locks" / f"{number}.json")["owner"] == winners[number]
    assert len(os.listdir(tmp_path / "locks")) == rounds


def test_link_or_copy_gives_the_same_bytes_under_a_second_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"bytes")
    link_or_copy(tmp_path / "a", tmp_path / "deep" / "er" / "b")
    assert (tmp_path / "deep" / "er" / "b").read_bytes() == b"bytes"


def test_link_or_copy_where_links_are_not_possible_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "a").write_bytes(b"bytes")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").write_bytes(b"other")
    assert (tmp_path / "b").read_bytes() == b"bytes"


def test_remove_tree_deletes_and_does_not_mind_a_missing_directory(artifact: Path) -> None:
    remove_tree(artifact)
    assert not artifact.exists()
    remove_tree(artifact)


def test_file_record_of_a_relative_path_is_accepted() -> None:
    assert FileRecord("sub/a..b.bin", 1, "0").path == "sub/a..b.bin"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("x"), "user"),
        (MemoryError(), "memory"),
        (OSError(errno.ENOSPC, "full"), "memory"),
        (OSError(errno.EDQUOT, "quota"), "memory"),
        (ConnectionResetError(), "transient"),
        (TimeoutError(), "transient"),
        (CorruptionError("x"), "code"),
        (ValueError("x"), "code"),
        (OSError(errno.EACCES, "disk"), "code"),
        (RuntimeError("shape mismatch"), "code"),
    ],
)
def test_classify_sorts_errors_by_who_has_to_act(error: BaseException, expected: str) -> None:
    assert classify(error) == expected


def test_a_full_disk_is_recognised_in_both_its_forms() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_disk_full(OSError(errno.ENOENT, "No such file"))
    assert not is_disk_full(ValueError("No space left"))
