"""From a context and what may follow it to token ids, whoever asks."""

from collections.abc import Callable


def encode_pair(encode: Callable[[str], list[int]], context: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of an answer to it.

    Both are encoded as one text, as texts are in training, and the answer's are those behind the context's; blanks at
    the end of the context go to the answer.  So lm-evaluation-harness has them, but for a token that would hold the end
    of one and the beginning of the other: each is then encoded by itself here, where the harness's own models score a
    part of the answer for all of it.
    """
    kept = context.rstrip()
    context, answer = kept, context[len(kept) :] + answer
    before, both = encode(context), encode(context + answer)
    return before, both[len(before) :] if both[: len(before)] == before else encode(answer)
