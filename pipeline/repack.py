"""A family's files into a file of ours and back, a few megabytes at a time, in NumPy alone.

By the table of hf_names.py every tensor of theirs is some consecutive elements of one of ours: rows of a joined
matrix, or of one expert of a stack.  So nothing larger than a block is ever held.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlm_core.models.config import ModelConfig
from dlm_core.models.tensor_shapes import tensor_shapes
from pipeline.artifact import write_json
from pipeline.errors import CorruptionError, UserError
from pipeline.hf_names import Family, Packed, packed_tensors
from pipeline.tensor_files import BLOCK_ELEMENTS, TensorFiles, TensorWriter, narrowed, shape_problems
from pipeline.weights import METADATA

INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
_MAX_TOLD = 20
_MAX_MISSING = 10_000
"""Tensors that files may lack before the names of all are written down: their number is any that a config.json says."""


@dataclass(frozen=True)
class Piece:
    """A tensor of theirs, and the elements of one of ours that it holds."""

    theirs: str
    shape: tuple[int, ...]
    packed: Packed
    start: int
    """First element in the flattened tensor of ours."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first, number) of the elements of theirs that are held at a time."""
        for first in range(0, self.numel, BLOCK_ELEMENTS):
            yield first, min(BLOCK_ELEMENTS, self.numel - first)

    def ours(self, files: TensorFiles, first: int, numel: int) -> np.ndarray:
        """Elements of theirs, read from a file of ours."""
        if self.packed.role == "zeros":
            return np.zeros(numel, np.float32)
        return _values(files, self.packed.ours, self.start + first, numel)


def pieces(family: Family, config: ModelConfig) -> list[Piece]:
    """Every tensor of theirs, in the order of ours; UserError where the family cannot hold the architecture."""
    shapes = tensor_shapes(config)
    found: list[Piece] = []
    for packed in packed_tensors(family, config.architecture):
        if packed.role == "zeros":
            found += [
                Piece(name, (size,), packed, 0) for name, size in zip(packed.theirs, packed.num_rows, strict=True)
            ]
            continue
        shape = shapes[packed.ours][1:] if packed.num_experts else shapes[packed.ours]
        start = 0
        for expert in range(max(1, packed.num_experts)):
            for name, num_rows in zip(packed.names(expert), packed.num_rows or shape[:1], strict=True):
                found.append(Piece(name, (num_rows, *shape[1:]), packed, start))
                start += found[-1].numel
        assert start == math.prod(shapes[packed.ours]), f"{packed.theirs} are not the whole of {packed.ours}"
    return found


