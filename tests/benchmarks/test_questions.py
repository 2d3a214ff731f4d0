"""Questions out of a text."""

import pytest

from benchmarks.questions import NUM_CHOICE_WORDS, NUM_CHOICES, NUM_CONTEXT_WORDS, make_questions

TEXT = "short\n" + "\n".join(" ".join(f"p{p}w{w}" for w in range(50)) for p in range(40))


def test_the_answer_is_what_follows_and_the_others_are_of_other_paragraphs() -> None:
    found = list(make_questions(TEXT, 40))
    for number, question in enumerate(found):
        following = " ".join(f"p{number}w{w}" for w in range(NUM_CONTEXT_WORDS, NUM_CONTEXT_WORDS + NUM_CHOICE_WORDS))
        assert question["context"].split() == [f"p{number}w{w}" for w in range(NUM_CONTEXT_WORDS)]
        assert question["choices"][question["answer"]] == f" {following}"
        assert len({choice.split("w")[0] for choice in question["choices"]}) == NUM_CHOICES
    assert {question["answer"] for question in found} == set(range(NUM_CHOICES))
    assert list(make_questions(TEXT, 40)) == found


def test_a_text_with_too_few_paragraphs_is_refused() -> None:
    with pytest.raises(ValueError, match="the text has 40 paragraphs of 44 words or more; 41 are needed"):
        list(make_questions(TEXT, 41))
