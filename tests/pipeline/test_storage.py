"""The storage protocol, the same on a file system, on S3 and on Google Cloud Storage."""

import os
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.storage import FileStorage, Place, Storage, open_storage


@pytest.fixture
def storage(store_url: str) -> Storage:
    """An empty one of each kind."""
    return open_storage(store_url)


def test_a_key_that_nothing_had_is_created_once_with_the_first_bytes(storage: Storage) -> None:
    assert storage.create("runs/r1/run.json", b"one") is True
    assert storage.create("runs/r1/run.json", b"two") is False
    assert storage.read("runs/r1/run.json") == b"one"
    storage.remove("runs/r1/run.json")
    assert storage.create("runs/r1/run.json", b"two") is True
    assert storage.read("runs/r1/run.json") == b"two"


@pytest.mark.parametrize("is_durable", [True, False])
def test_a_write_takes_the_place_of_what_was_there(storage: Storage, is_durable: bool) -> None:
    for data in (b"a longer one", b"", b"short"):
        storage.write("deep/er/file", data, is_durable)
        assert storage.read("deep/er/file") == data
    assert storage.names("deep/er") == ["file"]


def test_what_is_not_there_is_a_file_not_found_for_readers_and_nothing_for_listings(
    storage: Storage, tmp_path: Path
) -> None:
    storage.write("here", b"")
    for read in (storage.read, storage.modified, lambda key: storage.download(key, tmp_path / "copy")):
        with pytest.raises(FileNotFoundError):
            read("not/here")
    assert (storage.names("not/here"), storage.sizes("not/here")) == ([], {})
    assert not storage.exists("not/here")
    storage.remove("not/here")


def test_names_are_those_directly_below_a_folder_sorted_and_without_what_is_hidden(storage: Storage) -> None:
    for key in ("a/z", "a/b/c", "a/b/d", "a/.hidden", "ab", "b/x"):
        storage.write(key, b"1")
    assert storage.names("a") == ["b", "z"]
    assert storage.names("") == ["a", "ab", "b"]


def test_sizes_are_those_of_all_files_below_by_relative_path(storage: Storage) -> None:
    for key, data in {"a/z": b"123", "a/b/c": b"", "ab": b"1"}.items():
        storage.write(key, data)
    assert storage.sizes("a") == {"b/c": 0, "z": 3}


def test_exists_of_files_and_of_folders_that_hold_something(storage: Storage) -> None:
    storage.write("folder/file", b"1")
    assert storage.exists("folder/file")
    assert storage.exists("folder")
    assert not storage.exists("fold")


def test_remove_takes_a_file_or_a_folder_and_nothing_beside_it(storage: Storage) -> None:
    for key in ("a/b/c", "a/b/d/e", "a/bc", "x"):
        storage.write(key, b"1")
    storage.remove("a/b")
    storage.remove("x")
    assert storage.sizes("") == {"a/bc": 1}


def test_times_of_files_and_the_clock_agree_and_touch_renews_them(storage: Storage) -> None:
    storage.touch("lease/beat")
    assert storage.read("lease/beat") == b""
    first = storage.modified("lease/beat")
    assert abs(storage.now("lease") - first) < 60
    time.sleep(1.1)  # S3 tells whole seconds
    storage.touch("lease/beat")
    assert first + 0.9 < storage.modified("lease/beat") <= storage.now("lease") + 0.001
    assert storage.names("lease") == ["beat"], "the clock leaves nothing behind"
    assert storage.now("") >= first


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs gives aiohttp bytes
@pytest.mark.parametrize("size", [0, 1, 7 * 2**20])
def test_files_of_this_machine_go_up_and_come_down_unchanged(storage: Storage, tmp_path: Path, size: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(size))
    storage.upload(source, "deep/er/file")
    storage.download("deep/er/file", target)
    assert target.read_bytes() == source.read_bytes() == storage.read("deep/er/file")
    assert storage.sizes("deep") == {"er/file": size}
    with pytest.raises(FileNotFoundError):
        storage.upload(tmp_path / "nothing", "deep/er/other")


def test_a_copy_outlives_the_first_name(storage: Storage) -> None:
    storage.write("a/file", b"bytes")
    storage.copy("a/file", "b/c/file")
    storage.remove("a")
    assert storage.read("b/c/file") == b"bytes"
    with pytest.raises(FileNotFoundError):
        storage.copy("a/file", "b/d/file")


def test_awkward_names_are_names(storage: Storage) -> None:
    for name in ("a b", "ä+%20&?#", "x=1,y=2", "-"):
        assert storage.create(f"odd/{name}/file", name.encode())
        assert storage.read(f"odd/{name}/file") == name.encode()
        assert storage.sizes(f"odd/{name}") == {"file": len(name.encode())}
    assert storage.names("odd") == sorted(["a b", "ä+%20&?#", "x=1,y=2", "-"])


def test_the_url_opens_the_same_storage_elsewhere(storage: Storage) -> None:
    storage.write("file", b"1")
    assert open_storage(storage.url).read("file") == b"1"
    assert str(Place(storage, "a/b")) == f"{storage.url}/a/b"


def test_only_a_file_system_has_paths(storage: Storage) -> None:
    assert (storage.path("a") is None) == (not isinstance(storage, FileStorage))
    assert Place(storage, "a").is_local == isinstance(storage, FileStorage)


@pytest.mark.parametrize("url", ["ftp://host/store", "S3://b/x", "http://b/x"])
def test_another_scheme_is_refused_with_those_there_are(url: str) -> None:
    with pytest.raises(UserError, match=r"the scheme is .*; a store is a directory, s3://BUCKET/PREFIX or gs://"):
        open_storage(url)


@pytest.mark.parametrize("url", ["s3://", "gs:///x", "s3://bucket//x", "s3://bucket/../x"])
def test_a_url_without_a_bucket_or_with_empty_parts_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="names no bucket and prefix"):
        open_storage(url)
