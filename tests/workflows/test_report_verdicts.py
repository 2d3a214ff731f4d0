"""What the report says in words of a bound: against the unigram entropy, and against xz."""

import pytest

from workflows.report.sections import unigram_verdict, xz_verdict


@pytest.mark.parametrize(
    ("bound", "xz", "mc_se", "said", "not_said"),
    [
        (1.9, 1.7, 0.01, "behind xz -9 by 0.2000", "within"),
        (1.6, 1.7, 0.01, "ahead of xz -9 by 0.1000", "within"),
        (1.71, 1.7, 0.01, "against 1.7000, within twice the mc_se): xz -9 is", "ahead"),
        (1.69, 1.7, 0.01, "against 1.7000, within twice the mc_se); the size", "behind"),
    ],
)
def test_xz_verdict_follows_the_numbers(bound: float, xz: float, mc_se: float, said: str, not_said: str):
    verdict = xz_verdict({"bpb_bound": bound, "xz_bpb": xz, "bpb_bound_mc_se": mc_se})
    assert said in verdict
    assert not_said not in verdict


def test_unigram_verdict_follows_the_numbers():
    assert "0.5000 nats/token below" in unigram_verdict({"unigram_entropy": 6.0, "nelbo": 5.5})
    assert "nothing is shown to be learnt" in unigram_verdict({"unigram_entropy": 6.0, "nelbo": 6.5})
