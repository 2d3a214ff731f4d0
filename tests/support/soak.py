"""Does a training that is killed again and again come to the bits of one that is not?

python -m tests.support.soak [--kills 20] [--seed N] (make soak): two ranks on gloo, dense and then experts shared
between them with averages, each once straight through and once through SIGKILLs of random ranks at random moments.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.pretrain.config import STAGE, PretrainConfig
from pipeline.training_state import list_checkpoints, read_manifest
from tests.support.resuming import AVERAGES, EXPERTS, Inputs, differences
from tests.support.tiny_run import make_artifacts, metrics, run_gang, start_gang, tiny

ROUNDS = {
    "dense": tiny(workers=2),
    "experts shared, averages": tiny(workers=2, architecture=EXPERTS, ep_size=2, optimizer=AVERAGES),
}
SAVE_PHASES = {
    "copying": (0, 1),
    "writing": (0, 1),
    "written": (0, 1),
    "publishing": (0,),
    "renaming": (0,),
    "published": (0,),
    "deleting": (0,),
}
"""Of ``tests.support.faults.die_in_save``, with the ranks that go through them."""
MAX_DELAY_S = 0.04
"""A kill in a step comes at most so much later: two steps on an idle machine."""


@dataclass(frozen=True)
class Kill:
    """A SIGKILL that a rank gets."""

    rank: int
    step: int
    """From which on it may come."""
    moment: str
    """restore, step, or a phase of a save."""
    delay_s: float
    """Since the restore or the step began."""


def num_steps(kills: int, every: int) -> int:
    """Steps of a training with so many kills: two checkpoints for each, and one for the end."""
    return (2 * kills + 1) * every


def draw(kills: int, every: int, seed: int) -> list[Kill]:
    """Kills spread over a training, half of them in saves or while one is restored: a function of the seed alone."""
    rng = random.Random(seed)
    apart = ["restore", *SAVE_PHASES]
    rng.shuffle(apart)
    moments = [apart[number % len(apart)] for number in range(kills // 2)]
    moments += ["step"] * (kills - len(moments))
    rng.shuffle(moments)
    found = []
    for number, moment in enumerate(moments):
        step = 2 * every * number + rng.randrange(1, 2 * every)
        rank, delay_s = rng.choice(SAVE_PHASES.get(moment, (0, 1))), rng.uniform(0.0, MAX_DELAY_S)
        found.append(Kill(rank, step, moment, 0.0 if moment in SAVE_PHASES else delay_s))
    return found


def fault_of(kill: Kill, config: PretrainConfig, resumed: int) -> tuple[str, dict[str, Any]]:
    """The fault that brings a kill on in a training that goes on after a step."""
    if kill.moment not in SAVE_PHASES:
        step = -1 if kill.moment == "restore" else kill.step
        return "die_in_phase", {"phase": kill.moment, "step": step, "rank": kill.rank, "delay_s": kill.delay_s}
    every = config.checkpoint_every_steps
    first = max(kill.step, resumed + 1)
    if kill.moment == "deleting":
        first = max(first, (config.keep_checkpoints + 1) * every)
    return "die_in_save", {"step": -(-first // every) * every, "rank": kill.rank, "phase": kill.moment}


def saved_steps(state: Path) -> int:
    """Step of the newest published checkpoint of a state, 0 without one."""
    found = list_checkpoints(state) if state.exists() else []
    return read_manifest(found[0]).step if found else 0


def run_through(
    config: PretrainConfig, inputs: Inputs, out: Path, kills: Sequence[Kill], say: Callable[[str], Any]
) -> Path:
    """Train to the end though ranks are killed; AssertionError if one is not, or if the others do not notice."""
    state = out.with_name(out.name + ".state")
    say("kill  rank  moment      from step  in step  goes on after step")
    for number, kill in enumerate(kills):
        fault, given = fault_of(kill, config, saved_steps(state))
        gang = start_gang(STAGE, config, inputs, out, workers=config.workers, fault=fault, **given)
        codes = gang.wait()
        wanted = [-9 if rank == kill.rank else 3 for rank in range(config.workers)]
        assert codes == wanted, f"{kill}: exit codes {codes}; the log:\n{gang.log()}"
        step, reached = max(0, given["step"]), len(metrics(state))
        after = saved_steps(state)
        say(f"{number + 1:4}  {kill.rank:4}  {kill.moment:10}  {step:9}  {reached:7}  {after:18}")
    return run_gang(STAGE, config, inputs, out, workers=config.workers)


def soak(
    config: PretrainConfig, inputs: Inputs, root: Path, kills: int, seed: int, say: Callable[[str], Any]
) -> list[str]:
    """Where a training through kills differs from a straight one; nowhere is what is wanted."""
    every = config.checkpoint_every_steps
    config = replace(config, num_steps=num_steps(kills, every))
    straight = run_gang(STAGE, config, inputs, root / "straight" / "out", workers=config.workers)
    found = run_through(config, inputs, root / "killed" / "out", draw(kills, every, seed), say)
    return differences(config, found, straight)


def main(argv: Sequence[str] | None = None) -> int:
    """Soak every round; 0 if none differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="in each round")
    parser.add_argument("--seed", type=int, default=20250607)
    args = parser.parse_args(argv)
    if args.kills < 1:
        parser.error(f"--kills is {args.kills}; it must be at least 1")
    say = partial(print, flush=True)
    problems: list[str] = []
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak_") as scratch:
        inputs = make_artifacts(Path(scratch)).inputs()
        for number, (name, config) in enumerate(ROUNDS.items()):
            say(f"\n{name}: {num_steps(args.kills, config.checkpoint_every_steps)} steps, two ranks")
            found = soak(config, inputs, Path(scratch) / str(number), args.kills, args.seed + number, say)
            problems += [f"{name}: {problem}" for problem in found]
    outcome = f"DIFFER in {'; '.join(problems)}" if problems else "the same metrics of every step and the same weights"
    took_s = time.monotonic() - begun_s
    say(f"\n{args.kills} kills a round, seed {args.seed}, {took_s:.0f} s; straight and killed: {outcome}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
