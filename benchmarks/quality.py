"""Quality at equal tokens: an autoregressive model, block diffusion, masked diffusion and experts on the same text.

Every stage is run alone, as ``python -m pipeline.STAGE``, in a work directory; the command that was interrupted goes on
with what it finds there.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.command import Measured, Options, RefusedError
from benchmarks.process import ROOT
from benchmarks.quality_models import (
    AR,
    FULL,
    MDLM,
    MIN_STEPS,
    MODELS,
    QUICK,
    QUICK_STEPS,
    VALIDATIONS,
    WORKERS,
    Model,
    Size,
    pretrain_config,
    with_text,
)
from benchmarks.quality_order import Result, Validation, findings
from benchmarks.quality_stages import run_stage
from dlm_core.models.config import ModelConfig
from pipeline.artifact import Manifest, checked, read_json
from pipeline.config import from_json
from pipeline.convert.config import STAGE as CONVERT
from pipeline.convert.config import ConvertConfig
from pipeline.corpus.config import STAGE as CORPUS
from pipeline.evaluate.config import STAGE as EVALUATE
from pipeline.evaluate.config import EvaluateConfig
from pipeline.packing.config import STAGE as PACKING
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import STAGE as PRETRAIN
from pipeline.tokenization.config import STAGE as TOKENIZATION
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import STAGE as TOKENIZER

WORK = ROOT / "build" / "quality"
DEFAULT_MINUTES = 10.0
TRIAL_SHARE = 10
"""A learning rate is tried on the first of so many parts of the steps."""
_PACE_STEPS = 100


def measure(options: Options) -> Measured:
    """Train and evaluate every model, in a directory of its own for a quick run."""
    own, size = options.own, QUICK if options.quick else FULL
    size = with_text(size, options.text) if options.text else size
    if options.quick and (own.steps is not None or own.minutes is not None):
        raise ValueError(f"--quick takes {QUICK_STEPS} steps; leave out --steps and --minutes")
    if own.steps is not None and own.steps < MIN_STEPS * TRIAL_SHARE:
        raise ValueError(
            f"--steps {own.steps}: a learning rate is tried on a tenth of them, which takes at least {MIN_STEPS}"
        )
    if own.minutes is not None and not 0 < own.minutes < math.inf:
        raise ValueError(f"--minutes {own.minutes}: wanted a number above 0")
    if options.quick and own.work is None:
        with tempfile.TemporaryDirectory() as work:
            return _measure(Bench(size, Path(work)), QUICK_STEPS)
    bench = Bench(size, own.work or WORK)
    if options.quick:
        return _measure(bench, QUICK_STEPS)
    return _measure(bench, own.steps or bench.steps_in(DEFAULT_MINUTES if own.minutes is None else own.minutes))


def _measure(bench: "Bench", num_steps: int) -> Measured:
    tried = {model.label: bench.try_rates(model, num_steps) for model in MODELS}
    only = bench.size.learning_rates[0]
    results = [bench.result(m, num_steps, best_rate(tried[m.label]) if tried[m.label] else only) for m in MODELS]
    check_same(results)
    by_label = {result.label: result for result in results}
    base = by_label[AR.label]
    found = findings(results, bench.size.learning_rates)
    yardsticks = {name: base.evaluation[name] for name in ("unigram_bpb", "xz_bpb")}
    notes = [
        f"{num_steps} steps of {bench.size.step_tokens} tokens, {base.tokens / 1e6:.2f}M in all; held out "
        f"{base.evaluation['num_bytes']} bytes of {base.evaluation['num_docs']} documents; "
        f"unigram {yardsticks['unigram_bpb']:.3f}, xz -9 {yardsticks['xz_bpb']:.3f} bits a byte",
        *found,
    ]
    figures = {
        "models": {result.label: _shown(result) for result in results},
        "learning_rates_tried": {name: {f"{lr:g}": bpb for lr, bpb in rates.items()} for name, rates in tried.items()},
        "yardsticks": yardsticks,
        "text": {name: base.evaluation[name] for name in ("num_bytes", "num_tokens", "num_docs", "num_replicates")},
        "num_steps": num_steps,
        "tokens": base.tokens,
        "order": found,
    }
    ratios = {f"{model.slug}_bpb_over_ar": by_label[model.label].bpb / base.bpb for model in MODELS if model != AR}
    return Measured("\n".join([_table(results), "", *notes]), ratios, figures)


def best_rate(bpb: Mapping[float, float]) -> float:
    """The learning rate of the fewest bits a byte."""
    return min(bpb, key=lambda lr: bpb[lr])


@dataclass(frozen=True)
class Bench:
    """A work directory and what is made in it."""

    size: Size
    work: Path

    def steps_in(self, minutes: float) -> int:
        """Steps that the masked model takes in a time, by a short training, which is measured once a directory.

        A multiple of ten times the number of validations, so that phases of a trial end with one.
        """
        paced = self._pretrain(MDLM, _PACE_STEPS, self.size.learning_rates[0], self.work / "pace")
        steps, whole = paced.stats["tokens_per_s"] * 60 * minutes / self.size.step_tokens, TRIAL_SHARE * VALIDATIONS
        return max(1, round(steps / whole)) * whole

    def try_rates(self, model: Model, num_steps: int) -> dict[float, float]:
        """Held-out bits a byte of every learning rate, on a tenth of the steps; nothing to try where there is one."""
        rates = self.size.learning_rates
        if len(rates) == 1:
            return {}
        return {lr: self.result(model, num_steps // TRIAL_SHARE, lr).bpb for lr in rates}

    def result(self, model: Model, num_steps: int, lr: float) -> Result:
        """A model trained for so many steps, and how it does on the held-out text."""
        place = self.work / model.slug / f"steps-{num_steps}-lr-{lr:g}"
        trained = self._pretrain(model, num_steps, lr, place / "pretrain")
        run_stage(CONVERT, ConvertConfig(), {"pretrain": place / "pretrain"}, place / "weights")
        texts = self._texts()
        inputs = {name: texts[name] for name in ("tokens", "tokenizer", "corpus")}
        evaluated = run_stage(
            EVALUATE, EvaluateConfig(batch_rows=64), {"weights": place / "weights", **inputs}, place / "evaluation"
        )
        return read_result(model, lr, trained, evaluated, place / "pretrain")

    def _pretrain(self, model: Model, num_steps: int, lr: float, out: Path) -> Manifest:
        texts, config = self._texts(), pretrain_config(model, self.size, num_steps, lr)
        names = ("rows", "tokenizer", "tokens") if config.validation.every_steps else ("rows", "tokenizer")
        return run_stage(PRETRAIN, config, {name: texts[name] for name in names}, out, workers=WORKERS)

    def _texts(self) -> dict[str, Path]:
        """Text as documents, vocabulary, tokens and rows."""
        made = {name: self.work / "text" / name for name in ("corpus", "tokenizer", "tokens", "rows")}
        if not (made["rows"] / "manifest.json").exists():
            read = {"corpus": made["corpus"]}
            run_stage(CORPUS, self.size.corpus, {}, made["corpus"])
            run_stage(TOKENIZER, self.size.tokenizer, read, made["tokenizer"])
            both = {**read, "tokenizer": made["tokenizer"]}
            run_stage(TOKENIZATION, TokenizationConfig(), both, made["tokens"])
            words = {"tokens": made["tokens"], "tokenizer": made["tokenizer"]}
            run_stage(PACKING, PackingConfig(self.size.seq_len), words, made["rows"])
        return made


def read_result(model: Model, lr: float, trained: Manifest, evaluated: Manifest, pretrained: Path) -> Result:
    """The figures of one training and its evaluation."""
    found = evaluated.stats
    exact = "nll" in found
    nats, bpb = ("nll", "bpb") if exact else ("nelbo", "bpb_bound")
    lines = [json.loads(line) for line in checked(pretrained, "metrics.jsonl").read_text().splitlines()]
    shape = from_json(ModelConfig, read_json(checked(pretrained, "model_config.json")))
    step_s: dict[str, list[float]] = {}
    for line in lines:
        step_s.setdefault(line["phase"], []).append(line["step_s"])
    # The log counts what was asked for; next tokens are not asked for at the first place of a row.
    step_tokens = trained.config["global_batch_seqs"] * trained.stats["seq_len"]
    return Result(
        model=model,
        lr=lr,
        total_params=shape.num_params(),
        active_params=shape.num_active_params(),
        bpb=found[bpb],
        bpb_mc_se=found[f"{bpb}_mc_se"],
        bpb_doc_se=(found[f"{nats}_doc_se"] or math.nan) * found[bpb] / found[nats],
        nats=found[nats],
        is_exact=exact,
        tokens=step_tokens * len(lines),
        train_s=sum(line["step_s"] for line in lines),
        phase_tokens_per_s={phase: step_tokens * len(times) / sum(times) for phase, times in step_s.items()},
        last_phase=[
            Validation(line["step"], line["val_nelbo"], line["val_nelbo_mc_se"])
            for line in lines
            if "val_nelbo" in line and line["phase"] == lines[-1]["phase"]
        ],
        evaluation=found,
        identity={
            "rows": trained.inputs["rows"],
            "held-out tokens": evaluated.inputs["tokens"],
            "epochs": trained.stats["epochs"],
            "tokens scored": found["num_tokens"],
            **{name: trained.config[name] for name in ("num_steps", "global_batch_seqs", "data_seed", "mixture")},
        },
    )


def check_same(results: Sequence[Result]) -> None:
    """RefusedError unless all saw the same rows in the same order and were scored on the same text."""
    for result in results[1:]:
        differing = [name for name, value in result.identity.items() if value != results[0].identity[name]]
        if differing:
            raise RefusedError(
                f"{result.label} and {results[0].label} differ in {', '.join(differing)}: they cannot be compared"
            )


def _shown(result: Result) -> dict[str, Any]:
    hidden = ("model", "evaluation", "identity", "last_phase", "phase_tokens_per_s")
    figures = {name: value for name, value in asdict(result).items() if name not in hidden}
    rates = {phase: round(rate) for phase, rate in result.phase_tokens_per_s.items()}
    return {**figures, "tokens_per_s": round(result.tokens_per_s), "phase_tokens_per_s": rates}


def _table(results: Sequence[Result]) -> str:
    headings = ("model", "M parameters", "active", "learning rate", "bits a byte", "± masks", "± documents",
                "nats a token", "tokens/s", "minutes")  # fmt: skip
    rows = [
        [
            result.label,
            f"{result.total_params / 1e6:.2f}",
            f"{result.active_params / 1e6:.2f}",
            f"{result.lr:g}",
            f"{result.bpb:.4f}",
            "exact" if result.is_exact else f"{result.bpb_mc_se:.4f}",
            f"{result.bpb_doc_se:.3f}",
            f"{result.nats:.4f}",
            f"{result.tokens_per_s:,.0f}",
            f"{result.train_s / 60:.1f}",
        ]
        for result in results
    ]
    return command.table(headings, rows)


def arguments() -> argparse.ArgumentParser:
    """Options of this benchmark."""
    parser = argparse.ArgumentParser(add_help=False)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="time that the masked model trains for (default: 10)")
    length.add_argument("--steps", type=int, help="optimizer steps, instead of as many as fit into that time")
    parser.add_argument("--work", type=Path, help="directory to work and to go on in (default: build/quality)")
    return parser


if __name__ == "__main__":
    raise SystemExit(command.run("quality", measure, is_timed=False, own=arguments()))
