"""``dlm cost``: what a run has used."""

from workflows import runs
from workflows.commands.common import (
    DEFAULT_STORE,
    JsonOption,
    OptionalRun,
    StoreOption,
    find_store,
    page_width,
    print_json,
    print_line,
)
from workflows.cost import Cost, cost_json, cost_of, total_of
from workflows.display import columns
from workflows.progress import duration
from workflows.summary import summarise

_HEADER = ("step", "attempt", "processes", "their wall time", "CPU used", "CPU-hours", "GPU-hours", "")


def cost(run_id: OptionalRun = "", store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Show the CPU time and the GPU-hours of each step and attempt, those that were killed too."""
    place = find_store(store)
    run = runs.require_run_id(place, run_id)
    rows = cost_of(run)
    states = {step.step: step for step in summarise(place, run).steps}
    total = total_of(rows)
    if as_json:
        listed = [{**cost_json(row), "status": states[row.step].status} for row in rows]
        print_json({"run_id": run.run_id, "rows": listed, "total": cost_json(total)})
        return
    notes = {name: f"{step.status} {step.detail}" if step.status == "cached" else "" for name, step in states.items()}
    for line in columns(_HEADER, [*(_row(row, notes[row.step]) for row in rows), _row(total, "")], page_width()):
        print_line(line)


def _row(cost: Cost, note: str) -> tuple[str, ...]:
    hours = (f"{value / 3600:.4f}" for value in (cost.cpu_s, cost.gpu_s))
    attempt = str(cost.attempt) if cost.attempt else ""
    return cost.step, attempt, str(cost.processes), duration(cost.wall_s), duration(cost.cpu_s), *hours, note
