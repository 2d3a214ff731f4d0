"""Do the tests of the mathematical core catch faults?  python -m tests.support.mutants (make mutants).

Faults planted by hand and faults drawn from the syntax trees, each run against the fast tests of its module.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.support.mutants.drawn import draw
from tests.support.mutants.equivalent import EQUIVALENT
from tests.support.mutants.modules import DRAWN_FROM, MODULES, source_path
from tests.support.mutants.mutant import Mutant
from tests.support.mutants.planted import PLANTED, planted
from tests.support.mutants.runner import TIMEOUT_S, Job, Outcome, Pool, started, take_snapshot

ROOT = Path(__file__).parents[3]
SEED = 20250607
NUM_DRAWN = 200
MIN_PLANTED = 25
MIN_CAUGHT = 0.95


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; 0 if the tests are good enough."""
    args = _parse(argv)
    chosen = args.only or list(MODULES)
    with tempfile.TemporaryDirectory(prefix="mutants_") as scratch:
        snapshot = Path(scratch) / "snapshot"
        take_snapshot(ROOT, snapshot)
        sources = {module: (snapshot / source_path(module)).read_text(encoding="utf-8") for module in chosen}
        mutants = planted(sources)
        if not args.planted:
            drawn_from = {module: sources[module] for module in chosen if module in DRAWN_FROM}
            mutants += draw(drawn_from, args.num_drawn, args.seed, taken=[mutant.mutated for mutant in mutants])
        if args.list:
            for mutant in mutants:
                print(_describe(mutant))
            return 0
        with started(snapshot, Path(scratch)) as pool:
            if not _unmutated_pass(pool, sources):
                return 1
            outcomes = []
            for mutant, outcome in zip(
                mutants, pool.run_all([_job(m.module, m.mutated) for m in mutants]), strict=True
            ):
                verdict = "caught  " if outcome.caught else "SURVIVED"
                by = f"  [{outcome.how}]" if outcome.how else ""
                print(f"{verdict} {_describe(mutant)}  {outcome.seconds:.1f} s{by}", flush=True)
                outcomes.append(outcome)
    return _report(mutants, outcomes)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.support.mutants", description=__doc__)
    parser.add_argument("--only", metavar="MODULE", action="append", choices=list(MODULES), help="repeatable")
    parser.add_argument("--seed", type=int, default=SEED, help="of the drawn mutants; %(default)s")
    parser.add_argument("--num-drawn", type=int, default=NUM_DRAWN, help="%(default)s")
    parser.add_argument("--planted", action="store_true", help="the planted faults alone")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    return parser.parse_args(argv)


def _job(module: str, source: str) -> Job:
    return Job(source_path(module), source, MODULES[module])


def _describe(mutant: Mutant) -> str:
    return f"{source_path(mutant.module)}:{mutant.line} ({mutant.name})  {mutant.before}  ->  {mutant.after}"


def _unmutated_pass(pool: Pool, sources: dict[str, str]) -> bool:
    """A failure of a mutant means nothing unless the source as it is passes, and well within the time-out."""
    good = True
    for module, outcome in zip(sources, pool.run_all([_job(*item) for item in sources.items()]), strict=True):
        if outcome.caught:
            print(f"ERROR    the tests of {module} fail without a mutant: {outcome.how}\n{outcome.output}")
        elif outcome.seconds > TIMEOUT_S / 2:
            print(f"ERROR    the tests of {module} take {outcome.seconds:.0f} s; a mutant has {TIMEOUT_S:.0f} s")
        else:
            print(f"passed   {source_path(module)} as it is  {outcome.seconds:.1f} s", flush=True)
            continue
        good = False
    return good


def _report(mutants: Sequence[Mutant], outcomes: Sequence[Outcome]) -> int:
    """Print what survived and the count; 1 if a survivor has no reason or too few were caught."""
    total, caught = Counter(m.module for m in mutants), Counter()
    unexplained = 0
    for mutant, outcome in zip(mutants, outcomes, strict=True):
        caught[mutant.module] += outcome.caught
        reason = EQUIVALENT.get(mutant.key)
        if outcome.caught and reason is not None:
            unexplained += 1
            print(f"\nlisted as equivalent, yet caught by {outcome.how}: {_describe(mutant)}")
        if not outcome.caught:
            unexplained += reason is None
            print(f"\nsurvivor: {_describe(mutant)}\n  {reason or 'NO REASON KNOWN: the tests miss it'}")
    print()
    for module in total:
        print(f"{module:15} {caught[module]:4} of {total[module]:4} caught")
    if len(PLANTED) < MIN_PLANTED:
        print(f"{len(PLANTED)} planted faults are fewer than {MIN_PLANTED}")
    enough = caught.total() >= MIN_CAUGHT * len(mutants) and len(PLANTED) >= MIN_PLANTED
    print(f"{caught.total()} of {len(mutants)} mutants caught")
    return 0 if enough and not unexplained else 1


if __name__ == "__main__":
    sys.exit(main())
