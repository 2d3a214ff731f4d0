"""Quality against forward passes: every sampler at a range of settings, its samples scored by a next-token model.

Samples are drawn as ``dlm generate`` draws them, from nothing but masks.  The scorer was trained on the same text with
the same tokenizer and gives exact likelihoods.  The held-out text, cut into rows of the same length, is scored as well:
what samples that are no better or worse than text would reach.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import command
from benchmarks.command import Measured, Options
from benchmarks.process import ROOT
from benchmarks.sampling_quality_models import Artifacts, full, quick, train
from benchmarks.sampling_scores import Scores, score
from dlm_core.models.transformer import Denoiser
from dlm_core.samplers.blocks import sample_blocks
from pipeline.generate.config import GenerateConfig
from pipeline.held_out import HeldOutRows, open_held_out
from pipeline.inference.model import OpenModel, open_model
from pipeline.inference.rules import make_context, make_proposal, make_rule, window_of
from pipeline.inference.sampler import Kind, SamplerConfig
from pipeline.weights import check_tokenizer, load_denoiser

WORK = ROOT / "build" / "sampling_quality"
_BY_STEPS: tuple[Kind, ...] = ("ancestral", "origin", "analytic", "random", "confidence", "margin", "entropy", "remdm")
_BY_STEPS += ("path_planning",)
_WINDOW = 32


@dataclass(frozen=True)
class Curve:
    """One sampler from cheap to dear."""

    label: str
    points: tuple[GenerateConfig, ...]


@dataclass(frozen=True)
class Point:
    """Samples of one setting."""

    setting: str
    nfe: float
    """Forward passes of a row, the mean over rows."""
    scores: Scores


def curves(steps: Sequence[int], num_samples: int, *, temperature: float = 1.0) -> list[Curve]:
    """All samplers; ``steps`` are for those that take a number of them."""
    base = GenerateConfig(num_samples=num_samples, temperature=temperature)
    longest = max(steps)

    def curve(label: str, samplers: Sequence[SamplerConfig], **options: Any) -> Curve:
        return Curve(label, tuple(replace(base, sampler=sampler, **options) for sampler in samplers))

    by_steps = [curve(kind, [SamplerConfig(kind, num_steps=n) for n in steps]) for kind in _BY_STEPS]
    windows = {
        f"confidence, windows of {_WINDOW}": "none",
        f"confidence, windows of {_WINDOW}, prefix cache": "prefix",
        f"confidence, windows of {_WINDOW}, dual cache": "dual",
    }
    in_a_window = [max(1, n * _WINDOW // longest) for n in steps]
    return [
        *by_steps,
        curve("first_hitting", [SamplerConfig("first_hitting", per_pass=max(1, longest // n)) for n in steps]),
        curve("threshold", [SamplerConfig("threshold", tau=tau) for tau in (0.1, 0.3, 0.5, 0.7, 0.9)]),
        curve("factor", [SamplerConfig("factor", factor=factor) for factor in (16.0, 8.0, 4.0, 2.0, 1.0)]),
        curve("entropy_bound", [SamplerConfig("entropy_bound", gamma=gamma) for gamma in (32.0, 8.0, 2.0, 0.5, 0.1)]),
        *(
            curve(
                label,
                [SamplerConfig("confidence", num_steps=n) for n in dict.fromkeys(in_a_window)],
                block_size=_WINDOW,
                cache=cache,
            )
            for label, cache in windows.items()
        ),
        curve("self_speculative, temperature 0", [SamplerConfig("self_speculative")], temperature=0.0),
    ]


@dataclass(frozen=True)
class Bench:
    """The models in memory, and the rows that are compared."""

    model: OpenModel
    scorer: Denoiser
    text: Tensor
    """Held-out rows as long as the samples."""

    def point(self, config: GenerateConfig) -> Point:
        """Draw and score."""
        length = config.length or self.model.record.seq_len
        drawn = sample_blocks(
            make_context(config, self.model),
            torch.full((config.num_samples, length), self.model.mask_token_id),
            make_rule(config.sampler, self.model.vocabulary.special),
            make_proposal(config, self.model),
            block_size=window_of(config, self.model.record, length),
            mask_token_id=self.model.mask_token_id,
            noise_seed=config.noise_seed,
        )
        given = {name: value for name, value in asdict(config.sampler).items() if value is not None and name != "kind"}
        setting = ", ".join(f"{name} {value:g}" for name, value in given.items())
        return Point(setting, float(drawn.nfe.double().mean()), self.scored(drawn.x0))

    def scored(self, x0: Tensor) -> Scores:
        """Rows of samples, or of text."""
        special = self.model.vocabulary.special
        return score(x0, self.scorer, self.model.denoiser, special.mask_token_id, special.eos_token_id)


def open_bench(artifacts: Artifacts, num_rows: int) -> Bench:
    """ValueError for models that are not what they should be, or text that is too short."""
    model = open_model(artifacts.weights, artifacts.tokenizer, "cpu")
    scorer, other = load_denoiser(artifacts.scorer)
    record, special = model.record, model.vocabulary.special
    if record.objective != "masked_nelbo" or record.target_offset:
        raise ValueError(
            f"--weights {artifacts.weights}: the model has the objective {record.objective} and target_offset "
            f"{record.target_offset}; wanted masked_nelbo and 0"
        )
    if other.objective != "autoregressive_nll":
        raise ValueError(
            f"--scorer {artifacts.scorer}: the model has the objective {other.objective}; wanted autoregressive_nll"
        )
    check_tokenizer(other, artifacts.scorer, artifacts.tokenizer)
    rows = HeldOutRows(open_held_out(artifacts.tokens), record.seq_len)
    num_whole = rows.stream.num_tokens // record.seq_len
    if num_whole < num_rows:
        raise ValueError(
            f"--tokens {artifacts.tokens}: the held-out text has {num_whole} whole rows of {record.seq_len} tokens; "
            f"wanted {num_rows}, as many as samples"
        )
    chosen = np.linspace(0, num_whole - 1, num_rows).astype(int)
    text = torch.from_numpy(np.stack([rows.row(int(index), special.pad_token_id) for index in chosen]))
    return Bench(model, scorer, text)


def measure(options: Options) -> Measured:
    """Train what is not given, then draw and score every point."""
    if options.text:
        raise ValueError("--text: the text is that of the quickstart, or of --tokens; leave it out")
    own = options.own
    given = {name: getattr(own, name) for name in ("weights", "scorer", "tokenizer", "tokens")}
    missing = [f"--{name}" for name, path in given.items() if path is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"{', '.join(missing)} missing: give all of --weights, --scorer, --tokenizer, --tokens, or none"
        )
    num_samples = own.num_samples or (4 if options.quick else 64)
    if not missing:
        return _measure(Artifacts(**given), num_samples, options)
    if options.quick and own.work is None:
        with tempfile.TemporaryDirectory() as work:
            return _measure(train(quick(), Path(work)), num_samples, options)
    return _measure(train(quick() if options.quick else full(), own.work or WORK), num_samples, options)


@torch.inference_mode()
def _measure(artifacts: Artifacts, num_samples: int, options: Options) -> Measured:
    bench = open_bench(artifacts, num_samples)
    length = bench.model.record.seq_len
    steps = [length // share for share in ((16, 4) if options.quick else (16, 8, 4, 2, 1))]
    shown = slice(2) if options.quick else slice(None)
    found = {
        curve.label: [bench.point(config) for config in curve.points[shown]] for curve in curves(steps, num_samples)
    }
    text = bench.scored(bench.text)
    figures = {
        "curves": {
            label: [{"setting": p.setting, "nfe": round(p.nfe, 2), **_rounded(p.scores)} for p in points]
            for label, points in found.items()
        },
        "text": _rounded(text),
        "num_samples": num_samples,
        "seq_len": length,
        "temperature": 1.0,
        "parameters": {"sampled": bench.model.record.model.num_params(), "scorer": bench.scorer.config.num_params()},
        "log_vocabulary": round(float(np.log(bench.model.record.model.vocab_size)), 4),
    }
    ratios = {"ancestral_ppl_over_text": found["ancestral"][-1].scores.ppl / text.ppl}
    return Measured(_table(found, text), ratios, figures)


def _rounded(scores: Scores) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(scores).items()}


def _table(found: dict[str, list[Point]], text: Scores) -> str:
    headings = [
        "sampler",
        "setting",
        "passes",
        "ppl",
        "nll",
        "± rows",
        "bound",
        "± masks",
        "entropy",
        "distinct 2",
        "3",
    ]
    rows = [[label, p.setting, f"{p.nfe:.1f}", *_cells(p.scores)] for label, points in found.items() for p in points]
    return command.table(headings, [*rows, ["held-out text", "", "", *_cells(text)]])


def _cells(scores: Scores) -> list[str]:
    return [
        f"{scores.ppl:.1f}",
        f"{scores.nll:.3f}",
        f"{scores.nll_se:.3f}",
        f"{scores.bound:.3f}",
        f"{scores.bound_mc_se:.3f}",
        f"{scores.unigram_entropy:.3f}",
        f"{scores.distinct_2:.3f}",
        f"{scores.distinct_3:.3f}",
    ]


def arguments() -> argparse.ArgumentParser:
    """Options of this benchmark."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--weights", type=Path, help="weights to sample from (default: trained here)")
    parser.add_argument("--scorer", type=Path, help="weights of a next-token model with the same tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="the tokenizer of both")
    parser.add_argument("--tokens", type=Path, help="tokens with held-out text")
    parser.add_argument("--num-samples", type=int, help="rows of each setting (default: 64)")
    parser.add_argument(
        "--work", type=Path, help="directory to train and to go on in (default: build/sampling_quality)"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(command.run("sampling_quality", measure, is_timed=False, own=arguments()))
