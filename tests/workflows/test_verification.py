"""``dlm verify``: every byte of what was committed."""

import json
from pathlib import Path

import pytest

from tests.support.fabricated import fabricate_run
from tests.support.toy_workflow import fabricate, toy_plan
from workflows.store import Store
from workflows.verification import verify_artifact


def committed(store: Store, step: str) -> Path:
    """Folder of the committed attempt of a step."""
    place = store.artifact(f"toy-{step}".replace("aside", "source"), toy_plan().step(step).fingerprint).committed()
    assert place is not None
    return place.path


@pytest.fixture
def whole(store: Store) -> Store:
    """A run all of whose artifacts are there but the last."""
    plan = toy_plan()
    fabricate(store, plan, "source", "aside", "double")
    fabricate_run(store, plan)
    return store


def test_whole_artifacts_are_told_and_the_code_is_0(dlm, whole):
    done = dlm("verify", "r1")
    assert done.code == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["source"] == f"source  ok  1 file, 1 B  {committed(whole, 'source')}"
    assert lines["total"] == "total  not there yet"
    rows = json.loads(dlm("verify", "--json").stdout)
    assert {row["name"]: row["status"] for row in rows} == {
        "source": "ok", "aside": "ok", "double": "ok", "total": "not there yet",
    }  # fmt: skip


def change_a_bit(path: Path) -> None:
    path.write_text("2")


@pytest.mark.parametrize(
    ("name", "damage", "word"),
    [
        ("value.txt", change_a_bit, "SHA-256"),
        ("value.txt", Path.unlink, "is missing"),
        ("value.txt", lambda path: path.write_text("11"), "has 2 bytes"),
        ("manifest.json", Path.unlink, "no manifest.json"),
        ("manifest.json", lambda path: path.write_text("{"), "not valid JSON"),
        ("../../COMMIT.json", lambda path: path.write_text("{}"), "names no attempt"),
    ],
)
def test_damage_is_named_with_what_to_delete_and_code_3(dlm, whole, name, damage, word):
    folder = committed(whole, "double")
    damage(folder / name)
    done = dlm("verify", "r1")
    assert done.code == 3
    assert word in done.stdout
    assert "1 of 4 artifacts are damaged" in done.stderr
    assert f"Delete {folder.parents[1]} and then build them again: dlm resume r1" in done.stderr
    assert "source  ok" in done.stdout, "the others are looked at all the same"
    rows = json.loads(dlm("verify", "r1", "--json").stdout)
    assert [row["name"] for row in rows if row["status"] == "damaged"] == ["double"]


def test_all_looks_at_artifacts_that_no_run_names(dlm, whole):
    other = toy_plan(source__number=5)
    fabricate(whole, other, "source")
    place = whole.artifact("toy-source", other.step("source").fingerprint)
    found = place.committed()
    assert found is not None
    change_a_bit(found.path / "value.txt")
    assert dlm("verify", "r1").code == 0
    done = dlm("verify", "--all")
    assert done.code == 3
    assert f"{place.address}  damaged" in done.stdout
    assert "1 of 4 artifacts" in done.stderr
    assert dlm("verify", "r1", "--all").code == 2


def test_bytes_in_an_object_store_are_hashed_as_they_lie_there(dlm, whole, objects):
    for path in whole.root.path.rglob("*"):
        if path.is_file():
            (objects.root / path.relative_to(whole.root.path).as_posix()).write(path.read_bytes())
    assert dlm("verify", "r1", "--store", "memory://b/s").code == 0
    place = objects.artifact("toy-double", toy_plan().step("double").fingerprint)
    found = place.committed()
    assert found is not None
    (found / "value.txt").write(b"2")
    done = dlm("verify", "r1", "--store", "memory://b/s")
    assert done.code == 3
    assert f"{found}/value.txt has SHA-256" in done.stdout
    assert f"Delete {place.directory} " in done.stderr


def test_what_was_hashed_before_is_hashed_again(whole):
    """The hash that a process remembers of a file may be that of bytes that the disk has lost since."""
    place = whole.artifact("toy-double", toy_plan().step("double").fingerprint)
    first = verify_artifact(place)
    assert first is not None
    assert (first.faults, first.num_files, first.num_bytes) == ([], 1, 1)
    change_a_bit(committed(whole, "double") / "value.txt")
    again = verify_artifact(place)
    assert again is not None
    assert len(again.faults) == 1
