"""A next-token checkpoint as a diffusion model: shifted, not shifted, annealed, and the same network from scratch.

The course is that of the recipe ``smollm2_to_diffusion``.  Every stage is run alone, as ``python -m pipeline.STAGE``,
in a work directory; the command that was interrupted goes on with what it finds there.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.adaptation_checkpoint import QUICK_CORPUS, make_checkpoint
from benchmarks.command import Measured, Options, RefusedError
from benchmarks.process import ROOT
from benchmarks.quality_stages import run_stage
from pipeline.ar_init.config import STAGE as AR_INIT
from pipeline.ar_init.config import ArInitConfig
from pipeline.artifact import Manifest, checked
from pipeline.corpus.config import STAGE as CORPUS
from pipeline.corpus.config import CorpusConfig, Source
from pipeline.import_checkpoint.config import STAGE as IMPORT
from pipeline.import_checkpoint.config import ImportConfig
from pipeline.packing.config import STAGE as PACKING
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.adaptation import AdaptationConfig
from pipeline.pretrain.config import STAGE as PRETRAIN
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.tokenization.config import STAGE as TOKENIZATION
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import STAGE as TOKENIZER
from workflows.recipes.smollm2 import smollm2_to_diffusion

WORK = ROOT / "build" / "adaptation"
ANNEAL_SHARE = 0.25
"""Of the steps, over which attention opens where it is annealed."""
VALIDATIONS = 4
SCRATCH_LR = 6e-4
MOST_NATS, LEAST_LEAD = 4.6, 1.5
"""What is expected of a shifted model at the end, and of its lead over one from scratch; nats a token."""
_PATIENCE_S = 900.0
"""With a step on a machine that has other work."""
RECIPE = {step.name: step.config for step in smollm2_to_diffusion().steps}


@dataclass(frozen=True)
class Arm:
    """One way to begin."""

    slug: str
    label: str
    target_offset: int
    is_annealed: bool = False
    is_from_scratch: bool = False


SHIFT = Arm("shift", "shift", 1)
NO_SHIFT = Arm("no_shift", "no shift", 0)
ANNEALED = Arm("annealed", "shift, annealed", 1, is_annealed=True)
SCRATCH = Arm("scratch", "from scratch", 0, is_from_scratch=True)
ARMS = (SHIFT, NO_SHIFT, ANNEALED, SCRATCH)


@dataclass(frozen=True)
class Point:
    """What held-out text costs after some training."""

    tokens: int
    nats: float
    mc_se: float
    bpb: float


@dataclass(frozen=True)
class Course:
    """One training."""

    arm: Arm
    seed: int
    points: tuple[Point, ...]
    trained: tuple[float, ...]
    """The bound of the step's own batch, nats a token, by step."""
    tokens_per_s: float
    train_s: float
    threads: int

    @property
    def end(self) -> Point:
        """The last point."""
        return self.points[-1]


@dataclass(frozen=True)
class Bench:
    """A work directory, a checkpoint and a text."""

    work: Path
    checkpoint: str
    corpus: CorpusConfig
    packing: PackingConfig
    pretrain: PretrainConfig

    def texts(self) -> dict[str, Path]:
        """The checkpoint, its tokenizer with a mask, and text as documents, tokens and rows."""
        names = ("checkpoint", "corpus", "tokenizer", "tokens", "rows", "init")
        made = {name: self.work / "text" / name for name in names}
        run_stage(IMPORT, ImportConfig(path=self.checkpoint), {}, made["checkpoint"])
        run_stage(CORPUS, self.corpus, {}, made["corpus"])
        run_stage(TOKENIZER, RECIPE["tokenizer"], {"checkpoint": made["checkpoint"]}, made["tokenizer"])
        both = {"corpus": made["corpus"], "tokenizer": made["tokenizer"]}
        run_stage(TOKENIZATION, TokenizationConfig(), both, made["tokens"])
        words = {"tokens": made["tokens"], "tokenizer": made["tokenizer"]}
        run_stage(PACKING, self.packing, words, made["rows"])
        given = {"weights": made["checkpoint"], "tokenizer": made["tokenizer"]}
        run_stage(AR_INIT, ArInitConfig(), given, made["init"])
        return made

    def course(self, arm: Arm, seed: int, made: dict[str, Path]) -> Course:
        """Train one arm."""
        names = ("rows", "tokenizer", "tokens") if arm.is_from_scratch else ("rows", "tokenizer", "tokens", "init")
        out = self.work / f"{arm.slug}-{seed}"
        config = arm_config(self.pretrain, arm, seed)
        trained = run_stage(PRETRAIN, config, {name: made[name] for name in names}, out)
        return read_course(arm, seed, trained, out)


