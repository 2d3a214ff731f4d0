"""``dlm generate``: text of a model at some place, sample by sample, into a file that an interrupted call goes on with.

Without a store, Ray or DeepSpeed; torch is imported once a model is opened.
"""

import hashlib
import json
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline.artifact import load_manifest, open_artifact
from pipeline.config import fingerprint, identity
from pipeline.convert.config import STAGE as CONVERT
from pipeline.convert.config import ConvertConfig
from pipeline.errors import UserError
from pipeline.import_checkpoint.config import STAGE as IMPORT
from pipeline.import_checkpoint.config import ImportConfig
from pipeline.import_checkpoint.source import TOKENIZER
from pipeline.inference.sampling import SamplingConfig
from pipeline.tokenizer.config import STAGE as TOKENIZERS
from pipeline.tokenizer.config import TokenizerConfig
from workflows.conversion import make_artifact
from workflows.inspection import Place, look_at
from workflows.requests import Request

_FIRST_BYTES = b'{"id": '
"""Of every line of a file of samples."""


@dataclass(frozen=True)
class Source:
    """Weights and their tokenizer, as artifacts."""

    weights: Path
    tokenizer: Path

    def settings(self, config: SamplingConfig) -> str:
        """A fingerprint of all that a sample depends on beside its request."""
        artifacts = [load_manifest(path).fingerprint for path in (self.weights, self.tokenizer)]
        return fingerprint([*artifacts, identity(config)])[:16]


@dataclass(frozen=True)
class Sample:
    """One that is wanted."""

    request: Request
    number: int
    """Of the samples of its request, from 0 on."""

    @property
    def sample_id(self) -> int:
        """Addresses the noise: the number, or a hash of it and the id, whatever else is asked for."""
        if not self.request.id:
            return self.number
        words = json.dumps([self.request.id, self.number]).encode()
        return int.from_bytes(hashlib.sha256(words).digest()[:8], "big") >> 1


@contextmanager
def sources_of(place: Place, tokenizer: Path | None) -> Generator[Source]:
    """The weights at a place, made into artifacts for the time being where they are a training or a checkpoint.

    Raises UserError for weights whose tokenizer is neither given nor known.
    """
    found = look_at(place.path)
    with tempfile.TemporaryDirectory(prefix="dlm-generate-") as work:
        weights, own = place.path, tokenizer or place.tokenizer_of(found)
        if found.kind == "training":
            weights = make_artifact(CONVERT, ConvertConfig(proof="tensors"), {"pretrain": place.path}, Path(work))
        elif found.kind == "safetensors file":
            raise UserError(
                f"{place.path} is a {found.kind}: its model is not known without the config.json beside it. Give the "
                "directory"
            )
        elif found.kind != "interchange weights":
            config = ImportConfig(path=str(place.path), proof="tensors")
            weights = make_artifact(IMPORT, config, {}, Path(work))
        if own is None and (weights / TOKENIZER).is_file():
            own = make_artifact(TOKENIZERS, TokenizerConfig(), {"checkpoint": weights}, Path(work))
        if own is None:
            raise UserError(
                f"{place.path} brings no tokenizer; give the artifact of the stage {TOKENIZERS.name} that it was "
                "trained with (--tokenizer DIR), or the run that it is of (RUN, or RUN:STEP)"
            )
        if open_artifact(own).stage != TOKENIZERS.name:
            raise UserError(f"--tokenizer {own} is an artifact of the stage {open_artifact(own).stage}")
        yield Source(weights, own)


# A file of samples


def read_done(path: Path, samples: Sequence[Sample], settings: str) -> tuple[set[Sample], int]:
    """Which samples a file has, and how many of its bytes are whole lines: the last may be torn.

    UserError, with the line, for a file that is none of samples, or of other settings, another model or other requests.
    """
    if not path.exists():
        return set(), 0
    data = path.read_bytes()
    size = data.rfind(b"\n") + 1
    if not data[size:].startswith(_FIRST_BYTES[: len(data) - size]):
        raise UserError(f"--out {path} ends with what is no sample of dlm generate; give another file")
    wanted = {(sample.request.id, sample.number): sample for sample in samples}
    done: set[Sample] = set()
    for number, line in enumerate(data[:size].splitlines(), 1):
        record = _parsed(line)
        if record is None:
            raise UserError(f"--out {path}, line {number} is no sample of dlm generate; give another file")
        if record["settings"] != settings:
            raise UserError(
                f"--out {path}, line {number} was drawn with other settings or from another model; give another file"
            )
        sample = wanted.get((record["id"], record["sample"]))
        if sample is not None:
            request = sample.request
            if (record.get(request.kind, ""), record.get("length")) != (request.text, request.length):
                raise UserError(
                    f"--out {path}, line {number} has the id {request.id!r} of another request than is asked for now; "
                    "give another file, or another id"
                )
            done.add(sample)
    return done, size


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value: Any = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    record = cast("dict[str, Any]", value)
    return record if {"id", "sample", "settings", "ids"} <= record.keys() else None


@contextmanager
def appended(path: Path, size: int) -> Generator[BinaryIO]:
    """A file to be gone on with behind its first ``size`` bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "xb") as handle:
        handle.truncate(size)
        handle.seek(size)
        yield handle


def write_record(handle: BinaryIO, record: Mapping[str, Any]) -> None:
    """One line, at once: whoever kills this process leaves whole lines and at most one that is torn."""
    handle.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    handle.flush()
