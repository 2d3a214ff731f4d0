"""The machinery of ``make mutants``: what is drawn, how a fault is put in, how the tests of one are judged."""

import ast
from pathlib import Path

import pytest

from tests.support.mutants.__main__ import PLANTED_BY_HAND, SEED, draw_groups, report
from tests.support.mutants.drawn import draw, sites_of
from tests.support.mutants.equivalent import EQUIVALENT
from tests.support.mutants.modules import DRAWN_FROM, MODULES, PLANTED_ONLY, source_path
from tests.support.mutants.mutant import Mutant
from tests.support.mutants.planted import PLANTED, Planted, planted
from tests.support.mutants.runner import Job, Outcome, started

ROOT = Path(__file__).parents[1]
SAMPLE_DRAWN = 60

SAMPLE = '''"""A module of 1 + 1 lines."""

from typing import Literal

Alias = int | str
LIMIT: int | None = 3


@decorated(cached=True)
def f(x: Float[Tensor, "2 L"], keep: Literal[1] = 1) -> Literal[0] | None:
    """Returns 2 * 3."""
    if not -1 < x[1:] <= LIMIT:
        raise ValueError(f"x is {x + 1}, above {LIMIT - 1}" + "é")
    y = torch.where(x > 0, x, 2.0)  # é
    y += keep
    return y.sum(dim=1) / 4


class C:
    """7."""

    size: int = 5
'''


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {module: (ROOT / source_path(module)).read_text(encoding="utf-8") for module in MODULES}


@pytest.fixture(scope="module")
def groups(sources: dict[str, str]) -> dict[str, list[Mutant]]:
    return draw_groups(sources, SEED)


def _faults(source: str) -> set[tuple[str, str]]:
    """Every alternative of every site, as the line before and after."""
    mutants = [Mutant("m", source, *edit) for edits in sites_of(source) for edit in edits]
    return {(mutant.before, mutant.after) for mutant in mutants}


def _constants(source: str) -> list[Mutant]:
    mutants = [Mutant("m", source, *edit) for edits in sites_of(source) for edit in edits]
    return [mutant for mutant in mutants if mutant.name == "constant changed"]


def test_drawn_mutants_parse_differ_and_are_distinct(sources: dict[str, str], groups: dict[str, list[Mutant]]):
    drawn = [mutant for group in groups.values() for mutant in group]
    shapes = {ast.dump(ast.parse(mutant.mutated)) for mutant in drawn}
    assert len(shapes) == len(drawn)
    assert not shapes & {ast.dump(ast.parse(source)) for source in sources.values()}


def test_drawn_groups_are_two_hundred_of_the_main_modules_and_a_number_of_each_other_group(
    groups: dict[str, list[Mutant]],
):
    main, below, models = groups.values()
    assert len(main) == 200
    assert {mutant.module for mutant in main} == {"schedules", "corruption", "masks", "objectives", "likelihood"}
    assert len(below) == list(DRAWN_FROM.values())[1]
    below_main = {"noise", "blocks", "kernels", "cross_entropy", "variance", "corpus_bound"}
    below_main |= {"answer_masks", "answers", "intervals"}
    assert {mutant.module for mutant in below} == below_main
    assert len(models) == list(DRAWN_FROM.values())[2]
    assert all(mutant.module.startswith("models/") for mutant in models)
    assert {module for modules in DRAWN_FROM for module in modules} == set(MODULES) - PLANTED_ONLY


def test_drawn_groups_of_fewer_modules_keep_their_number_and_repeat_nothing_taken(sources: dict[str, str]):
    some = {module: sources[module] for module in ("masks", "noise", "blocks", "ar_init")}
    everything = draw_groups(some, seed=1, num_drawn=30)
    assert {name: len(group) for name, group in everything.items()} == {
        "drawn from masks": 30,
        "drawn from noise, blocks": 30,
    }
    taken = [group[0] for group in everything.values()]
    for name, group in draw_groups(some, seed=1, num_drawn=29, taken=taken).items():
        assert not set(taken) & set(group), name
    assert draw_groups({"ar_init": sources["ar_init"]}, seed=1) == {}


def test_drawn_mutants_are_the_same_each_time_and_others_for_another_seed(sources: dict[str, str]):
    some = {module: sources[module] for module in ("schedules", "masks")}
    first, again, other = (draw(some, 20, seed) for seed in (1, 1, 2))
    assert first == again
    assert {mutant.key for mutant in first} != {mutant.key for mutant in other}


def test_drawn_mutants_are_spread_in_proportion_to_the_sites(sources: dict[str, str]):
    for modules in DRAWN_FROM:
        drawn = draw({module: sources[module] for module in modules}, SAMPLE_DRAWN, seed=1)
        sizes = {module: len(sites_of(sources[module])) for module in modules}
        assert len(drawn) == SAMPLE_DRAWN
        for module, size in sizes.items():
            share = SAMPLE_DRAWN * size / sum(sizes.values())
            assert abs(sum(mutant.module == module for mutant in drawn) - share) < 1


