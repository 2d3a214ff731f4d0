"""``dlm verify``: whether what was committed is still what was committed."""

from typing import Annotated, Any

import typer

from pipeline.errors import CorruptionError, UserError
from workflows import runs
from workflows.commands.common import (
    DEFAULT_STORE,
    JsonOption,
    OptionalRun,
    StoreOption,
    find_existing_store,
    find_store,
    print_json,
    print_line,
    store_option,
)
from workflows.report.text import scaled
from workflows.verification import Verified, all_artifacts, artifacts_of_run, verify_artifact


def verify(
    run_id: OptionalRun = "",
    store: StoreOption = DEFAULT_STORE,
    whole_store: Annotated[bool, typer.Option("--all", help="All artifacts of the store, whatever run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Hash every file of every committed artifact of a run; exit code 3 with what to delete if one differs."""
    if whole_store and run_id:
        raise UserError("--all looks at the whole store and RUN at one run; give one of them")
    place = find_existing_store(store) if whole_store else find_store(store)
    if whole_store:
        found = {artifact.address: artifact for artifact in all_artifacts(place)}
        again = "then resume the runs that need them"
    else:
        run = runs.require_run_id(place, run_id)
        found = artifacts_of_run(place, run)
        again = f"then build them again: dlm resume {run.run_id}{store_option(place)}"
    rows: list[dict[str, Any]] = []
    damaged: list[Verified] = []
    for name, artifact in found.items():
        verified = verify_artifact(artifact)
        status = "not there yet" if verified is None else "damaged" if verified.faults else "ok"
        if verified is not None and verified.faults:
            damaged.append(verified)
        rows.append({"name": name, "status": status} | ({} if verified is None else vars(verified)))
        if not as_json:
            _print(name, status, verified)
    if as_json:
        print_json(rows)
    elif not found:
        print_line("there are no artifacts")
    if damaged:
        folders = " ".join(verified.delete for verified in damaged)
        raise CorruptionError(f"{len(damaged)} of {len(rows)} artifacts are damaged. Delete {folders} and {again}")


def _print(name: str, status: str, verified: Verified | None) -> None:
    if verified is None:
        print_line(f"{name}  {status}")
        return
    files = f"{verified.num_files} file{'' if verified.num_files == 1 else 's'}"
    print_line(f"{name}  {status}  {files}, {scaled(verified.num_bytes, 'B')}  {verified.path}")
    for fault in verified.faults:
        print_line(f"  {fault}")
