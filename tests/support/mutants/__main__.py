"""Do the tests of the mathematics, and of its sums over ranks, catch faults?  python -m tests.support.mutants.

Faults planted by hand and faults drawn from the syntax trees, each run against the fast tests of its module.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.mutants.drawn import draw
from tests.support.mutants.equivalent import EQUIVALENT
from tests.support.mutants.modules import DRAWN_FROM, MODULES, source_path
from tests.support.mutants.mutant import Mutant
from tests.support.mutants.planted import PLANTED, planted
from tests.support.mutants.runner import TIMEOUT_S, Job, Outcome, Pool, started, take_snapshot

ROOT = Path(__file__).parents[3]
SEED = 20250607
MIN_PLANTED = 25
MIN_CAUGHT = 0.95
"""Of the mutants drawn from each group of modules, of all drawn ones, and of these and the planted ones."""
PLANTED_BY_HAND = "planted"
_NUMBERS = " and ".join(str(number) for number in DRAWN_FROM.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; 0 if the tests are good enough."""
    args = _parse(argv)
    chosen = args.only or list(MODULES)
    with tempfile.TemporaryDirectory(prefix="mutants_") as scratch:
        snapshot = Path(scratch) / "snapshot"
        take_snapshot(ROOT, snapshot)
        sources = {module: (snapshot / source_path(module)).read_text(encoding="utf-8") for module in chosen}
        by_origin = {PLANTED_BY_HAND: planted(sources)}
        if not args.planted:
            by_origin |= draw_groups(sources, args.seed, args.num_drawn, by_origin[PLANTED_BY_HAND])
        mutants = [mutant for group in by_origin.values() for mutant in group]
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
    return report(by_origin, outcomes)


def draw_groups(
    sources: Mapping[str, str], seed: int, num_drawn: int | None = None, taken: Sequence[Mutant] = ()
) -> dict[str, list[Mutant]]:
    """The mutants drawn from each group of modules, under what is printed of where they come from.

    Args:
        sources: the modules to draw from; those left out leave their share to the rest of their group.
        seed: of the draw.
        num_drawn: from each group; None for the numbers in DRAWN_FROM.
        taken: not drawn again.
    """
    drawn = {}
    for modules, number in DRAWN_FROM.items():
        group = {module: sources[module] for module in modules if module in sources}
        if group:
            shared = number if num_drawn is None else num_drawn
            drawn[f"drawn from {', '.join(group)}"] = draw(group, shared, seed, [mutant.mutated for mutant in taken])
    return drawn


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.support.mutants", description=__doc__)
    parser.add_argument("--only", metavar="MODULE", action="append", choices=list(MODULES), help="repeatable")
    parser.add_argument("--seed", type=int, default=SEED, help="of the drawn mutants; %(default)s")
    parser.add_argument("--num-drawn", type=int, help=f"from each group of modules; {_NUMBERS}")
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


def report(by_origin: Mapping[str, Sequence[Mutant]], outcomes: Sequence[Outcome]) -> int:
    """Print what survived and the counts; 1 if a survivor has no reason or too few were caught.

    Args:
        by_origin: the mutants, under where they come from: PLANTED_BY_HAND, or what draw_groups says.
        outcomes: of all of them, in this order.
    """
    mutants = [mutant for group in by_origin.values() for mutant in group]
    by_module: dict[str, list[bool]] = {}
    unexplained = 0
    for mutant, outcome in zip(mutants, outcomes, strict=True):
        by_module.setdefault(mutant.module, []).append(outcome.caught)
        reason = EQUIVALENT.get(mutant.key)
        if outcome.caught and reason is not None:
            unexplained += 1
            print(f"\nlisted as equivalent, yet caught by {outcome.how}: {_describe(mutant)}")
        if not outcome.caught:
            unexplained += reason is None
            print(f"\nsurvivor: {_describe(mutant)}\n  {reason or 'NO REASON KNOWN: the tests miss it'}")
    print()
    for module, hits in by_module.items():
        print(f"{module:15} {sum(hits):4} of {len(hits):4} caught")
    every = [outcome.caught for outcome in outcomes]
    left = iter(every)
    drawn = {origin: [next(left) for _ in group] for origin, group in by_origin.items()}
    by_hand = drawn.pop(PLANTED_BY_HAND, [])
    judged = drawn | {"drawn": [hit for hits in drawn.values() for hit in hits], "planted and drawn": every}
    print()
    for name, hits in {PLANTED_BY_HAND: by_hand, **judged}.items():
        print(f"{name}: {sum(hits)} of {len(hits)} caught")
    enough = all(sum(hits) >= MIN_CAUGHT * len(hits) for hits in judged.values())
    if not enough:
        print(f"less than {MIN_CAUGHT:.0%} of these, the planted ones apart, is too few")
    if len(PLANTED) < MIN_PLANTED:
        print(f"{len(PLANTED)} planted faults are fewer than {MIN_PLANTED}")
    print(f"{sum(every)} of {len(every)} mutants caught")
    return 0 if enough and len(PLANTED) >= MIN_PLANTED and not unexplained else 1


if __name__ == "__main__":
    sys.exit(main())
