"""Questions with choices out of any text: which of four passages follows?  Always the same ones for the same text.

    python -m benchmarks.questions TEXT --out choices.jsonl [--num 200]

A paragraph gives the context, its first words, and the answer, the words behind them; three other paragraphs give what
stands at that place in them.  A model of the language alone cannot tell: it has to have read the context.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUM_CONTEXT_WORDS, NUM_CHOICE_WORDS, NUM_CHOICES = 32, 12, 4


def make_questions(text: str, num: int) -> Iterator[dict[str, Any]]:
    """The first ``num`` questions {"context", "choices", "answer"}; ValueError if there are fewer."""
    size = NUM_CONTEXT_WORDS + NUM_CHOICE_WORDS
    passages = [words for words in map(str.split, dict.fromkeys(text.splitlines())) if len(words) >= size]
    if len(passages) < max(num, NUM_CHOICES):
        raise ValueError(
            f"the text has {len(passages)} paragraphs of {size} words or more; {max(num, NUM_CHOICES)} are needed"
        )
    for number, words in enumerate(passages[:num]):
        others = sorted(range(len(passages)), key=lambda other, number=number: _place(number, other))
        others = [other for other in others if other != number][: NUM_CHOICES - 1]
        answer = _place(number, number)[0] % NUM_CHOICES
        chosen = [*others[:answer], number, *others[answer:]]
        choices = [" " + " ".join(passages[one][NUM_CONTEXT_WORDS:size]) for one in chosen]
        yield {"context": " ".join(words[:NUM_CONTEXT_WORDS]), "choices": choices, "answer": answer}


def _place(number: int, other: int) -> bytes:
    return hashlib.sha256(f"{number} {other}".encode()).digest()


def main() -> None:
    """Write questions of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=200)
    given = parser.parse_args()
    questions = list(make_questions(given.text.read_text(encoding="utf-8"), given.num))
    given.out.write_text("".join(json.dumps(question) + "\n" for question in questions))
    print(f"{len(questions)} questions in {given.out}")


if __name__ == "__main__":
    main()
