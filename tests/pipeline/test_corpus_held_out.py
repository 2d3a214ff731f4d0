"""Sources that hold out a share of their own: all, none, and texts that stand on both sides."""

from pathlib import Path

import pytest

from pipeline.corpus.config import CorpusConfig, Source
from pipeline.errors import UserError
from tests.support.corpus_runs import TEXTS, corpus_config, jsonl, make_corpus, planned


def _sources(root: Path, kept: list[str], tested: list[str], **own: float) -> dict[str, dict]:
    found = {}
    for name, texts in (("train", kept), ("test", tested)):
        (root / f"{name}.jsonl").write_bytes(jsonl(texts))
        found[name] = {"paths": str(root / f"{name}.jsonl")} | ({"held_out_fraction": own[name]} if name in own else {})
    return found


def test_a_source_may_be_held_out_whole_and_another_trained_on_whole(tmp_path: Path) -> None:
    source = _sources(tmp_path, TEXTS[:25], TEXTS[25:], train=0.0, test=1.0)
    made = make_corpus(tmp_path, source, held_out_fraction=0.02)
    assert sorted(made.texts("train")) == sorted(TEXTS[:25])
    assert sorted(made.texts("held_out")) == sorted(TEXTS[25:])


def test_a_source_without_a_share_of_its_own_has_that_of_the_corpus(tmp_path: Path) -> None:
    both = _sources(tmp_path, TEXTS[:25], TEXTS[25:], test=1.0)
    made = make_corpus(tmp_path, both, held_out_fraction=0.3)
    alone = make_corpus(tmp_path, {"train": both["train"]}, held_out_fraction=0.3)
    assert 0 < len(alone.texts("held_out")) < 25
    assert sorted(made.texts("train")) == sorted(alone.texts("train"))


@pytest.mark.parametrize("drop_duplicates", [True, False])
def test_a_text_that_is_held_out_elsewhere_is_not_trained_on(tmp_path: Path, drop_duplicates: bool) -> None:
    source = _sources(tmp_path, [*TEXTS[:20], TEXTS[3], *TEXTS[30:32]], TEXTS[30:], train=0.0, test=1.0)
    made = make_corpus(tmp_path, source, held_out_fraction=0.02, filters={"drop_duplicates": drop_duplicates})
    kept = TEXTS[:20] if drop_duplicates else [*TEXTS[:20], TEXTS[3]]
    assert sorted(made.texts("train")) == sorted(kept)
    assert sorted(made.texts("held_out")) == sorted(TEXTS[30:])
    dropped = made.stats["sources"]["train"]["dropped"]
    assert dropped == {"held out elsewhere": 2} | ({"duplicate": 1} if drop_duplicates else {})
    assert made.stats["train_docs"] == len(kept)


def test_the_share_of_a_source_is_identity_of_its_shards(tmp_path: Path) -> None:
    def identities(**own: float) -> list[dict]:
        source = _sources(tmp_path, TEXTS[:25], TEXTS[25:], **own)
        return [shard["identity"] for shard in planned(source) if shard["source"] == "train"]

    assert identities(test=1.0) == identities(test=0.5)
    assert identities(train=0.1) != identities(train=0.2)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_share_outside_of_0_and_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"held_out_fraction is .*; it must lie in \[0, 1\]"):
        Source(("x",), held_out_fraction=fraction)


@pytest.mark.parametrize(
    ("own", "settings", "message"),
    [
        ((1.0, 1.0), {}, "every source has held_out_fraction 1: nothing is left for training"),
        ((0.0, 0.0), {}, "every source has held_out_fraction 0: nothing is left for evaluation"),
        ((0.0, 1.0), {"held_out_fraction": 0.5}, r"held_out_fraction is 0\.5 and does nothing, .*, 0\.02 is as good"),
    ],
)
def test_shares_that_leave_nothing_or_do_nothing_are_refused(own, settings, message) -> None:
    source = {name: Source((name,), held_out_fraction=share) for name, share in zip("ab", own, strict=True)}
    with pytest.raises(ValueError, match=message):
        CorpusConfig(source=source, **settings)


def test_a_source_that_is_all_held_out_may_be_empty_of_training_text_and_another_may_not(tmp_path: Path) -> None:
    source = _sources(tmp_path, TEXTS[30:], TEXTS[25:], train=0.0, test=1.0)
    (tmp_path / "more.jsonl").write_bytes(jsonl(TEXTS[:20]))
    with pytest.raises(UserError, match=r"corpus.source.train has no document left .*10 held out elsewhere"):
        make_corpus(tmp_path, {**source, "more": str(tmp_path / "more.jsonl")})


def test_the_command_line_sets_the_share_of_a_source() -> None:
    config = corpus_config({"a": {"paths": "a", "held_out_fraction": 1}, "b": {"paths": "b"}})
    assert (config.source["a"].is_held_out, config.source["b"].is_held_out) == (True, False)
