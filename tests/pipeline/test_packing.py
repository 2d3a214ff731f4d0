from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.packing import PackedRows, pack_for_training
from pipeline.data.shards import TokenStream, open_stream, write_shard
from pipeline.errors import UserError

VOCAB_SIZE, PAD = 100, 99

DOCUMENTS = st.lists(st.lists(st.integers(0, PAD - 1), max_size=12), min_size=1, max_size=10)


def _stream(root: Path, documents: list[list[int]]) -> TokenStream:
    half = len(documents) // 2
    for name, part in (("a", documents[:half]), ("b", documents[half:])):
        write_shard(root / f"{name}.arrow", part, VOCAB_SIZE)
    return open_stream([root / "a.arrow", root / "b.arrow"])


@given(documents=DOCUMENTS, seq_len=st.integers(1, 15))
def test_rows_hold_every_token_once_and_only_the_last_is_padded(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], seq_len: int
) -> None:
    rows = PackedRows(_stream(tmp_path_factory.mktemp("rows"), documents), seq_len)
    flat = [token for document in documents for token in document]
    found = []
    for index in range(rows.num_rows):
        tokens, length = rows.row(index, PAD)
        assert tokens.shape == (seq_len,)
        assert (tokens[length:] == PAD).all()
        assert length == seq_len or index == rows.num_rows - 1
        found += tokens[:length].tolist()
    assert found == flat
    assert rows.num_full_rows == len(flat) // seq_len
    assert rows.num_rows - rows.num_full_rows == (len(flat) % seq_len > 0)


@given(documents=DOCUMENTS, seq_len=st.integers(1, 15))
def test_doc_ids_equal_those_counted_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], seq_len: int
) -> None:
    rows = PackedRows(_stream(tmp_path_factory.mktemp("rows"), documents), seq_len)
    naive = [number for number, document in enumerate(documents) for _ in document]
    found = [rows.doc_ids(index) for index in range(rows.num_rows)]
    assert np.concatenate([np.zeros(0, int), *found]).tolist() == naive
    for index, doc_ids in enumerate(found):
        assert len(doc_ids) == rows.row(index, PAD)[1]


def test_pack_for_training_with_exactly_one_row_is_accepted(tmp_path: Path) -> None:
    rows = pack_for_training(_stream(tmp_path, [[1, 2], [3]]), 3)
    assert (rows.num_full_rows, rows.num_rows) == (1, 1)
    assert rows.row(0, PAD)[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("documents", [[[1, 2], [3]], [[]]])
def test_pack_for_training_with_less_than_a_row_names_seq_len(tmp_path: Path, documents: list[list[int]]) -> None:
    num_tokens = sum(map(len, documents))
    with pytest.raises(UserError, match=rf"seq_len is 4, but the training corpus has only {num_tokens} tokens"):
        pack_for_training(_stream(tmp_path, documents), 4)