def their_shapes(family: Family, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a family's tensors; UserError where it cannot hold the architecture."""
    return {piece.theirs: piece.shape for piece in pieces(family, config)}


def dtypes_kept(family: Family, config: ModelConfig, dtypes: Mapping[str, str]) -> list[str]:
    """Dtypes of those tensors of a family that weights are made of, but for what it keeps in float32 all the same.

    ``dtypes`` has those of a directory by name, also of buffers that nothing is made of.  Raises UserError where the
    family promises far more tensors than there are.
    """
    _check_number(family, config, len(dtypes))
    names = [piece.theirs for piece in pieces(family, config) if not piece.packed.stays_float32]
    return sorted({dtypes[name] for name in names if name in dtypes})


def check_theirs(family: Family, config: ModelConfig, theirs: TensorFiles, left_out: Collection[str] = ()) -> None:
    """UserError naming all tensors that are missing, unknown or of another shape, or not the zeros or copies they are.

    ``left_out`` are tensors of theirs that are not looked at.
    """
    shapes = {name: shape for name, shape in theirs.shapes.items() if name not in left_out}
    problems = wrong_shapes(family, config, shapes)
    if not problems:
        problems = list(_untrue(family, config, theirs))
    if problems:
        more = f"; and {len(problems) - _MAX_TOLD} more" if len(problems) > _MAX_TOLD else ""
        hint = ""
        if any(name.endswith(".experts.gate_up_proj") for name in shapes):
            hint = ". They are of a model in memory, whose experts are packed: take the files of save_pretrained"
        raise UserError(
            f'the weights are not those of "{family}" with this config.json: {"; ".join(problems[:_MAX_TOLD])}{more}'
            f"{hint}"
        )


def _check_number(family: Family, config: ModelConfig, num_found: int) -> None:
    """UserError before the names of all that a config.json promises are written down."""
    num_promised = sum(len(p.theirs) * max(1, p.num_experts) for p in packed_tensors(family, config.architecture))
    if num_promised > num_found + _MAX_MISSING:
        raise UserError(
            f'config.json is of a "{family}" with {num_promised:,} tensors, but the files have {num_found:,}; take '
            "both from one checkpoint"
        )


def wrong_shapes(family: Family, config: ModelConfig, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """What keeps tensors of these names and shapes from being a family's; none is read.

    Raises UserError where config.json promises far more tensors than there are, before their names are written down.
    """
    _check_number(family, config, len(shapes))
    return shape_problems(shapes, their_shapes(family, config))


def _untrue(family: Family, config: ModelConfig, theirs: TensorFiles) -> Iterator[str]:
    """Tensors of theirs that ours would lose, since they should be zeros or a copy, and are not."""
    source = {piece.packed.ours: piece.theirs for piece in pieces(family, config) if piece.packed.role == "same"}
    for piece in pieces(family, config):
        if piece.packed.role == "zeros" and any(
            theirs.read_stored(piece.theirs, *block).any() for block in piece.blocks()
        ):
            yield f"{piece.theirs} is not all zeros, but the model has no such tensor"
        if piece.packed.role == "copy" and not are_equal(theirs, piece.theirs, source[piece.packed.ours]):
            yield f"{piece.theirs} is not {source[piece.packed.ours]} once more: set the head untied"


def are_equal(files: TensorFiles, one: str, other: str) -> bool:
    """Whether two tensors have the same shape and the same values, bit for bit."""
    if files.info(one).shape != files.info(other).shape:
        return False
    numel = files.info(one).numel
    for first in range(0, numel, BLOCK_ELEMENTS):
        size = min(BLOCK_ELEMENTS, numel - first)
        if _values(files, one, first, size).tobytes() != _values(files, other, first, size).tobytes():
            return False
    return True


def _values(files: TensorFiles, name: str, first: int, numel: int) -> np.ndarray:
    values = np.empty(numel, np.float32)
    files.read_elements(name, first, values)
    return values


def write_ours(
    family: Family, config: ModelConfig, theirs: TensorFiles, path: Path, left_out: Collection[str] = ()
) -> None:
    """Write the interchange file, float32, of a family's files.

    Raises UserError as ``check_theirs``, before it begins, CorruptionError naming a tensor that is not finite.
    """
    check_theirs(family, config, theirs, left_out)
    kept = [piece for piece in pieces(family, config) if piece.packed.role == "same"]
    shapes = tensor_shapes(config)
    with TensorWriter(path, {p.packed.ours: ("F32", shapes[p.packed.ours]) for p in kept}, METADATA) as out:
        for piece in kept:
            for first, numel in piece.blocks():
                values = _values(theirs, piece.theirs, first, numel)
                _check_finite(values, theirs.path(piece.theirs), piece.theirs, first)
                out.append(piece.packed.ours, values)


def _check_finite(values: np.ndarray, path: Path, name: str, first: int) -> None:
    is_finite = np.isfinite(values)
    if is_finite.all():
        return
    place = int(is_finite.argmin())
    raise CorruptionError(
        f"{path}: {name} has the value {values[place]} at element {first + place}; weights are finite numbers. Get the "
        "checkpoint again; if it is the same there, its training went wrong"
    )


def write_theirs(
    family: Family,
    config: ModelConfig,
    ours: TensorFiles,
    directory: Path,
    dtype: str = "F32",
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write a family's files of an interchange file, with an index if there are several; the paths of the files.

    ``dtype`` is that of what the family does not keep in float32.  Raises UserError where the family cannot hold the
    architecture or ``dtype`` not the values, CorruptionError if the file is not of the model.
    """
    if problems := shape_problems(ours.shapes, tensor_shapes(config)):
        raise CorruptionError(f"the weights do not fit the model: {'; '.join(problems)}")
    shards = _shards(pieces(family, config), dtype, shard_bytes)
    paths = [directory / _shard_name(number, len(shards)) for number in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        with TensorWriter(path, {p.theirs: (_dtype_of(p, dtype), p.shape) for p in shard}, METADATA) as out:
            for piece in shard:
                for block in piece.blocks():
                    out.append(piece.theirs, piece.ours(ours, *block))
    if len(shards) > 1:
        total = sum(_num_bytes(piece, dtype) for shard in shards for piece in shard)
        files = {p.theirs: path.name for path, shard in zip(paths, shards, strict=True) for p in shard}
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": files})
    return paths


def _dtype_of(piece: Piece, dtype: str) -> str:
    return "F32" if piece.packed.stays_float32 else dtype


def _num_bytes(piece: Piece, dtype: str) -> int:
    return piece.numel * (4 if _dtype_of(piece, dtype) == "F32" else 2)


def _shards(found: list[Piece], dtype: str, shard_bytes: int) -> list[list[Piece]]:
    """One file after the other, each as full as it may be; a larger tensor has a file of its own."""
    shards: list[list[Piece]] = [[]]
    room = shard_bytes
    for piece in found:
        size = _num_bytes(piece, dtype)
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(piece)
        room -= size
    return shards


def _shard_name(number: int, count: int) -> str:
    """As transformers names them."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def check_round_trip(family: Family, config: ModelConfig, ours: TensorFiles, theirs: TensorFiles) -> None:
    """CorruptionError naming the first tensor of theirs that ours, rounded as theirs is kept, is not bit for bit."""
    for piece in pieces(family, config):
        dtype = theirs.info(piece.theirs).dtype
        for first, numel in piece.blocks():
            wanted = theirs.read_stored(piece.theirs, first, numel)
            found = narrowed(piece.ours(ours, first, numel), dtype, piece.theirs)
            if found.tobytes() != wanted.tobytes():
                raise CorruptionError(f"{piece.theirs} is not the same in both files, from element {first} on")
