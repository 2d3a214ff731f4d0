"""Which files of a corpus differ from those that an artifact was made of, and in what."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.artifact import MANIFEST, read_json
from pipeline.corpus.config import CorpusConfig
from pipeline.corpus.files import content_of, list_source
from pipeline.errors import CorruptionError
from workflows.store import ArtifactPlace

_SHOWN_CHARS = 12


@dataclass(frozen=True)
class FileChange:
    """A file of a source that was added, was removed, or has other bytes."""

    source: str
    name: str
    size_bytes: tuple[int | None, int | None]
    """Then and now; None where there is no such file."""
    content: tuple[str, str]
    """Then and now: SHA-256, or the tag of a remote file."""

    @property
    def told(self) -> str:
        """In a line."""
        old, new = self.size_bytes
        if old is None:
            return f"{self.name}: new, {new:,} bytes"
        if new is None:
            return f"{self.name}: gone, it had {old:,} bytes"
        size = f"{old:,} -> {new:,} bytes" if old != new else f"{new:,} bytes as before"
        before, after = (content[:_SHOWN_CHARS] for content in self.content)
        return f"{self.name}: {size}, sha256 {before} -> {after}"


def changed_corpus_files(config: CorpusConfig, sources: set[str], place: ArtifactPlace) -> list[FileChange]:
    """Files of some sources that are others than those which the shards of an artifact say they were made of.

    None of a source whose shards tell nothing of their files, and none at all if a shard cannot be read.
    """
    recorded = _recorded(place)
    found: list[FileChange] = []
    for source in sorted(sources & set(config.source)):
        then = {name: known for (of, name), known in recorded.items() if of == source}
        if not then:
            continue
        now = {file.name: (file.size_bytes, content_of(file)) for file in list_source(source, config.source[source])}
        for name in sorted(then.keys() | now.keys()):
            old, new = then.get(name, (None, "")), now.get(name, (None, ""))
            if old != new:
                found.append(FileChange(source, name, (old[0], new[0]), (old[1], new[1])))
    return found


def _recorded(place: ArtifactPlace) -> Mapping[tuple[str, str], tuple[int, str]]:
    """(source, file) -> (size, content), as the manifests of the committed shards tell; empty if any cannot be read."""
    found: dict[tuple[str, str], tuple[int, str]] = {}
    try:
        shards: list[dict[str, Any]] = [read_json(directory / MANIFEST)["shard"] for directory in place.shard_folders()]
    except (FileNotFoundError, CorruptionError):
        return {}  # what they lack would look new; dlm verify tells what is damaged
    for shard in shards:
        contents = dict(shard.get("identity", {}).get("files", []))
        for file in shard.get("piece", {}).get("files", []):
            if file["name"] in contents:
                found[shard["source"], file["name"]] = file["size_bytes"], contents[file["name"]]
    return found
