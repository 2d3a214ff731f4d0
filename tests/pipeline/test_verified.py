"""What was verified is remembered for a day, by every process that shares the record, and no longer."""

import errno
import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from pipeline.data.verified import MAX_AGE_S, Verified


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Something to check."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


def test_a_check_is_made_once_until_the_file_or_the_expectation_changes(tmp_path: Path, file: Path) -> None:
    calls: list[int] = []
    for _ in range(3):
        Verified(tmp_path / "record").once([file], "a", lambda: calls.append(1))
    assert len(calls) == 1
    Verified(tmp_path / "record").once([file], "b", lambda: calls.append(2))
    os.utime(file, ns=(5, 5))
    Verified(tmp_path / "record").once([file], "a", lambda: calls.append(3))
    assert calls == [1, 2, 3]


def test_a_check_that_fails_is_made_again(tmp_path: Path, file: Path) -> None:
    def fail() -> None:
        raise ValueError("damaged")

    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            Verified(tmp_path / "record").once([file], "a", fail)


def test_a_record_of_more_than_a_day_or_of_the_future_is_not_believed(tmp_path: Path, file: Path) -> None:
    calls: list[int] = []
    verified = Verified(tmp_path / "record")
    verified.once([file], "a", lambda: calls.append(1))
    (record,) = [path for path in verified.directory.iterdir() if path.suffix != ".lock"]
    for age_s, wanted in ((MAX_AGE_S - 60, 1), (MAX_AGE_S + 60, 2), (0.0, 2), (-60.0, 3), (0.0, 3)):
        if age_s:
            os.utime(record, (time.time() - age_s,) * 2)
        verified.once([file], "a", lambda: calls.append(1))
        assert len(calls) == wanted


def test_one_of_many_at_once_checks_and_the_others_wait(tmp_path: Path, file: Path) -> None:
    calls: list[int] = []
    done: list[int] = []

    def check() -> None:
        calls.append(1)
        time.sleep(0.2)
        done.append(1)

    def work() -> None:
        Verified(tmp_path / "record").once([file], "a", check)
        assert done, "went on before the check was over"

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_file_system_without_locks_checks_without_waiting(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    Verified(tmp_path / "record").once([file], "a", lambda: calls.append(1))
    assert calls == [1]
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        Verified(tmp_path / "record").once([file], "b", lambda: calls.append(1))
