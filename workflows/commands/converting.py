"""``dlm convert``: weights from one layout to another."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from pipeline.errors import UserError
from workflows.commands.common import (
    DEFAULT_STORE,
    SetOption,
    StoreOption,
    find_store,
    found_or_suggested,
    parse_settings,
    print_line,
)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="What dlm inspect takes.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="Directory to be made; it must be new or empty.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FAMILY",
            help="llada, dream, llada_moe, llada2, llama, qwen2, qwen3 or qwen3_moe: a directory that transformers "
            "loads; dlm: this project's interchange weights.",
        ),
    ],
    dtype: Annotated[
        str,
        typer.Option(
            help="bfloat16, float32 or float16, of a directory.  By default that of the source where all its tensors "
            "have one of them, else bfloat16."
        ),
    ] = "",
    tokenizer: Annotated[
        str,
        typer.Option(help="Artifact of the stage tokenizer that the weights were trained with, where they bring none."),
    ] = "",
    settings: SetOption = [],  # noqa: B006 - typer reads it, nobody changes it
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write weights in another layout, proved tensor by tensor and by logits before anything is there.

    The stages' settings are import_checkpoint.*, convert.* and export.*, as in
    --set export.max_shard_bytes=1000000000.
    """
    from pipeline.export.config import Dtype, ExportFamily
    from workflows.conversion import INTERCHANGE, convert, plan_conversion
    from workflows.inspection import look_at, place_of

    found_or_suggested("family", to, [*get_args(ExportFamily), INTERCHANGE])
    if dtype:
        found_or_suggested("dtype", dtype, get_args(Dtype))
    place = place_of(source, find_store(store))
    if tokenizer and not Path(tokenizer).expanduser().is_dir():
        raise UserError(f"--tokenizer {tokenizer}: there is no such directory")
    found = look_at(place.path)
    given = Path(tokenizer).expanduser().resolve() if tokenizer else None
    of_run = place.tokenizer_of(found) if to != INTERCHANGE else None
    export: dict[str, Any] = {"dtype": dtype} if dtype else {}
    plan = plan_conversion(found, to, export, given, parse_settings(settings), of_run)
    convert(plan, Path(target).expanduser().resolve(), print_line)
