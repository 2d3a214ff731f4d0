"""Files of tasks, and requests as lm-evaluation-harness sends them."""

import json
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

ARTICLES = (
    " = Ba = \n \n ba be bi bo . \n = = Bu = = \n \n " + "ba <unk> be bi bo bu da de " * 6,
    " = De = \n \n do du ",
)


def write_task_data(root: Path) -> Path:
    """A folder as the tasks want it."""
    for name in ("gsm8k", "wikitext2"):
        (root / name).mkdir(parents=True)
    problems = [{"question": f"ba be {i}?", "answer": f"bi {i}\n#### {i}"} for i in range(5)]
    questions = [
        {"context": f"ba be {i}", "choices": [" bi bo", f"ba {i} de", " fa fe fi fo ga"], "answer": i % 3}
        for i in range(5)
    ]
    for path, records in (
        (root / "gsm8k" / "test.jsonl", problems[:3]),
        (root / "gsm8k" / "train.jsonl", problems[3:]),
        (root / "choices.jsonl", questions),
    ):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "wikitext2" / "test.txt").write_text(" \n" + " \n".join(f"{article}\n" for article in ARTICLES))
    return root


def asked(kind: str, arguments: list[tuple[Any, ...]], *, doc_id: int = 0, task: str = "task") -> list[Instance]:
    """What the harness asks about one document."""
    doc = {"number": doc_id}
    return [Instance(kind, doc, words, index, (task, doc_id, 1)) for index, words in enumerate(arguments)]  # type: ignore[arg-type]


def questions(*documents: tuple[str, list[str]], task: str = "task") -> list[Instance]:
    """Contexts with their choices, a document each."""
    return [
        instance
        for number, (context, choices) in enumerate(documents)
        for instance in asked("loglikelihood", [(context, choice) for choice in choices], doc_id=number, task=task)
    ]
