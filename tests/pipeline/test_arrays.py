"""Arrays between numpy and Arrow, checked through Python lists; no worker pays for pandas."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.arrays import binary_to_arrow, to_arrow, to_numpy
from tests.pipeline.conftest import python

DTYPES = ["bool", "uint16", "uint32", "int32", "int64"]


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_any_slice_goes_there_and_back(dtype: str, data: st.DataObject) -> None:
    values = np.array(data.draw(st.lists(st.integers(0, 300), max_size=40)), dtype=np.int64).astype(dtype)
    step = data.draw(st.sampled_from([1, 2, -1]))
    array = to_arrow(values[::step])
    array.validate(full=True)
    assert array.to_pylist() == values[::step].tolist()
    assert (str(array.type), array.null_count) == (dtype, 0)
    start, length = data.draw(st.integers(0, len(values))), data.draw(st.integers(0, 40))
    found = to_numpy(array.slice(start, length))
    assert found.dtype == np.dtype(dtype)
    assert found.tolist() == array.to_pylist()[start : start + length]


def test_numbers_are_not_copied() -> None:
    values = np.arange(1000)
    assert np.shares_memory(to_numpy(to_arrow(values).slice(10, 20)), values)


@given(values=st.lists(st.binary(max_size=5), max_size=20))
def test_byte_strings_are_the_array_of_them(values: list[bytes]) -> None:
    array = binary_to_arrow(values)
    array.validate(full=True)
    assert (array.type, array.to_pylist()) == (pa.large_binary(), values)


_RUN_WORKERS = """
import json, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class Watch(MetaPathFinder):
    wanted = set()

    def find_spec(self, name, path=None, target=None):
        self.wanted.add(name)

sys.meta_path.insert(0, Watch())

from pipeline.data.documents import DocumentWriter
from pipeline.data.rows import open_row_shard
from pipeline.packing.config import STAGE as PACKING, PackingConfig
from pipeline.stage import StageContext, list_shards, run_shard

corpus, tokenizer, tokens, root = map(Path, sys.argv[1:])

def run(stage, config, inputs):
    context = StageContext(root / stage.name, root, "f")
    context.out.mkdir()
    shard = next(s for s in list_shards(stage, config, inputs, context) if s["name"].startswith("train-"))
    run_shard(stage, config, inputs, shard, context)
    return context.out

out = run(PACKING, PackingConfig(seq_len=16, policy="best_fit"), {"tokens": tokens, "tokenizer": tokenizer})
assert open_row_shard(out / "tokens.arrow", out / "index.arrow", 16).plan.num_rows > 0
packing = sorted(Watch.wanted)

from pipeline.tokenization.config import STAGE, TokenizationConfig

run(STAGE, TokenizationConfig(backend="tokenizers"), {"corpus": corpus, "tokenizer": tokenizer})
writer = DocumentWriter(root / "documents.arrow")
writer.write(b"text")
writer.close()
print(json.dumps([packing, sorted(Watch.wanted)]))
"""


def test_no_worker_imports_pandas_and_packing_no_tokenizer(
    tmp_path: Path, corpus: Path, tokenizer: Path, tokens: Path
) -> None:
    process = python("-c", _RUN_WORKERS, *map(str, (corpus, tokenizer, tokens, tmp_path)))
    assert process.returncode == 0, process.stderr[-2000:]
    packing, both = json.loads(process.stdout)
    assert "pyarrow" in packing
    assert "tokenizers" in both
    assert not {"pandas", "tokenizers", "torch"} & set(packing)
    assert not {"pandas", "torch"} & set(both)
