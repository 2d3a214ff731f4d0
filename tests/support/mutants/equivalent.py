"""Mutants that no test can catch, each with the reason why nothing computed differs."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "likelihood",
        "drawn = _over_strata(losses, s.lengths[long][:, None], least=2)",
        "drawn = _over_strata(losses, s.lengths[long][:, None], least=1)",
    ): "a row of one token has a single mask and is enumerated, so that a long row has two tokens or more",
    (
        "noise",
        "return radius * torch.cos(2.0 * math.pi * hash_uniform(*words, 1))",
        "return radius * torch.cos((-(2.0 * math.pi * hash_uniform(*words, 1))))",
    ): "the cosine is even",
    (
        "schedules",
        "return torch.sin(math.pi * t / 2) ** 2 / (1.0 + torch.sin(math.pi * (1.0 - t) / 2))",
        "return torch.sin((-(math.pi * t)) / 2) ** 2 / (1.0 + torch.sin(math.pi * (1.0 - t) / 2))",
    ): "the sine is odd, and its square even",
}
"""(module, text of the line before, text after) -> the reason."""
