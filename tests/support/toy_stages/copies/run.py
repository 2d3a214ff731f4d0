"""Each letter twice, in each shard; the whole text at the end, and the sum of what the shards counted."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.artifact import checked, load_manifest
from pipeline.stage import Shard, StageContext, Stats
from tests.support.toy_stages.trouble import ToyConfig, execute

_PATIENCE_S = 30.0


def list_shards(config: ToyConfig, inputs: Mapping[str, Path], context: StageContext) -> list[Shard]:
    """One shard for each file, which its content determines."""
    execute("copies-list", config, context)
    files = load_manifest(inputs["letters"]).files
    return [{"name": Path(f.path).stem, "file": f.path, "identity": {"sha256": f.sha256}} for f in files]


def run_shard(config: ToyConfig, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> Stats:
    """The letter twice, in a folder, and its code."""
    assert list(context.out.iterdir()) == [], "a shard starts with nothing"
    (context.out / "in").mkdir()
    letter = checked(inputs["letters"], shard["file"]).read_text()
    with (context.out / "in" / "copy.txt").open("w") as copy:
        copy.write(letter)
        execute(f"copies-{shard['name']}", config, context, lambda: _let_others_finish(config, inputs, shard, context))
        copy.write(letter)
    return {"code": ord(letter)}


def _let_others_finish(config: ToyConfig, inputs: Mapping[str, Path], shard: Shard, context: StageContext) -> None:
    """A shard that is killed again and again waits for the others: its third death ends those that still run."""
    if config.trouble != "kill" or config.times < 3 or shard["name"] not in config.where:
        return
    listed = {Path(file.path).stem for file in load_manifest(inputs["letters"]).files}
    deadline = time.monotonic() + _PATIENCE_S
    while {path.stem for path in (context.state.parent / "shards").glob("*.json")} != listed - {shard["name"]}:
        if time.monotonic() > deadline:
            raise TimeoutError("the other shards were not committed")
        time.sleep(0.02)


def finish(config: ToyConfig, inputs: Mapping[str, Path], shard_dirs: Sequence[Path], context: StageContext) -> Stats:
    """The copies in order."""
    execute("copies-finish", config, context)
    text = "".join((path / "in" / "copy.txt").read_text() for path in shard_dirs)
    (context.out / "text.txt").write_text(text)
    return {"codes": sum(load_manifest(path).stats["code"] for path in shard_dirs)}
