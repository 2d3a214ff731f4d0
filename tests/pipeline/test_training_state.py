"""Numbers come back bit for bit whoever held them, and nothing else is taken for a training state."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline import training_state
from pipeline.artifact import FileRecord, record_files
from pipeline.errors import CorruptionError, UserError
from pipeline.pretrain.fragments import Run
from pipeline.pretrain.writer import Held, Snapshot, write_file
from pipeline.training_state import (
    CheckpointManifest,
    StateFiles,
    Topology,
    check_coverage,
    checkpoint_name,
    file_name,
    read_manifest,
    verify,
    verify_bytes,
    write_manifest,
)
from tests.support.hand_state import CUTS, KEPT, SHAPES, Full, HandState, assembled, assert_equal, distinct, numel
from tests.support.tiny_run import Payload


def write(directory: Path, states: list[HandState], shapes: Any = SHAPES, step: int = 3) -> Path:
    """A published checkpoint of what ranks hold."""
    checkpoint = directory / checkpoint_name(step)
    records: list[FileRecord] = []
    for rank, state in enumerate(states):
        snapshot = Snapshot(state.written(rank))
        snapshot.take()
        records.append(write_file(checkpoint / file_name(rank), snapshot.header, snapshot.data))
    assert records == record_files(checkpoint), "sizes and hashes that were taken on the way are not those of the files"
    topology = Topology(len(states), 1, 1, "fp32", 2)
    write_manifest(checkpoint, CheckpointManifest(step, "f", {}, topology, dict(shapes), 3, 0, {}, [], records, {}))
    return checkpoint


def states_of(full: Full, cut: str, workers: int, shapes: Any = SHAPES) -> list[HandState]:
    """What every rank holds."""
    return [HandState(full, CUTS[cut], rank, workers, shapes) for rank in range(workers)]


def fill(states: list[HandState], files: StateFiles) -> None:
    """Read what each rank holds, run by run."""
    for state in states:
        for held in state.held():
            for which, tensor in held.tensors.items():
                for run in held.runs:
                    files.read(which, run.name, run.start, tensor[run.offset : run.offset + run.numel])


@pytest.mark.parametrize("workers", [1, 2, 3, 50])
@pytest.mark.parametrize("cut", CUTS)
def test_files_are_safetensors_whose_names_say_where_their_elements_belong(
    tmp_path: Path, cut: str, workers: int
) -> None:
    full = distinct()
    checkpoint = write(tmp_path, states_of(full, cut, workers))
    found = {key: torch.full_like(tensor, float("nan")) for key, tensor in full.items()}
    for rank in range(workers):
        for name, tensor in load_file(checkpoint / file_name(rank)).items():
            which, parameter, start = name.split(":")
            target = found[which, parameter][int(start) : int(start) + tensor.numel()]
            assert target.isnan().all(), "an element was written twice"
            target.copy_(tensor)
    assert_equal(found, full)


@pytest.mark.parametrize("before", CUTS)
@pytest.mark.parametrize("after", CUTS)
@pytest.mark.parametrize("workers", [(2, 1), (1, 3), (3, 2), (2, 2)], ids=str)
def test_ranks_that_hold_other_parts_read_the_same_numbers(
    tmp_path: Path, before: str, after: str, workers: tuple[int, int]
) -> None:
    full = distinct()
    checkpoint = write(tmp_path, states_of(full, before, workers[0]))
    states = states_of({key: torch.zeros_like(tensor) for key, tensor in full.items()}, after, workers[1])
    manifest = read_manifest(checkpoint)
    verify(checkpoint, manifest)
    fill(states, StateFiles(checkpoint, manifest))
    assert_equal(assembled(states), full)
    assert all(bool((padding == -1.0).all()) for state in states for padding in state.padding())


sizes = st.lists(st.integers(1, 6), max_size=3)


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(sizes, min_size=1, max_size=5),
    before=st.tuples(st.sampled_from(sorted(CUTS)), st.integers(1, 5)),
    after=st.tuples(st.sampled_from(sorted(CUTS)), st.integers(1, 5)),
)
def test_any_cut_of_any_model_is_read_by_any_other(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[list[int]],
    before: tuple[str, int],
    after: tuple[str, int],
) -> None:
    named = {f"p{number}.weight": shape for number, shape in enumerate(shapes)}
    full = distinct(1, KEPT, named)
    checkpoint = write(tmp_path_factory.mktemp("any"), states_of(full, *before, named), named)
    files = StateFiles(checkpoint, read_manifest(checkpoint))
    states = states_of({key: torch.zeros_like(tensor) for key, tensor in full.items()}, *after, named)
    fill(states, files)
    assert_equal(assembled(states, named), full)
    for name, shape in named.items():
        assert torch.equal(torch.from_numpy(files.whole("master", name)), full["master", name].view(shape))


class OnGpu:
    """Stands for a tensor that NumPy cannot see."""

    device = torch.device("cuda")

    def __init__(self, tensor: torch.Tensor, sizes: list[int]) -> None:
        self.tensor, self.sizes = tensor, sizes

    def numel(self) -> int:
        return self.tensor.numel()

    def __getitem__(self, part: slice) -> "OnGpu":
        return OnGpu(self.tensor[part], self.sizes)

    def copy_(self, host: torch.Tensor) -> None:
        self.sizes.append(host.numel())
        self.tensor.copy_(host)


@pytest.mark.parametrize("read_elements", [1, 3, 10_000])
def test_arrays_and_tensors_here_and_elsewhere_are_filled_whatever_is_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_elements: int
) -> None:
    monkeypatch.setattr(training_state, "_READ_ELEMENTS", read_elements)
    monkeypatch.setattr(training_state, "_COPIED_ELEMENTS", 8)
    full = distinct()
    checkpoint = write(tmp_path, states_of(full, "1", 3))
    files, wanted = StateFiles(checkpoint, read_manifest(checkpoint)), full["master", "embed.weight"][2:33]
    here, sizes = torch.full((33,), -1.0), list[int]()
    files.read("master", "embed.weight", 2, here[1:32])
    assert here.tolist() == [-1.0, *wanted.tolist(), -1.0]
    array = np.empty(31, np.float32)
    files.read("master", "embed.weight", 2, array)
    assert array.tolist() == wanted.tolist()
    there = torch.zeros(31)
    files.read("master", "embed.weight", 2, OnGpu(there, sizes))
    assert torch.equal(there, wanted)
    assert sizes == [8, 8, 8, 7]


def test_a_file_that_is_cut_while_it_is_read_by_several_threads_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_state, "_READ_ELEMENTS", 4)
    checkpoint = write(tmp_path, states_of(distinct(), "1", 2))
    files, path = StateFiles(checkpoint, read_manifest(checkpoint)), checkpoint / file_name(0)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(CorruptionError, match=f"{path} was cut while"):
        [files.whole(which, name) for which in KEPT for name in SHAPES]


def test_a_copy_is_of_the_moment_it_was_taken_and_its_buffer_is_used_again(tmp_path: Path) -> None:
    full = distinct()
    (state,) = states_of(full, "1", 1)
    snapshot = Snapshot(state.written(0))
    snapshot.take()
    address = snapshot._buffer.data_ptr()
    state.change(by=1.0)
    write_file(tmp_path / "then", snapshot.header, snapshot.data)
    snapshot.take()
    write_file(tmp_path / "now", snapshot.header, snapshot.data)
    assert snapshot._buffer.data_ptr() == address
    then, now = load_file(tmp_path / "then"), load_file(tmp_path / "now")
    for (which, parameter), tensor in full.items():
        assert torch.equal(then[f"{which}:{parameter}:0"], tensor)
        assert torch.equal(now[f"{which}:{parameter}:0"], tensor + 1.0)


def test_a_tensor_that_is_not_float32_is_not_rounded_in_silence() -> None:
    held = Held({"master": torch.zeros(4, dtype=torch.bfloat16)}, (Run("p", 0, 4, 0),))
    with pytest.raises(AssertionError, match=r"master is torch\.bfloat16"):
        Snapshot([held])


def test_a_rank_that_holds_padding_only_writes_a_file_of_nothing(tmp_path: Path) -> None:
    snapshot = Snapshot([Held({"master": torch.zeros(4)}, ())])
    snapshot.take()
    record = write_file(tmp_path / "empty", snapshot.header, snapshot.data)
    assert load_file(tmp_path / "empty") == {}
    assert record.size_bytes == (tmp_path / "empty").stat().st_size


COMPLETE = [("master", name, 0, numel(shape)) for name, shape in SHAPES.items()]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s[1:], "lacks the values of embed.weight"),
        (lambda s: [*s, s[0]], "elements of master of embed.weight are double at 0"),
        (lambda s: [("master", "embed.weight", 0, 34), *s[1:]], "embed.weight has 34 elements, the model wants 35"),
        (lambda s: [("master", "embed.weight", 0, 36), *s[1:]], "embed.weight has 36 elements, the model wants 35"),
        (lambda s: [("master", "embed.weight", 1, 34), *s[1:]], "of embed.weight are absent at 0"),
        (lambda s: [*s, ("ema", "embed.weight", 0, 30)], "ema of embed.weight has 30 elements"),
        (lambda s: [*s, ("master", "other", 0, 1)], "other is no parameter of the model"),
        (
            lambda s: [("master", "embed.weight", 0, 20), ("master", "embed.weight", 21, 14), *s[1:]],
            "embed.weight are absent at 20",
        ),
        (
            lambda s: [("master", "embed.weight", 0, 20), ("master", "embed.weight", 19, 16), *s[1:]],
            "embed.weight are double at 19",
        ),
    ],
)
def test_stretches_that_do_not_hold_every_element_once_are_refused(change: Any, words: str) -> None:
    check_coverage(COMPLETE, SHAPES, "it")
    check_coverage([*COMPLETE, ("ema", "gate", 0, 1)], SHAPES, "it")
    with pytest.raises(CorruptionError) as error:
        check_coverage(change(COMPLETE), SHAPES, "it")
    assert words in str(error.value)


def test_what_was_not_saved_is_named_when_it_is_asked_for(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, states_of(distinct(), "1", 2))
    files = StateFiles(checkpoint, read_manifest(checkpoint))
    with pytest.raises(UserError, match=r"has no 'momentum' of norm\.weight, which this training keeps"):
        files.read("momentum", "norm.weight", 0, torch.zeros(5))
    assert files.has("exp_avg", "norm.weight")
    assert not files.has("ema", "norm.weight")


def replaced(checkpoint: Path, path: str, make: Any) -> None:
    """Put another file in the place of one, and its size and hash into the manifest."""
    manifest = read_manifest(checkpoint)
    make(checkpoint / path)
    write_manifest(checkpoint, replace(manifest, files=record_files(checkpoint)))


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(path.with_name("marker"))))


def a_torch_file(path: Path) -> None:
    torch.save({"master": Payload(path.with_name("marker"))}, path)


@pytest.mark.parametrize(
    "make",
    [
        a_pickle,
        a_torch_file,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}"),
        lambda path: path.write_bytes(path.read_bytes() + b"tail"),
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: save_file({"weight": torch.zeros(3)}, path),
        lambda path: save_file({"master:p:0:1": torch.zeros(3)}, path),
        lambda path: save_file({"master:p:-1": torch.zeros(3)}, path),
        lambda path: save_file({"master:p:00": torch.zeros(3)}, path),
        lambda path: save_file({"master:gate:0": torch.zeros(1, dtype=torch.float64)}, path),
        lambda path: save_file({"master:gate:0": torch.zeros(1, 1)}, path),
        lambda path: save_file({"master:gate:0": torch.zeros(1)}, path),
    ],
    ids=["pickle", "torch", "empty", "huge header", "longer", "shorter", *"abcdefg"],
)
def test_a_file_that_is_no_state_is_refused_although_its_hash_is_right(tmp_path: Path, make: Any) -> None:
    checkpoint = write(tmp_path, states_of(distinct(), "1", 2))
    replaced(checkpoint, file_name(1), make)
    manifest = read_manifest(checkpoint)
    with pytest.raises(CorruptionError) as error:
        verify(checkpoint, manifest)
    assert str(checkpoint) in str(error.value)
    assert "SHA-256" not in str(error.value)
    assert not (checkpoint / "marker").exists()


def test_a_link_in_the_place_of_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_state, "_PATIENCE_S", (0.001,))
    checkpoint = write(tmp_path, states_of(distinct(), "1", 2))
    path = checkpoint / file_name(0)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptionError, match=f"{path} is missing or has the wrong size"):
        verify(checkpoint, read_manifest(checkpoint))


@pytest.mark.parametrize("field", ["optimizer_steps", "skipped_steps", "step", "extras", "shapes"])
def test_a_number_that_was_changed_in_the_manifest_is_noticed(tmp_path: Path, field: str) -> None:
    checkpoint = write(tmp_path, states_of(distinct(), "1", 2))
    path = checkpoint / "manifest.json"
    value = json.loads(path.read_text())
    changed = value[field] + 1 if isinstance(value[field], int) else {**value[field], "more": [1]}
    path.write_text(json.dumps({**value, field: changed}))
    with pytest.raises(CorruptionError, match="does not have the checksum that it says it has"):
        read_manifest(checkpoint)


def test_a_file_that_another_machine_does_not_see_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = distinct()
    checkpoint = write(tmp_path, states_of(full, "1", 2))
    late, manifest = checkpoint / file_name(1), read_manifest(checkpoint)
    late.rename(tmp_path / "late")
    slept: list[float] = []

    def sleep(wait_s: float) -> None:
        slept.append(wait_s)
        if len(slept) == 2:
            (tmp_path / "late").rename(late)

    monkeypatch.setattr(training_state.time, "sleep", sleep)
    verify_bytes(checkpoint, manifest.files)
    assert len(slept) == 2
    late.rename(tmp_path / "late")
    slept.clear()
    files = StateFiles(checkpoint, manifest)
    assert len(slept) == 2
    assert torch.equal(torch.from_numpy(files.whole("master", "norm.weight")), full["master", "norm.weight"])
    late.unlink()
    slept[:] = [0.0] * 2
    with pytest.raises(TimeoutError, match=f"{late} was committed, but this machine does not see it after 4 s"):
        StateFiles(checkpoint, manifest)
