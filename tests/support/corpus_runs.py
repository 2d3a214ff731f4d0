"""Corpora of a few documents, made by the real stage and read back."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifact import load_manifest
from pipeline.config import from_json
from pipeline.corpus.config import STAGE, CorpusConfig
from pipeline.corpus.plan import plan_shards
from pipeline.data.documents import read_documents, text_files
from tests.pipeline.conftest import make_artifact

TEXTS = [f"document {i}\nwith a second line" for i in range(40)]


@dataclass(frozen=True)
class Made:
    """A committed corpus."""

    out: Path

    @property
    def stats(self) -> dict[str, Any]:
        return load_manifest(self.out).stats

    @property
    def source(self) -> dict[str, Any]:
        """Counts of the only source."""
        (source,) = self.stats["sources"].values()
        return source

    def texts(self, *splits: str) -> list[str]:
        """Documents in the order in which they are read, by default of both splits."""
        files = [
            name for s in splits or ("train", "held_out") for ns in text_files(self.out, s).values() for name in ns
        ]
        return ["".join(parts) for name in files for parts in read_documents(self.out, name)]

    def rejects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "rejects.jsonl").read_text().splitlines()]

    def files(self) -> dict[str, str]:
        """Name -> SHA-256 of every file."""
        return {record.path: record.sha256 for record in load_manifest(self.out).files}


def corpus_config(source: Any, **settings: Any) -> CorpusConfig:
    """A configuration as the command line would give it; a good share is held out, text files are kept whole."""
    settings = {"held_out_fraction": 0.3, "txt_document_chars": 0, **settings}
    return from_json(CorpusConfig, {"source": source, **settings}, where="corpus")


_numbers = itertools.count()


def make_corpus(root: Path, source: Any, **settings: Any) -> Made:
    """Run the whole stage."""
    if isinstance(source, Path):
        source = str(source)
    out = root / f"made-{next(_numbers)}" / "corpus"
    return Made(make_artifact(STAGE, corpus_config(source, **settings), {}, out))


def planned(source: Any, **settings: Any) -> list[dict[str, Any]]:
    """The shards that would be run."""
    return plan_shards(corpus_config(str(source) if isinstance(source, Path) else source, **settings))


def jsonl(texts: list[str]) -> bytes:
    """A line for each text."""
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()
