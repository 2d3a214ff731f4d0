"""Copies of an object store on the disks of machines."""

from pathlib import Path

import pytest

from pipeline.storage import Place
from tests.support.mortal import in_memory
from workflows.copies import scratch


def test_machines_with_one_home_directory_keep_their_copies_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DLM_CACHE", str(tmp_path))
    place = Place(in_memory(), "artifacts/pretrain/address/state")
    found: list[Path] = []
    for host in ("node-a", "node-b", "node-a"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        found.append(scratch(place))
    assert found[0] == found[2] != found[1]
    assert all(path.is_relative_to(tmp_path) for path in found)
    assert not found[1].is_relative_to(found[0].parents[3])