def arm_config(base: PretrainConfig, arm: Arm, seed: int) -> PretrainConfig:
    """A training of one arm: data, order, noise, length and schedule are those of all arms with that seed."""
    anneal_steps = round(ANNEAL_SHARE * base.num_steps) if arm.is_annealed else 0
    return replace(
        base,
        objective=replace(base.objective, target_offset=1 if arm.target_offset else 0),
        adaptation=AdaptationConfig(anneal_steps=anneal_steps),
        optimizer=replace(base.optimizer, lr=SCRATCH_LR) if arm.is_from_scratch else base.optimizer,
        init_seed=seed if arm.is_from_scratch else 0,
        data_seed=seed,
        noise_seed=seed,
    )


def read_course(arm: Arm, seed: int, trained: Manifest, out: Path) -> Course:
    """The figures of a training by tokens seen: whole rows, asked for or given."""
    lines = [json.loads(line) for line in checked(out, "metrics.jsonl").read_text().splitlines()]
    step_tokens = trained.config["global_batch_seqs"] * trained.stats["seq_len"]
    seen = [(step_tokens * (line["step"] + 1), line) for line in lines]
    train_s = sum(line["step_s"] for line in lines)
    return Course(
        arm,
        seed,
        tuple(
            Point(tokens, line["val_nelbo"], line["val_nelbo_mc_se"], line["val_bpb_bound"])
            for tokens, line in seen
            if "val_nelbo" in line
        ),
        tuple(line["nelbo"] for line in lines),
        step_tokens * len(lines) / train_s,
        train_s,
        trained.config["threads_per_worker"],
    )


def measure(options: Options) -> Measured:
    """Train every arm with every seed."""
    own = options.own
    if options.quick:
        with tempfile.TemporaryDirectory() as work:
            return _measure(_quick_bench(Path(work)), own.seeds[:1])
    if own.checkpoint is None or own.train is None or own.test is None:
        raise ValueError("--checkpoint, --train and --test are wanted: a GGUF file or a directory, and two texts")
    if options.text:
        raise ValueError("--text has no meaning here; give --train and --test")
    source = {
        "train": Source((str(own.train.resolve()),), held_out_fraction=0.0),
        "test": Source((str(own.test.resolve()),), held_out_fraction=1.0),
    }
    recipe: PretrainConfig = RECIPE["pretrain"]
    pretrain = _validated(
        replace(
            recipe,
            num_steps=own.steps or recipe.num_steps,
            threads_per_worker=own.threads,
            watchdog=replace(recipe.watchdog, step_s=_PATIENCE_S),
        )
    )
    corpus = replace(RECIPE["corpus"], source=source)
    bench = Bench(own.work or WORK, str(own.checkpoint.resolve()), corpus, RECIPE["packing"], pretrain)
    return _measure(bench, own.seeds)


