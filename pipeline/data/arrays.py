"""Arrays between numpy and Arrow by their buffers, without a copy.

pa.array() and Array.to_numpy() do the same, but import pandas first where it is installed, which costs every worker a
third of a second.
"""

import numpy as np
import pyarrow as pa


def to_arrow(values: np.ndarray) -> pa.Array:
    """Numbers or booleans as an Arrow array of the same type, without nulls; numbers are not copied if contiguous."""
    stored = np.packbits(values, bitorder="little") if values.dtype == bool else np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(stored)])


def binary_to_arrow(values: list[bytes]) -> pa.Array:
    """Byte strings as a ``large_binary`` array."""
    ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
    return pa.Array.from_buffers(
        pa.large_binary(), len(values), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(values))]
    )


def to_numpy(array: pa.Array) -> np.ndarray:
    """An array of numbers or booleans that was found valid and without nulls; numbers are not copied."""
    is_bits = pa.types.is_boolean(array.type)
    dtype = np.dtype(np.uint8 if is_bits else array.type.to_pandas_dtype())
    if not len(array):
        return np.zeros(0, dtype=bool if is_bits else dtype)
    buffer, start, stop = array.buffers()[1], array.offset, array.offset + len(array)
    if is_bits:
        return np.unpackbits(np.frombuffer(buffer, dtype), count=stop, bitorder="little")[start:].view(bool)
    return np.frombuffer(buffer, dtype, count=len(array), offset=start * dtype.itemsize)
