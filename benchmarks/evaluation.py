"""Multiple choice by likelihood: ours, and one request at a time as in public scripts, at an equal standard error.

Questions are made of the text: a passage, the words that follow it, and words that follow other passages.  The other
side takes 128 masks a choice; ours takes as many as give a mean squared mc_se no larger.  Both mask the same law and
score the same weights, and their answers are compared.  For a larger model beside, whose few choices would not tell
that number, ours takes as many masks as for the first, and the errors of both are printed.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import Measured, Options, RefusedError, run, table
from benchmarks.evaluation_peers import OneByOne, one_by_one
from benchmarks.interleave import interleave, median_ratio
from benchmarks.text import read_documents
from dlm_core.noise import hash_integer
from pipeline.inference.likelihood import LikelihoodConfig, Request, Score, score
from pipeline.inference.model import OpenModel, open_model

THEIR_MASKS, BATCH_ROWS = 128, 32
OUR_MASKS = (8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 64, 96, 128)
"""What is tried."""
NUM_CHOICES = 4
CONTEXT_TOKENS = (24, 96)
ANSWER_TOKENS = (4, 31)
"""Least and greatest number; those of HellaSwag's endings, and the shorter answers of ARC and PIQA."""
SIGMAS = 5.0
MIN_TOLD, MIN_DOF = 0.7, 60
"""Of the root mean square mc_se to the standard deviation between the rounds, which is itself some 10 % off
from so many degrees of freedom on."""
MAX_ERROR_RATIO = 1.05
"""Of our mc_se to theirs in the rounds that are timed, where these say what it is: masks are chosen by other rounds."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    num_questions: int
    num_rounds: int
    num_bytes: int
    num_pilots: int = 4
    """Rounds of the other side that say how large its error is: each has it from four batches a choice."""


FULL = Size(num_questions=10, num_rounds=3, num_bytes=400_000)
LARGER = Size(num_questions=1, num_rounds=2, num_bytes=400_000)
QUICK = Size(num_questions=1, num_rounds=2, num_bytes=20_000)


def questions(model: OpenModel, options: Options, size: Size) -> list[Request]:
    """All choices of all questions; those of a question share their context and mask id."""
    ids: list[int] = []
    for text in read_documents(options.text, size.num_bytes):
        ids += model.encode(text)
    most = min(CONTEXT_TOKENS[1], model.record.seq_len - ANSWER_TOKENS[1])
    requests: list[Request] = []
    for number in range(size.num_questions):
        length = CONTEXT_TOKENS[0] + _draw(most - CONTEXT_TOKENS[0] + 1, number, 0)
        start = _draw(len(ids) - length - ANSWER_TOKENS[1], number, 1)
        for choice in range(NUM_CHOICES):
            answer_size = ANSWER_TOKENS[0] + _draw(ANSWER_TOKENS[1] - ANSWER_TOKENS[0] + 1, number, 2, choice)
            place = start + length if choice == 0 else _draw(len(ids) - answer_size, number, 3, choice)
            requests.append(Request(ids[start : start + length], ids[place : place + answer_size], number))
    return requests


def _draw(high: int, *address: int) -> int:
    return int(hash_integer(high, 71, *address))


def ours(model: OpenModel, requests: list[Request], num_masks: int, number: int) -> list[Score]:
    """Of all requests together."""
    return score(model, requests, LikelihoodConfig(num_masks, noise_seed=number, batch_rows=BATCH_ROWS))


def theirs(model: OpenModel, requests: list[Request], number: int) -> list[OneByOne]:
    """One request after another."""
    generator = torch.Generator().manual_seed(number)
    return [
        one_by_one(
            model.denoiser,
            request.context,
            request.answer,
            mask_token_id=model.mask_token_id,
            num_masks=THEIR_MASKS,
            batch_rows=BATCH_ROWS,
            generator=generator,
            target_offset=model.record.target_offset,
        )
        for request in requests
    ]


def _rms(errors: list[float]) -> float:
    return math.sqrt(statistics.fmean(error**2 for error in errors))


@dataclass(frozen=True)
class Measurement:
    """Of one model."""

    table: str
    ratios: dict[str, float]
    figures: dict[str, Any]
    num_masks: int
    """Ours."""


def measure(options: Options) -> Measured:
    """The model that counts, and the larger one beside it where there is one."""
    own = options.own
    if (own.smollm2 is None) != (own.smollm2_tokenizer is None):
        raise ValueError("--smollm2 and --smollm2-tokenizer belong together; give both or neither")
    first = _measure(open_model(own.weights, own.tokenizer, "cpu"), options, QUICK if options.quick else FULL)
    if own.smollm2 is None:
        return Measured(first.table, first.ratios, first.figures)
    model = open_model(own.smollm2, own.smollm2_tokenizer, "cpu")
    larger = _measure(model, options, QUICK if options.quick else LARGER, first.num_masks)
    beside = {"ratios": {name: round(ratio, 3) for name, ratio in larger.ratios.items()}, **larger.figures}
    return Measured(f"{first.table}\n\n{larger.table}", first.ratios, {**first.figures, "smollm2": beside})


def _masks_for(their_error: float, model: OpenModel, requests: list[Request]) -> dict[int, float]:
    """Our errors by numbers of masks, up to the first that is no larger than theirs."""
    errors: dict[int, float] = {}
    for num_masks in OUR_MASKS:
        errors[num_masks] = _rms([one.mc_se for one in ours(model, requests, num_masks, 1_000)])
        if errors[num_masks] <= their_error:
            return errors
    least = min(errors.values())
    raise RefusedError(f"{OUR_MASKS[-1]} masks leave an error of {least:.4f} nats, theirs is {their_error:.4f}")


def _measure(model: OpenModel, options: Options, size: Size, num_masks: int | None = None) -> Measurement:
    """Their error first, and the masks that we need for it, unless they are given; then both in turn."""
    if model.record.objective != "masked_nelbo":
        raise ValueError(f"the weights have the objective {model.record.objective}; wanted masked_nelbo")
    requests = questions(model, options, size)
    found_theirs: dict[int, list[OneByOne]] = {}
    found_ours: dict[int, list[Score]] = {}
    errors: dict[int, float] = {}
    if num_masks is None:
        pilot = [theirs(model, requests, 1_000 + round_) for round_ in range(size.num_pilots)]
        errors = _masks_for(_rms([one.mc_se for of_round in pilot for one in of_round]), model, requests)
        num_masks = list(errors)[-1]

    def run_theirs(round_: int) -> None:
        found_theirs[round_] = theirs(model, requests, round_)

    def run_ours(round_: int) -> None:
        found_ours[round_] = ours(model, requests, num_masks, round_)

    as_many = partial(ours, model, requests, THEIR_MASKS)
    seconds = interleave({"theirs": run_theirs, "ours": run_ours, "as many": as_many}, size.num_rounds)
    errors_told = {
        "theirs": _rms([one.mc_se for of_round in found_theirs.values() for one in of_round]),
        "ours": _rms([one.mc_se for of_round in found_ours.values() for one in of_round]),
    }
    spread = {"theirs": _spread(found_theirs), "ours": _spread(found_ours)}
    _check_errors(errors_told, spread, len(requests) * (size.num_rounds - 1))
    _check_equal(found_theirs, found_ours, requests)
    passes = {"theirs": THEIR_MASKS * len(requests), "ours": sum(one.num_passes for one in found_ours[0])}
    rows = [
        [
            name,
            f"{statistics.median(seconds[key]):.2f}",
            f"{passes[key]:,}",
            f"{errors_told[key]:.4f}",
            f"{spread[key]:.4f}",
            f"{median_ratio(seconds[key], seconds['ours']):.2f}",
        ]
        for name, key in (("one request at a time", "theirs"), (f"ours, {num_masks} masks", "ours"))
    ]
    num_params = model.record.model.num_params()
    headings = [f"{len(requests)} choices, {num_params / 1e6:.1f}M parameters", "s", "passes", "rms mc_se, nats"]
    ratios = {
        "likelihood": median_ratio(seconds["theirs"], seconds["ours"]),
        "likelihood_as_many_masks": median_ratio(seconds["theirs"], seconds["as many"]),
    }
    figures = {
        "num_questions": size.num_questions,
        "num_choices": NUM_CHOICES,
        "context_tokens": CONTEXT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "num_params": num_params,
        "vocab_size": model.record.model.vocab_size,
        "lineage": [origin.kind for origin in model.record.lineage],
        "our_masks": num_masks,
        "their_masks": THEIR_MASKS,
        "mc_se_nats": {key: round(value, 5) for key, value in errors_told.items()},
        "between_rounds_nats": {key: round(value, 5) for key, value in spread.items()},
        "our_mc_se_by_masks": {str(key): round(value, 5) for key, value in errors.items()},
        "passes": passes,
        "seconds": {key: [round(s, 3) for s in of] for key, of in seconds.items()},
        "turned_of_ours": _differing(found_ours),
        "turned_of_theirs": _differing(found_theirs),
    }
    return Measurement(table([*headings, "rms between rounds", "x ours"], rows), ratios, figures, num_masks)


def _check_errors(told: Mapping[str, float], spread: Mapping[str, float], dof: int) -> None:
    """Ours is as small as theirs, and either is as large as what rounds differ by, where they are enough to tell."""
    if dof < MIN_DOF:
        return
    if told["ours"] > MAX_ERROR_RATIO * told["theirs"]:
        raise RefusedError(f"our error of {told['ours']:.4f} nats is larger than theirs of {told['theirs']:.4f}")
    for name, seen in spread.items():
        if told[name] < MIN_TOLD * seen:
            raise RefusedError(
                f"{name}: the rounds lie {seen:.4f} nats apart, but an error of {told[name]:.4f} is told"
            )


def _differing(found: Mapping[int, Sequence[OneByOne | Score]]) -> float:
    """Share of questions whose winner is another one in the next round: what the noise turns."""
    winners = [
        [
            min(range(NUM_CHOICES), key=lambda choice: row[first + choice].nats)
            for first in range(0, len(row), NUM_CHOICES)
        ]
        for row in found.values()
    ]
    turned = [a != b for one, other in pairwise(winners) for a, b in zip(one, other, strict=True)]
    return round(statistics.fmean(turned), 4)


def _spread(found: Mapping[int, Sequence[OneByOne | Score]]) -> float:
    """Standard deviation of one choice between the rounds, root mean square over the choices."""
    rounds = ([one.nats for one in row] for row in found.values())
    return math.sqrt(statistics.fmean(statistics.variance(of_choice) for of_choice in zip(*rounds, strict=True)))


def _check_equal(
    found_theirs: Mapping[int, Sequence[OneByOne]], found_ours: Mapping[int, Sequence[Score]], requests: list[Request]
) -> None:
    """Both sides estimate the same numbers: the sum over the requests differs by what noise explains."""
    sums = {
        "theirs": [sum(one.nats for one in row) for row in found_theirs.values()],
        "ours": [sum(one.nats for one in row) for row in found_ours.values()],
    }
    apart = statistics.fmean(sums["theirs"]) - statistics.fmean(sums["ours"])
    squares = sum(one.mc_se**2 for found in (found_theirs, found_ours) for row in found.values() for one in row)
    error = math.sqrt(squares) / len(found_ours)
    if abs(apart) > SIGMAS * error:
        raise RefusedError(
            f"the sums over {len(requests)} choices are {apart:.3f} nats apart, their error is {error:.3f}"
        )


def main(argv: list[str] | None = None) -> int:
    """Run it from the command line."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--weights", type=Path, required=True, help="artifact of convert: masked diffusion")
    own.add_argument("--tokenizer", type=Path, required=True, help="artifact of the tokenizer")
    own.add_argument("--smollm2", type=Path, help="artifact of convert: a larger model, for a table beside")
    own.add_argument("--smollm2-tokenizer", type=Path, help="artifact of its tokenizer")
    return run("evaluation", measure, argv, own=own)


if __name__ == "__main__":
    sys.exit(main())
