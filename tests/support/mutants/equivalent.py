"""Mutants that no test can catch, each with the reason why nothing computed differs."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "likelihood",
        "drawn = _over_strata(losses, s.lengths[long][:, None], least=2)",
        "drawn = _over_strata(losses, s.lengths[long][:, None], least=1)",
    ): "a row of one token has a single mask and is enumerated, so that a long row has two tokens or more",
    (
        "models/attention",
        "penalty = torch.zeros_like(table, dtype=scores.dtype).masked_fill_(~table, -torch.inf)",
        "penalty = torch.ones_like(table, dtype=scores.dtype).masked_fill_(~table, -torch.inf)",
    ): "a softmax of scores that are all 1 higher",
    (
        "models/config",
        'total += a.d_model + (a.d_ff or 0) if a.activation == "gelu" else 0',
        'total += a.d_model + (a.d_ff or 1) if a.activation == "gelu" else 0',
    ): "d_ff is None where every layer has experts, and those are no gelu",
    (
        "models/config",
        "size = block_size or 0",
        "size = block_size or 1",
    ): "families without blocks do not read it",
    (
        "models/moe",
        'def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":',
        'def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = False) -> "Router":',
    ): "a linear layer has no children",
    (
        "models/rope",
        "if scaling.original_seq_len is None or scaling.low_factor is None or scaling.high_factor is None:",
        "if (scaling.original_seq_len is None and scaling.low_factor is None and (scaling.high_factor is None)):",
    ): "a scaling has all three or none",
    (
        "models/rope",
        "ramp = (numbers - first) / max(last - first, 1e-3)",
        "ramp = (numbers - first) / max(last - first, 0.002)",
    ): "whole numbers: a ramp without a length is a step either way",
    (
        "models/transformer",
        "if targets is None or weight is None:",
        "if (targets is None and weight is None):",
    ): "they come together, or are refused before",
    (
        "models/transformer",
        "if num_groups == 1 and not (has_halves and a.time_conditioning):",
        "if num_groups == 1 and not ((has_halves or a.time_conditioning)):",
    ): "the same vectors, position by position",
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
