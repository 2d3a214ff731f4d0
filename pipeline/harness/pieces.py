"""Requests cut into pieces of work by what is in them alone.

Neither their order nor the workers change a piece.  A score in float32 depends in its last digits on what it was
computed together with, so what goes together must not.
"""

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from pipeline.inference.likelihood import Request

_FEW_BATCHES, _MANY_BATCHES = 2, 16
"""Of a piece whose last batch is full too, as where requests are of one row; and of others, so many that one that is
not hardly counts.  Few enough that there is work for all workers, and that they end together."""


def begins_with(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What a tokenizer puts before a text, as Llama's does with its <s>; most put nothing."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    return tuple(encoding.ids[:1]) if encoding.special_tokens_mask[0] else ()


def next_token_request(begin: Sequence[int], context: Sequence[int], answer: Sequence[int], mask_id: int) -> Request:
    """As the harness's own models ask one that predicts the next token.

    What its tokenizer begins a text with stands before the context, and nothing else does: the first token of a context
    is given.  Before an answer without a context stands the same, or the end of a text where there is none.
    """
    given = (*begin, *context)
    return Request(given[1:], tuple(answer), mask_id, before=given[0] if given else None)


def cut_requests(
    requests: Sequence[Request], num_copies: Callable[[Request], int], batch_rows: int
) -> list[list[Request]]:
    """Every request once, those of like length together, the most costly pieces first.

    ``num_copies``: rows of a request that go through the model, of which pieces hold whole batches.
    """
    pieces: list[list[Request]] = [[]]
    rows = 0
    for request in sorted(set(requests), key=_by_length):
        pieces[-1].append(request)
        rows += num_copies(request)
        if rows >= (_MANY_BATCHES if rows % batch_rows else _FEW_BATCHES) * batch_rows:
            pieces.append([])
            rows = 0
    if not pieces[-1]:
        pieces.pop()
    return sorted(pieces, key=lambda piece: -sum(num_copies(one) * _num_tokens(one) for one in piece))


def masked_copies(request: Request, num_masks: int, block_size: int) -> int:
    """Rows of a bound: each subset of what is masked together if that is short, else as many as are allowed."""
    size = min(len(request.answer), block_size or len(request.answer))
    return min(num_masks, 2 ** min(size, 30) - 1)


def one_copy(request: Request) -> int:
    """Of what is exact; and of a greedy answer, most of which end with the first row."""
    return 1


def _by_length(request: Request) -> tuple[object, ...]:
    return (
        len(request.answer),
        _num_tokens(request),
        request.mask_id,
        tuple(request.context),
        tuple(request.answer),
        -1 if request.before is None else request.before,
    )


def _num_tokens(request: Request) -> int:
    return len(request.context) + len(request.answer) + len(request.suffix)
