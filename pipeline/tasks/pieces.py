"""How the questions of all tasks are cut into shards of like cost, whoever works on them."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.tasks.config import TaskConfig, TasksConfig
from pipeline.tasks.fit import ANSWER_LENGTH
from pipeline.tasks.questions import Question, TaskFile

_BYTES_PER_TOKEN = 4
"""Costs are compared with each other only: it need not be that of the tokenizer."""
_A_ROW = 1024
"""Tokens of a sample as long as there is room for: a guess, like that of an answer, as rows are not known here."""


def cost_of(question: Question, task: TaskConfig, passes: int) -> float:
    """About how many tokens go through a model that takes at most ``passes`` masked copies of a row."""
    match task.kind:
        case "multiple_choice":
            context = _tokens(question["context"])
            return sum((context + n) * _copies(n, passes) for n in map(_tokens, question["choices"]))
        case "text":
            return _tokens(question["text"]) * passes
        case "infill":
            middle = _tokens(question["middle"])
            return (_tokens(question["prefix"]) + middle + _tokens(question["suffix"])) * _steps(middle, task)
        case "match" | "code" | "samples":
            length = task.length or (_A_ROW if task.kind == "samples" else ANSWER_LENGTH)
            num_samples = task.value("num_samples") if task.kind == "code" else 1
            return (_tokens(question.get("prompt", "")) + length) * _steps(length, task) * num_samples


def _steps(length: int, task: TaskConfig) -> int:
    return min(length, task.value("sampling").sampler.value("num_steps"))


def _tokens(text: str) -> int:
    return math.ceil(len(text.encode()) / _BYTES_PER_TOKEN)


def _copies(num_tokens: int, passes: int) -> int:
    return passes if num_tokens > math.log2(passes + 1) else 2**num_tokens - 1


def cut(files: Mapping[str, TaskFile], config: TasksConfig, passes: int) -> list[dict[str, Any]]:
    """Shards of whole questions of one task each, the costliest first: what starts last should be short."""
    costs = {
        name: [cost_of(question, config.tasks[name], passes) for question in file.questions]
        for name, file in files.items()
    }
    fair = math.fsum(itertools.chain.from_iterable(costs.values())) / config.num_shards
    found: list[tuple[float, dict[str, Any]]] = []
    for name in sorted(files):
        total = math.fsum(costs[name])
        num_pieces = min(len(costs[name]), max(1, round(total / fair))) if fair else 1
        for start, stop in itertools.pairwise(_edges(costs[name], num_pieces)):
            shard = {"name": f"{name}-{start:08d}", "task": name, "start": start, "stop": stop}
            found.append((math.fsum(costs[name][start:stop]), shard | {"sha256": files[name].sha256}))
    return [shard for _, shard in sorted(found, key=lambda one: (-one[0], one[1]["name"]))]


def _edges(costs: Sequence[float], num_pieces: int) -> list[int]:
    """Where pieces of about the same cost begin and end, none of them empty."""
    sums, total = list(itertools.accumulate(costs)), math.fsum(costs)
    edges = [0]
    for piece in range(1, num_pieces):
        wanted = total * piece / num_pieces
        nearest = next((i + 1 for i, reached in enumerate(sums) if reached >= wanted), len(costs))
        edges.append(min(max(nearest, edges[-1] + 1), len(costs) - (num_pieces - piece)))
    return [*edges, len(costs)]
