import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from tests.support.corpus_runs import TEXTS, make_corpus


def _arrow(path: Path, text: pa.Array) -> Path:
    table = pa.table({"text": text})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def _both(root: Path, columns: list[pa.Array], names: list[str]) -> list[Path]:
    batch = pa.record_batch(columns, names=names)
    pq.write_table(pa.Table.from_batches([batch]), root / "a.parquet")
    with pa.ipc.new_file(str(root / "a.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    return [root / "a.parquet", root / "a.arrow"]


def test_two_columns_of_the_name_are_refused(tmp_path: Path) -> None:
    for path in _both(tmp_path, [pa.array(TEXTS), pa.array(TEXTS)], ["text", "text"]):
        with pytest.raises(UserError, match=rf"{path.name} has 2 columns named 'text'.* set corpus\.text_field"):
            make_corpus(tmp_path, path)


def test_a_column_with_a_dot_in_its_name_is_not_a_field_of_another(tmp_path: Path) -> None:
    for path in _both(tmp_path, [pa.array([{"b": "wrong"}] * 40), pa.array(TEXTS)], ["a", "a.b"]):
        assert sorted(make_corpus(tmp_path, path, text_field="a.b").texts()) == sorted(TEXTS)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1 << 62] * 40, pa.timestamp("s")),
        pa.array([0] * 40, pa.timestamp("us", tz="Nowhere/Land")),
        pa.array([["a list"]] * 40),
        pa.array([{"a": "struct"}] * 40),
        pa.array([b"0" * 16] * 40, pa.binary(16)),
    ],
    ids=lambda column: str(column.type),
)
def test_a_column_that_is_no_text_is_set_aside_unread(tmp_path: Path, column: pa.Array) -> None:
    path = _arrow(tmp_path / "a.arrow", column)
    with pytest.raises(
        UserError, match=r"40 of 40 records are broken.*line 1: 'text' holds " + re.escape(str(column.type))
    ):
        make_corpus(tmp_path, path)


def test_a_dictionary_that_is_repeated_too_often_is_refused_in_parquet(tmp_path: Path) -> None:
    long = random.Random(0).randbytes(1 << 15).hex()
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array([long]))
    for column in (values, values.dictionary_decode()):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=r"a\.parquet decompresses to more than \d+ times .*max_decompression"):
            make_corpus(tmp_path, tmp_path / "a.parquet")


def test_text_in_columns_of_runs_and_of_json_is_read(tmp_path: Path) -> None:
    runs = pa.RunEndEncodedArray.from_arrays(list(range(2, 82, 2)), TEXTS)
    made = make_corpus(tmp_path, _arrow(tmp_path / "a.arrow", runs))
    assert (sorted(made.texts()), made.source["dropped"]) == (sorted(TEXTS), {"duplicate": 40})
    made = make_corpus(tmp_path, _arrow(tmp_path / "b.arrow", pa.array([f'"{i}"' for i in range(40)], pa.json_())))
    assert sorted(made.texts()) == sorted(f'"{i}"' for i in range(40))
