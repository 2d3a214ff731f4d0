"""Naive references for attention: masks entry by entry in the papers' words, and a stack small enough to perturb.

A mask is a list of rows, one a query, of True where the query may attend to the key.  The row [xt ; x0] has a noisy
half, then a clean one.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.support import reference

ATTENTION_STREAM = 8
"""The word of dlm_core.noise.Stream.ATTENTION, written out: a change of it changes every annealed run."""

Mask = list[list[bool]]


def table(places: Sequence, may_attend: Callable) -> Mask:
    """Ask ``may_attend`` of every pair of places."""
    return [[bool(may_attend(query, key)) for key in places] for query in places]


def causal(length: int) -> Mask:
    """A token sees itself and what comes before it."""
    return table(range(length), lambda query, key: key in range(query + 1))


def block_causal(length: int, block_size: int) -> Mask:
    """A token sees all of its own block and all of every block before it; the last block may be shorter."""
    blocks = [list(range(length))[start : start + block_size] for start in range(0, length, block_size)]
    mask = [[False] * length for _ in range(length)]
    for number, queries in enumerate(blocks):
        for query, key in itertools.product(queries, itertools.chain(*blocks[: number + 1])):
            mask[query][key] = True
    return mask


def annealed(length: int, ratio: float, *, noise_seed: int, step: int) -> Mask:
    """Causal, and of the future every entry whose hash lies below the ratio."""
    threshold, address = math.floor(ratio * 2**24), reference.hash_words(noise_seed, ATTENTION_STREAM, step)
    return table(
        range(length),
        lambda q, k: k <= q or reference.hash_words(address, q, k) >> 40 < threshold,
    )


def same_document(docs: Sequence[int]) -> Mask:
    """A token sees the tokens of its document."""
    return table(docs, lambda query, key: query == key)


def block_diffusion(seq_len: int, block_size: int) -> Mask:
    """BD3-LM: the union of block-diagonal, offset block-causal and block-causal, over (half, block) pairs."""
    row = list(itertools.chain.from_iterable([number] * block_size for number in range(seq_len // block_size)))
    places = [("noisy", block) for block in row] + [("clean", block) for block in row]

    def block_diagonal(query: tuple[str, int], key: tuple[str, int]) -> bool:
        return query == key

    def offset_block_causal(query: tuple[str, int], key: tuple[str, int]) -> bool:
        return query[0] == "noisy" and key[0] == "clean" and key[1] < query[1]

    def only_clean_block_causal(query: tuple[str, int], key: tuple[str, int]) -> bool:
        return query[0] == key[0] == "clean" and key[1] <= query[1]

    parts = (block_diagonal, offset_block_causal, only_clean_block_causal)
    return table(places, lambda query, key: any(part(query, key) for part in parts))


def block_diffusion_in_documents(docs: Sequence[int], block_size: int) -> Mask:
    """LLaDA2.0 eq. 3: case by case over the halves of query and key, all within one document."""
    places = [(half, place // block_size, doc) for half in ("noisy", "clean") for place, doc in enumerate(docs)]

    def may_attend(query: tuple[str, int, int], key: tuple[str, int, int]) -> bool:
        if query[2] != key[2]:
            return False
        match query[0], key[0]:
            case "noisy", "noisy":
                return query[1] == key[1]
            case "noisy", "clean":
                return query[1] > key[1]
            case "clean", "clean":
                return query[1] >= key[1]
        return False

    return table(places, may_attend)


def reach(mask: Mask, num_layers: int) -> Mask:
    """Which inputs a position can know of after some layers, each adding what it attends to to what it has."""
    length = len(mask)
    known = [{place} for place in range(length)]
    for _ in range(num_layers):
        known = [known[q].union(*(known[k] for k in range(length) if mask[q][k])) for q in range(length)]
    return [[k in known[q] for k in range(length)] for q in range(length)]


def parse_drawing(docstring: str) -> tuple[Mask, list[int], list[int], list[int]]:
    """The drawing after ``::``, the integers of its caption, and before which columns and rows a line is ruled."""
    mask, caption, columns, rows = [], [], [], []
    for line in docstring.split("::", 1)[1].strip("\n").splitlines():
        if not line.strip():
            break
        if set(line.strip()) == {"-", "+"}:
            rows.append(len(mask))
            continue
        drawn = re.match(r"\s*((?:[#.|] ?)+)", line)
        assert drawn, f"this line of the drawing has no entry: {line!r}"
        caption += [int(number) for number in re.findall(r"-?\d+", line[drawn.end() :])]
        cells = drawn.group(1).split()
        columns += [place for place, cell in enumerate(cells) if cell == "|" and place not in columns]
        mask.append([cell == "#" for cell in cells if cell != "|"])
    return mask, caption, columns, rows


class TinyStack:
    """Layers of masked softmax attention, each added to its input, then a head; random weights in float64."""

    def __init__(self, vocab_size: int, *, num_layers: int = 2, width: int = 8, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.vocab_size, self.num_layers = vocab_size, num_layers
        self._tokens = torch.randn(vocab_size, width, generator=draw, dtype=torch.float64)
        self._positions = torch.randn(64, width, generator=draw, dtype=torch.float64)
        self._matrices = torch.randn(num_layers, 4, width, width, generator=draw, dtype=torch.float64) / width**0.5

    def __call__(self, tokens: Tensor, attn_mask: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, L, V] for tokens [B, L], attn_mask [B or 1, L, L] and positions [L]."""
        x = self._tokens[tokens] + self._positions[positions]
        for query, key, value, out in self._matrices:
            scores = (x @ query) @ (x @ key).mT / x.shape[-1] ** 0.5
            weights = scores.masked_fill(~attn_mask, -torch.inf).softmax(dim=-1)
            x = x + torch.tanh(weights @ (x @ value) @ out)
        return x @ self._tokens.mT
