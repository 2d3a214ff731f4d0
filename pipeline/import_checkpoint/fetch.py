"""Where a checkpoint comes from: a directory as it is, the hub, or a .gguf file that is dequantised first."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pipeline.artifact import MANIFEST
from pipeline.errors import UserError
from pipeline.gguf_header import INSTEAD
from pipeline.import_checkpoint.config import ImportConfig, gguf_path
from pipeline.import_checkpoint.gguf import check_gguf
from pipeline.import_checkpoint.source import CONFIG, HUB_PREFIX, INDEX, PASSED_ON, SourceFiles, find_source
from pipeline.logits_proof import in_fresh_process

_ON_HUB = (CONFIG, INDEX, "*.safetensors", *PASSED_ON, "chat_template*", MANIFEST, "README.md")


@dataclass(frozen=True)
class Opened:
    """The files to convert, and what they were made from if it was a .gguf file."""

    source: SourceFiles
    gguf: Path | None = None
    dequantised_by: str | None = None
    """As in "transformers 5.0.0"."""
    notices: tuple[str, ...] = ()


def need(packages: tuple[str, ...], what: str, otherwise: str = "") -> None:
    """UserError naming the packages that are not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install 'dlm[hf]'{otherwise}")


def open_checkpoint(config: ImportConfig, scratch: Path) -> Opened:
    """The files to convert; UserError for what is missing, be it a file or a package."""
    path = Path(config.path)
    if config.path.startswith(HUB_PREFIX):
        path = _from_hub(config)
    if gguf := gguf_path(config, path):
        return _dequantised(gguf, scratch)
    return Opened(find_source(path))


def _from_hub(config: ImportConfig) -> Path:
    need(("huggingface_hub",), f"import_checkpoint.path {config.path}")
    import huggingface_hub
    from huggingface_hub import errors

    name, _, revision = config.path.removeprefix(HUB_PREFIX).partition("@")
    patterns: list[str] = [config.gguf_file] if config.gguf_file else [*_ON_HUB]
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"the hub has no {name} at {revision}, or does not show it to you: {error}") from None
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(f"the hub cannot be reached for {name} at {revision}: {error}") from None


def _dequantised(gguf: Path, scratch: Path) -> Opened:
    need(("transformers", "gguf", "accelerate"), f"the GGUF file {gguf}")
    notices = check_gguf(gguf)
    target = scratch / "dequantised"
    version = in_fresh_process(
        "pipeline.import_checkpoint.dequantise:dequantise",
        gguf,
        target,
        less_memory=f"transformers holds the whole model in float32. Give it more, or: {INSTEAD}",
    )
    return Opened(find_source(target), gguf, f"transformers {version}", tuple(notices))