def test_draw_after_an_edit_elsewhere_keeps_the_faults_of_the_other_lines():
    edited = SAMPLE.replace("size: int = 5", "size: int = 5\n    other: int = 9")
    assert edited != SAMPLE
    kept = [mutant.key for mutant in draw({"m": edited}, 1000, seed=1) if "other" not in mutant.before]
    assert kept == [mutant.key for mutant in draw({"m": SAMPLE}, 1000, seed=1)]


def test_draw_does_not_repeat_what_is_taken():
    everything = draw({"m": SAMPLE}, 1000, seed=1)
    taken = [everything[0].mutated, everything[-1].mutated]
    assert draw({"m": SAMPLE}, 1000, seed=1, taken=taken) == everything[1:-1]


def test_sites_are_only_where_something_is_computed():
    # Not the docstrings' 1, 2, 3 and 7, the annotations' 2, 1 and 0, the decorator's True, the message's 1.
    touched = {(mutant.line, mutant.old) for mutant in _constants(SAMPLE)}
    assert touched == {(6, "3"), (10, "1"), (12, "1"), (14, "0"), (14, "2.0"), (16, "4"), (22, "5")}
    assert not any(before.startswith(("Alias", "raise", '"""', "@")) for before, _ in _faults(SAMPLE))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a = b + c", "a = (b - c)"),
        ("a = b + c", "a = c"),
        ("a = b * c", "a = (b / c)"),
        ("a = b * c", "a = (-(b * c))"),
        ("a = b // c", "a = (b / c)"),
        ("a = b & c", "a = (b | c)"),
        ("a = b ** c", "a = b"),
        ("a = b < c", "a = (b <= c)"),
        ("a = b < c", "a = (b >= c)"),
        ("a = b == c", "a = (b != c)"),
        ("a = b and c", "a = (b or c)"),
        ("a = b and c", "a = b"),
        ("a = not b", "a = b"),
        ("a = -b", "a = b"),
        ("a = 0", "a = 1"),
        ("a = 1", "a = 2"),
        ("a = 100.0", "a = 101.0"),
        ("a = True", "a = False"),
        ("a = b[c:]", "a = b[c + 1:]"),
        ("a = b[:c]", "a = b[:c - 1]"),
        ("a = torch.where(b, c, d)", "a = torch.where(b, d, c)"),
        ("a = b.sum(dim=1)", "a = b.sum(dim=0)"),
        ("a = b.sum(dim=-1)", "a = b.sum(dim=0)"),
        ("a = b.sum(dim=1)", "a = b.mean(dim=1)"),
        ("a = b.clamp(min=c)", "a = b"),
        ("a = b.clamp(min=c)", "a = b.clamp(max=c)"),
        ("for a in range(b): pass", "for a in range(b - 1): pass"),
        ("if a.any(): pass", "if (not a.any()): pass"),
        ("a *= b", "a /= b"),
        ("a = math.log1p(b)", "a = math.log(b)"),
    ],
)
def test_sites_of_a_line_hold_the_fault(before: str, after: str):
    assert (before, after) in _faults(before)


def test_modules_list_every_test_file_that_bears_their_name():
    for module, tests in MODULES.items():
        named = {f"tests/dlm_core/{path.name}" for path in (ROOT / "tests" / "dlm_core").glob(f"test_{module}*.py")}
        assert named <= set(tests), module


def test_mutant_changes_its_span_alone():
    source = "a = 'é'\nb = (\n    c\n    + d\n)\ne = 1\n"
    start = source.encode().index(b"c\n")
    mutant = Mutant("m", source, start, start + len(b"c\n    + d"), "c - d", "operator changed")
    assert mutant.mutated == "a = 'é'\nb = (\n    c - d\n)\ne = 1\n"
    assert (mutant.line, mutant.before, mutant.after) == (3, "c + d", "c - d")


def test_planted_faults_of_the_present_sources_parse_and_are_distinct(sources: dict[str, str]):
    mutants = planted(sources)
    assert len(mutants) == len(PLANTED) >= 25
    shapes = {ast.dump(ast.parse(mutant.mutated)) for mutant in mutants}
    assert len(shapes - {ast.dump(ast.parse(source)) for source in sources.values()}) == len(mutants)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("y", "z", "'y' occurs 0 times"), ("x", "z", "'x' occurs 2 times"), ("= x", "= x", "not a change of one line")],
)
def test_planted_fault_that_is_not_in_one_place_is_refused_by_name(old: str, new: str, said: str):
    with pytest.raises(ValueError, match=f"a lost sign.*{said}"):
        planted({"m": "x = x\n"}, (Planted("m", "a lost sign", old, new),))


def test_reasons_are_given_for_lines_that_exist(sources: dict[str, str]):
    for module, before, after in EQUIVALENT:
        assert before in " ".join(sources[module].split())
        assert before != after