def _validated(pretrain: PretrainConfig) -> PretrainConfig:
    validation = ValidationConfig(max(1, pretrain.num_steps // VALIDATIONS), pretrain.validation.num_rows)
    return replace(pretrain, validation=validation, track=False, checkpoint_every_steps=pretrain.num_steps)


def _quick_bench(work: Path) -> Bench:
    architecture = make_checkpoint(work / "given")
    pretrain = replace(
        RECIPE["pretrain"], architecture=architecture, num_steps=8, validation=ValidationConfig(4, 4), precision="fp32"
    )
    return Bench(work, str(work / "given"), QUICK_CORPUS, PackingConfig(seq_len=64), _validated(pretrain))


def _measure(bench: Bench, seeds: Sequence[int]) -> Measured:
    made = bench.texts()
    courses = [bench.course(arm, seed, made) for seed in seeds for arm in ARMS]
    ends = {arm: [course.end for course in courses if course.arm == arm] for arm in ARMS}
    if len({tuple(point.tokens for point in course.points) for course in courses}) != 1:
        raise RefusedError("the trainings were validated after other numbers of tokens: they cannot be compared")
    bpb = {arm: statistics.mean(point.bpb for point in points) for arm, points in ends.items()}
    notes = findings(ends)
    figures = {
        "arms": {arm.slug: {"label": arm.label, "seeds": _by_seed(arm, courses)} for arm in ARMS},
        "tokens": courses[0].end.tokens,
        "validation_rows": bench.pretrain.validation.num_rows,
        "seq_len": bench.packing.seq_len,
        "findings": notes,
    }
    ratios = {f"{arm.slug}_bpb_over_shift": bpb[arm] / bpb[SHIFT] for arm in ARMS if arm != SHIFT}
    return Measured("\n".join([_table(courses), "", *notes]), ratios, figures)


def findings(ends: dict[Arm, list[Point]]) -> list[str]:
    """What was expected of the ends of all seeds, and whether it came so."""
    worst = max(point.nats for point in ends[SHIFT])
    leads = [scratch.nats - shift.nats for scratch, shift in zip(ends[SCRATCH], ends[SHIFT], strict=True)]
    found = [
        (f"shift at most {MOST_NATS} nats a token", worst <= MOST_NATS, f"{worst:.3f}"),
        (f"from scratch at least {LEAST_LEAD} nats behind", min(leads) >= LEAST_LEAD, f"{min(leads):.3f}"),
    ]
    return [f"{what}: {'yes' if came else 'NO'} ({how})" for what, came, how in found]


def _by_seed(arm: Arm, courses: Sequence[Course]) -> dict[str, Any]:
    return {
        str(course.seed): {
            "held_out": [[p.tokens, round(p.nats, 4), round(p.mc_se, 4), round(p.bpb, 4)] for p in course.points],
            "trained": [round(nats, 3) for nats in course.trained],
            "tokens_per_s": round(course.tokens_per_s, 1),
            "train_s": round(course.train_s, 1),
            "threads": course.threads,
        }
        for course in courses
        if course.arm == arm
    }


def _table(courses: Sequence[Course]) -> str:
    first = courses[0].points[0].tokens
    headings = ("model", "seed", f"nats a token at {first / 1e3:.0f}k", f"at {courses[0].end.tokens / 1e3:.0f}k",
                "± masks", "bits a byte", "tokens/s", "minutes")  # fmt: skip
    rows = [
        [
            course.arm.label,
            str(course.seed),
            f"{course.points[0].nats:.3f}",
            f"{course.end.nats:.3f}",
            f"{course.end.mc_se:.3f}" if math.isfinite(course.end.mc_se) else "",
            f"{course.end.bpb:.3f}",
            f"{course.tokens_per_s:.0f}",
            f"{course.train_s / 60:.1f}",
        ]
        for course in courses
    ]
    return command.table(headings, rows)


def arguments() -> argparse.ArgumentParser:
    """Options of this benchmark."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--checkpoint", type=Path, help="SmolLM2 135M: a GGUF file, or a directory of transformers")
    parser.add_argument("--train", type=Path, help="text to train on")
    parser.add_argument("--test", type=Path, help="text to score")
    parser.add_argument("--steps", type=int, help=f"steps of each training (default: {RECIPE['pretrain'].num_steps})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--threads", type=int, default=2, help="of a training (default: 2)")
    parser.add_argument("--work", type=Path, help="directory to work and to go on in (default: build/adaptation)")
    return parser


if __name__ == "__main__":
    raise SystemExit(command.run("adaptation", measure, is_timed=False, own=arguments()))
