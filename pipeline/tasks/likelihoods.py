"""Tasks by likelihood: which choice, and how likely a text.  Each question gives one record of JSON values."""

import hashlib
import math
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from pipeline.errors import NumericsError
from pipeline.inference.likelihood import LikelihoodConfig, Request, Score, ScoreError, score, why_unguided
from pipeline.inference.model import OpenModel
from pipeline.inference.pairs import encode_pair
from pipeline.tasks.questions import Question

Record = dict[str, Any]
_WORDS = re.compile(r"\s+")


def mask_id(number: int, part: int = 0) -> int:
    """Addresses the masks of a question, or of one row of it: by its number in the file, wherever it is worked on."""
    digest = hashlib.sha256(f"{number}/{part}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def choose(model: OpenModel, numbered: Sequence[tuple[int, Question]], config: LikelihoodConfig) -> list[Record]:
    """For each choice -log p of it behind its context, or a bound; choices of one question share their masks."""
    records: list[Record] = []
    requests: list[Request] = []
    asked: list[int] = []
    for number, question in numbered:
        pairs = [encode_pair(model.encode, question["context"], choice) for choice in question["choices"]]
        own = [Request(context, answer, mask_id(number)) for context, answer in pairs]
        records.append({"number": number})
        if why_not := _misfit(model, own, config):
            records[-1]["failed"] = why_not
            continue
        requests += own
        asked += [number] * len(own)
    scores = iter(_scores(model, requests, asked, config))
    for (_, question), record in zip(numbered, records, strict=True):
        if "failed" in record:
            continue
        choices = question["choices"]
        found = [next(scores) for _ in choices]
        record |= {
            "answer": question["answer"],
            "nats": [one.nats for one in found],
            "deviations": [_kept(one.deviations) for one in found],
            "chars": [len(choice) for choice in choices],
            "bytes": [len(choice.encode()) for choice in choices],
            "passes": sum(one.num_passes for one in found),
            "cut": max(one.num_cut for one in found),
        }
    return records


def _misfit(model: OpenModel, choices: Sequence[Request], config: LikelihoodConfig) -> str:
    """Why choices cannot be asked about, or nothing."""
    room = model.record.seq_len - model.record.target_offset
    for place, choice in enumerate(choices):
        if not choice.answer:
            return f"choice {place} has no tokens"
        if len(choice.answer) > room:
            return f"choice {place} has {len(choice.answer)} tokens; rows of the model have room for {room}"
        if why_not := why_unguided(choice, config, model.record):
            return f"choice {place}: {why_not}"
    return ""


def roll(model: OpenModel, numbered: Sequence[tuple[int, Question]], config: LikelihoodConfig) -> list[Record]:
    """-log p of each text, or a bound: the sum over its rows of seq_len, none of which sees another."""
    size = model.record.seq_len - model.record.target_offset  # of a shifted model the end of a text stands before
    rows: list[tuple[int, list[int]]] = []
    for number, question in numbered:
        ids = model.encode(question["text"])
        rows += [(number, ids[start : start + size]) for start in range(0, len(ids), size)]
    parts: dict[int, list[list[int]]] = {number: [] for number, _ in numbered}
    requests: list[Request] = []
    for number, ids in rows:
        requests.append(Request((), ids, mask_id(number, len(parts[number]))))
        parts[number].append(ids)
    scores = iter(_scores(model, requests, [number for number, _ in rows], config))
    return [
        _rolled(number, question["text"], parts[number], [next(scores) for _ in parts[number]])
        for number, question in numbered
    ]


def _scores(
    model: OpenModel, requests: Sequence[Request], numbers: Sequence[int], config: LikelihoodConfig
) -> list[Score]:
    """Those of questions of these numbers, one for each request."""
    try:
        return score(model, requests, config)
    except ScoreError as error:
        raise NumericsError(f"question {numbers[requests.index(error.request)]}: {error}") from None


def _rolled(number: int, text: str, rows: Sequence[Sequence[int]], scores: Sequence[Score]) -> Record:
    if not rows:
        return {"number": number, "failed": "the text has no tokens"}
    return {
        "number": number,
        "nats": math.fsum(one.nats for one in scores),
        "mc_se": math.sqrt(math.fsum(one.mc_se**2 for one in scores)),
        "deviations": _kept(
            [math.fsum(of_rows) for of_rows in zip_longest(*(s.deviations for s in scores), fillvalue=0.0)]
        ),
        "tokens": sum(map(len, rows)),
        "bytes": len(text.encode()),
        "words": len(_WORDS.split(text)),
        "passes": sum(one.num_passes for one in scores),
    }


def _kept(deviations: Sequence[float]) -> list[float]:
    """To a millionth of a nat: they are many."""
    return [round(one, 6) for one in deviations]
