"""``dlm generate``: text of a model, in the terminal, as JSON lines, or as a film."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pipeline.errors import UserError
from workflows.commands.common import (
    DEFAULT_STORE,
    JsonOption,
    SetOption,
    StoreOption,
    console,
    errors,
    find_store,
    parse_settings,
    print_json,
    print_line,
    say,
)

if TYPE_CHECKING:
    from pipeline.inference.sampling import SamplingConfig
    from workflows.generation import Sample, Source
    from workflows.report.film_page import Film
    from workflows.requests import Request

T = TypeVar("T")


def generate(
    source: Annotated[str, typer.Argument(metavar="SRC", help="What dlm inspect takes.")],
    text: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="Text to go on with; none by default.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="The same, as an option.")] = None,
    infill: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Text with gaps to be filled, [MASK] of one token and [MASK:12] of twelve; \\\\[MASK] is text. What "
            "stands between gaps is encoded piece by piece: leave the blanks at a gap to the model.",
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help='A .jsonl of {"prompt": ...} or {"infill": ...}, with "id" and "length" if wanted, or a .txt with a '
            "prompt a line; blank lines are passed over.",
        ),
    ] = "",
    length: Annotated[
        int, typer.Option(min=0, help="Tokens to be drawn behind a prompt; 0: what it leaves of a row.")
    ] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each prompt.")] = 1,
    out: Annotated[
        str,
        typer.Option(metavar="FILE", help="A .jsonl with a line a sample; what it has already is not drawn again."),
    ] = "",
    live: Annotated[
        bool, typer.Option("--live", help="Show the text emerging from masks, one sample after the other.")
    ] = False,
    film: Annotated[
        str, typer.Option(metavar="FILE", help="An .html page with the path of each sample from masks to text.")
    ] = "",
    tokenizer: Annotated[
        str,
        typer.Option(help="Artifact of the stage tokenizer that the weights were trained with, where they bring none."),
    ] = "",
    device: Annotated[str, typer.Option(help="auto, a GPU where there is one; cpu; or cuda.")] = "auto",
    settings: SetOption = [],  # noqa: B006 - typer reads it, nobody changes it
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Write text with a model: from nothing, behind a prompt, or in the gaps of a text.

    Settings of the sampler are generate.*, as in --set generate.temperature=1 or --set generate.sampler.kind=entropy.
    A sample depends on its prompt's id, its number and generate.noise_seed alone.
    """
    from pipeline.config import apply_settings
    from pipeline.inference.sampling import SamplingConfig
    from workflows.generation import Sample, sources_of
    from workflows.inspection import place_of

    config = apply_settings({"generate": SamplingConfig()}, parse_settings(settings))["generate"]
    requests = _requests(text, prompt, infill, prompts, length)
    wanted = [Sample(request, number) for request in requests for number in range(samples)]
    if as_json and live:
        raise UserError("--live shows text and --json prints records; leave one out")
    targets = _file("--out", out, ".jsonl"), _file("--film", film, ".html")
    if tokenizer and not Path(tokenizer).expanduser().is_dir():
        raise UserError(f"--tokenizer {tokenizer}: there is no such directory")
    given = Path(tokenizer).expanduser().resolve() if tokenizer else None
    with sources_of(place_of(source, find_store(store)), given) as found:
        _generate(found, source, wanted, config, device, *targets, is_live=live, as_json=as_json)


def _generate(
    found: "Source",
    name: str,
    wanted: "list[Sample]",
    config: "SamplingConfig",
    device: str,
    out: Path | None,
    film: Path | None,
    *,
    is_live: bool,
    as_json: bool,
) -> None:
    from pipeline.inference.model import open_model
    from workflows import drawing, generation
    from workflows.emerging import Emerging
    from workflows.report.film_page import film_page

    settings = found.settings(config)
    done, size = generation.read_done(out, wanted, settings) if out else (set[generation.Sample](), 0)
    model = open_model(found.weights, found.tokenizer, device)
    canvases = [drawing.canvas_of(model, sample) for sample in wanted]
    records: list[dict[str, Any]] = []
    films: list[Film] = []
    with ExitStack() as stack:
        handle = stack.enter_context(generation.appended(out, size)) if out else None
        show = stack.enter_context(Emerging(console, model.literal, model.mask_token_id)) if is_live else None

        def look(passes: int, rows: Mapping[int, list[int]]) -> None:
            assert show is not None
            for place, ids in rows.items():
                show.look(_title(wanted[place]), passes, canvases[place].ids, ids)

        drawn = drawing.draw(
            model,
            wanted,
            canvases,
            replace(config, batch_rows=1) if is_live else config,
            done,
            keep_frames=film is not None,
            on_pass=look if is_live else None,
        )
        drawn = drawn if out is None or is_live else _told(drawn, len(wanted) - len(done))
        for sample, canvas, filled in drawn:
            record = drawing.record_of(model, sample, canvas, filled, settings)
            if handle is not None:
                generation.write_record(handle, record)
            if film is not None:
                films.append(drawing.film_of(model, sample, filled))
            if as_json:
                records.append(record)
            elif out is None and not is_live:
                _print_sample(sample, record)
    if as_json:
        print_json(records)
    cut = [canvas.num_cut for canvas in canvases if canvas.num_cut]
    if cut:
        say(f"note: {len(cut)} of {len(canvases)} prompts were too long; {sum(cut)} tokens were cut from their left")
    if out is not None:
        say(f"{out}: {len(wanted) - len(done)} drawn, {len(done)} were there already")
    if film is not None:
        film.parent.mkdir(parents=True, exist_ok=True)
        lead = f"{len(films)} drawn by {name}, from masks to text."
        film.write_text(film_page(f"Text of {name}", lead, films), encoding="utf-8")
        say(f"{film}: the paths of {len(films)}")


def _told(drawn: Iterator[T], total: int) -> Iterator[T]:
    """In a terminal, how many have been drawn."""
    from rich.progress import track

    return iter(track(drawn, "Drawn", total=total, console=errors, transient=True, disable=not errors.is_terminal))


def _requests(text: str | None, prompt: str | None, infill: str | None, prompts: str, length: int) -> "list[Request]":
    from workflows.requests import one_request, read_requests

    given = {"PROMPT": text, "--prompt": prompt, "--infill": infill, "--prompts": prompts or None}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} are given; each says what is written: take one")
    if prompts:
        return read_requests(Path(prompts).expanduser(), length)
    return [one_request(prompt if text is None else text, infill, length)]


def _file(option: str, name: str, suffix: str) -> Path | None:
    if not name:
        return None
    path = Path(name).expanduser().resolve()
    if path.suffix != suffix or path.is_dir():
        raise UserError(f"{option} {name} is no {suffix} file")
    return path


def _title(sample: "Sample") -> str:
    own = f"{sample.request.id}, " if sample.request.id else ""
    return f"{own}sample {sample.number + 1}"


def _print_sample(sample: "Sample", record: Mapping[str, Any]) -> None:
    from workflows.report.text import visible

    print_line(f"-- {_title(sample)}: {record['nfe']} forward passes")
    print_line(visible(record["text"]))