MAIN, BELOW = "drawn from main", "drawn from below"
SIZES = {PLANTED_BY_HAND: 300, MAIN: 200, BELOW: 65}
UNKNOWN, KNOWN = Mutant("masks", "x = 1\n", 4, 5, "2", "constant changed"), next(iter(EQUIVALENT))


def _of_key(key: tuple[str, str, str]) -> Mutant:
    module, before, after = key
    return Mutant(module, before, 0, len(before), after, "known")


def _reported(missed: dict[str, int], sizes: dict[str, int] = SIZES, mutant: Mutant | None = None) -> int:
    """What the report of so many mutants says, of which so many of each origin survived, each for a known reason."""
    mutant = mutant or _of_key(KNOWN)
    spared = Mutant("masks", "x = 1\n", 4, 5, "0", "constant changed")
    by_origin = {
        origin: [mutant] * missed.get(origin, 0) + [spared] * (size - missed.get(origin, 0))
        for origin, size in sizes.items()
    }
    mutants = [one for group in by_origin.values() for one in group]
    return report(by_origin, [Outcome(one is spared, "", 1.0, "") for one in mutants])


@pytest.mark.parametrize(
    ("missed", "code"),
    [
        ({}, 0),
        ({MAIN: 10}, 0),
        ({MAIN: 10, BELOW: 3}, 0),
        ({MAIN: 11}, 1),  # 94.5 % of the 200, though 98 % of all
        ({BELOW: 4}, 1),  # 93.8 % of the 65
        ({PLANTED_BY_HAND: 28}, 0),
        ({PLANTED_BY_HAND: 29}, 1),  # 94.9 % of all
    ],
)
def test_report_is_bad_when_a_group_of_drawn_mutants_or_all_are_caught_too_rarely(missed: dict[str, int], code: int):
    assert _reported(missed) == code


def test_report_is_good_without_any_drawn_mutant():
    assert _reported({}, {PLANTED_BY_HAND: 3}) == 0


def test_report_is_bad_when_a_survivor_has_no_reason(capsys: pytest.CaptureFixture[str]):
    assert _reported({MAIN: 1}, mutant=UNKNOWN) == 1
    assert "survivor: dlm_core/masks.py:1 (constant changed)  x = 1  ->  x = 2\n  NO REASON" in capsys.readouterr().out


def test_report_is_bad_when_a_mutant_with_a_reason_is_caught(capsys: pytest.CaptureFixture[str]):
    assert report({MAIN: [_of_key(KNOWN)]}, [Outcome(True, "test_that_sees_it", 1.0, "")]) == 1
    assert "listed as equivalent, yet caught by test_that_sees_it" in capsys.readouterr().out


def test_report_ends_with_the_counts_of_planted_drawn_and_all(capsys: pytest.CaptureFixture[str]):
    _reported({PLANTED_BY_HAND: 1, MAIN: 2, BELOW: 3})
    *_, planted_line, main, below, drawn, both, last = capsys.readouterr().out.splitlines()
    assert planted_line == "planted: 299 of 300 caught"
    assert (main, below) == ("drawn from main: 198 of 200 caught", "drawn from below: 62 of 65 caught")
    assert drawn == "drawn: 260 of 265 caught"
    assert both == "planted and drawn: 559 of 565 caught"
    assert last == "559 of 565 mutants caught"


def test_runner_tells_caught_from_survived_and_never_runs_stale_code(tmp_path: Path):
    snapshot = tmp_path / "snapshot"
    (snapshot / "dlm_core").mkdir(parents=True)
    (snapshot / "tests").mkdir()
    (snapshot / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (snapshot / "dlm_core" / "__init__.py").touch()
    (snapshot / "dlm_core" / "toy.py").write_text("x = 1\n")
    (snapshot / "tests" / "test_toy.py").write_text(
        "from dlm_core.toy import x\n\ndef test_x_is_one():\n    while x == 5: pass\n    assert x == 1\n"
    )
    (snapshot / "tests" / "test_nothing.py").write_text("def test_nothing():\n    assert 1\n")
    sources = ["x = 1\n", "x = 2\n", "x = 1\n", "x = y\n", "x = 5\n"]
    with started(snapshot, tmp_path, num_workers=1, timeout_s=2.0) as pool:
        outcomes = list(pool.run_all([Job("dlm_core/toy.py", source, ["tests/test_toy.py"]) for source in sources]))
        assert [(outcome.caught, outcome.how) for outcome in outcomes] == [
            (False, ""),
            (True, "test_x_is_one"),
            (False, ""),
            (True, "tests/test_toy.py"),
            (True, "not done after 2 s"),
        ]
        with pytest.raises(RuntimeError, match=r"never imports dlm_core/toy\.py"):
            list(pool.run_all([Job("dlm_core/toy.py", "x = 1\n", ["tests/test_nothing.py"])]))
