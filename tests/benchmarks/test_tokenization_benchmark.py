"""The benchmark of tokenization: both sides end with the same tokens in the same rows, or nothing is reported."""

import json
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks import tokenization, tokenization_ours, tokenization_peers
from benchmarks.command import Options, RefusedError
from benchmarks.tokenization import DATASETS, OURS, Prepared
from benchmarks.tokenization_ours import Commit, Output
from pipeline.corpus.config import CorpusConfig
from pipeline.data.special_tokens import EOS_TOKEN

NUM_DOCS = 400
TINY = replace(
    tokenization.QUICK,
    text_bytes=80_000,
    shard_bytes=60_000,
    part_bytes=60_000,
    part_shard_bytes=10_000,
    train_bytes=40_000,
    vocab_size=400,
    seq_len=64,
)


def _write_documents(folder: Path) -> Path:
    folder.mkdir()
    for number in range(NUM_DOCS):
        special = EOS_TOKEN if number % 50 == 0 else ""
        text = f"{number}. It's é\t日本 {number**5}\r\n" * (1 + number % 17)
        (folder / f"{number}.txt").write_bytes((text + special).encode())
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Prepared:
    root = tmp_path_factory.mktemp("prepared")
    return tokenization.prepare(TINY, (_write_documents(root / "files"),), root)


def _documents(given: Prepared) -> list[str]:
    return [json.loads(line)["text"] for line in given.whole.path.read_bytes().splitlines()]


@dataclass(frozen=True)
class Done:
    """Both sides, run."""

    theirs: Path
    ours: Output


@pytest.fixture(scope="module")
def done(given, tmp_path_factory) -> Done:
    root = tmp_path_factory.mktemp("sides")
    sides = tokenization._sides(TINY, given)
    costs = [sides[name](root / name) for name in (DATASETS, OURS)]
    assert all(cost.cpu_s > 0 and cost.wall_s > 0 for cost in costs)
    return Done(root / DATASETS, tokenization_ours.read_output(root / OURS))


def test_sizes_are_those_that_are_asked_for():
    size = tokenization.FULL
    assert size.text_bytes >= size.part_bytes >= 60e6
    assert size.shard_bytes == CorpusConfig().shard_bytes
    assert 16_000 <= size.vocab_size <= 32_768
    assert (size.seq_len, size.num_workers) == (1024, 2)
    assert size.num_rounds >= 3
    assert size.part_bytes / size.part_shard_bytes >= 8


def test_text_is_the_documents_that_spell_no_special_token(given):
    documents = _documents(given)
    assert len(documents) == given.whole.num_docs > 200
    assert sum(len(text.encode()) for text in documents) == given.whole.num_bytes
    assert not any(EOS_TOKEN in text for text in documents)
    assert TINY.part_bytes <= given.part.num_bytes < given.whole.num_bytes
    assert given.whole.path.read_bytes().startswith(given.part.path.read_bytes())
    assert Tokenizer.from_file(str(given.tokenizer)).get_vocab_size() == TINY.vocab_size


@pytest.mark.timeout(180)
def test_peers_tokenize_close_and_cut_documents(given, done):
    tokenizer = Tokenizer.from_file(str(given.tokenizer))
    end = tokenizer.token_to_id(EOS_TOKEN)
    expected = [[*tokenizer.encode(text, add_special_tokens=False).ids, end] for text in _documents(given)]
    ids, lengths = tokenization_peers.read_lists(done.theirs, "tokenized")
    assert lengths.tolist() == [len(document) for document in expected]
    assert ids.tolist() == list(chain.from_iterable(expected))
    rows, row_lengths = tokenization_peers.read_lists(done.theirs, "rows")
    halves = np.array_split(np.arange(len(expected)), TINY.num_workers)
    cut: list[int] = []
    for half in halves:  # each process has one batch, which loses its end
        flat = list(chain.from_iterable(expected[number] for number in half))
        cut += flat[: len(flat) // TINY.seq_len * TINY.seq_len]
    assert set(row_lengths.tolist()) == {TINY.seq_len}
    assert rows.tolist() == cut


@pytest.mark.timeout(180)
def test_both_sides_have_the_same_tokens(given, done):
    num_tokens = tokenization.check_agreement(done.theirs, done.ours, TINY.seq_len)
    assert num_tokens == done.ours.train.num_tokens + done.ours.held_out.num_tokens
    assert len(done.ours.train.doc_lengths) + len(done.ours.held_out.doc_lengths) == given.whole.num_docs
    assert done.ours.num_rows >= done.ours.train.num_tokens / TINY.seq_len
    assert done.ours.backends == {"tokenizers: asked for": len(done.ours.commits)}
    assert sum(commit.tokens for commit in done.ours.commits) == num_tokens
    assert done.ours.commits == sorted(done.ours.commits, key=lambda commit: commit.at_s)


@pytest.mark.timeout(180)
def test_sides_that_differ_are_refused(done):
    train = done.ours.train
    changed = replace(train, pieces=(train.pieces[0] ^ 1, *train.pieces[1:]))
    with pytest.raises(RefusedError, match=r"document \d+ has other tokens with datasets than with ours"):
        tokenization.check_agreement(done.theirs, replace(done.ours, train=changed), TINY.seq_len)
    shorter = replace(train, doc_starts=train.doc_starts[:-1])
    with pytest.raises(RefusedError, match=r"document \d+ has other tokens"):
        tokenization.check_agreement(done.theirs, replace(done.ours, train=shorter), TINY.seq_len)
    longer = replace(train, doc_starts=np.append(train.doc_starts, train.doc_starts[-1]))
    with pytest.raises(RefusedError, match="ours has more documents"):
        tokenization.check_agreement(done.theirs, replace(done.ours, train=longer), TINY.seq_len)
    with pytest.raises(RefusedError, match="our rows are not our training documents"):
        tokenization.check_agreement(done.theirs, replace(done.ours, rows=done.ours.rows[1:]), TINY.seq_len)
    with pytest.raises(RefusedError, match="not its documents in rows of 65"):
        tokenization.check_agreement(done.theirs, done.ours, TINY.seq_len + 1)


def test_rate_of_a_stage_counts_from_the_commit_by_which_every_worker_has_had_a_shard():
    alone = [Commit(at_s=10.0 + number, tokens=100) for number in range(8)]
    pairs = [Commit(at_s=10.0 + number // 2, tokens=100) for number in range(8)]
    assert tokenization.tokens_per_s(alone, 1) == 100
    assert tokenization.tokens_per_s(pairs, 2) == 200


def test_fast_backend_is_a_side_only_where_it_is_installed(given, monkeypatch):
    names = {}
    for is_there in (True, False):
        monkeypatch.setattr(tokenization.importlib.util, "find_spec", lambda name, found=is_there: found or None)
        names[is_there] = set(tokenization._sides(TINY, given))
    assert names[True] - names[False] == {tokenization.OURS_FAST}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_has_every_ratio(monkeypatch, tmp_path):
    monkeypatch.setattr(tokenization, "QUICK", TINY)
    measured = tokenization.measure(Options(quick=True, text=(_write_documents(tmp_path / "files"),)))
    has_fast = tokenization.OURS_FAST in measured.figures["cpu_s"]
    assert measured.ratios.keys() == {"datasets", "workers"} | ({"fast"} if has_fast else set())
    assert all(ratio > 0 for ratio in measured.ratios.values())
    assert ("left out" in measured.table) == (not has_fast)
    assert measured.figures["stage_tokens_per_s"].keys() == {1, 2}
    json.dumps(measured.figures)
