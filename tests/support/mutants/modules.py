"""Which modules are mutated, and the tests that have to notice."""

MODULES: dict[str, list[str]] = {
    "schedules": ["tests/dlm_core/test_schedules.py", "tests/dlm_core/test_schedules_chain.py"],
    "noise": ["tests/dlm_core/test_noise.py"],
    "blocks": ["tests/dlm_core/test_blocks.py"],
    "corruption": ["tests/dlm_core/test_corruption.py", "tests/dlm_core/test_corruption_counts.py"],
    "kernels": ["tests/dlm_core/test_kernels.py"],
    "masks": ["tests/dlm_core/test_masks.py"],
    "cross_entropy": [
        "tests/dlm_core/test_cross_entropy.py",
        "tests/dlm_core/test_head_bias.py",
        "tests/dlm_core/test_logits_loss.py",
    ],
    "objectives": [
        "tests/dlm_core/test_objectives.py",
        "tests/dlm_core/test_objectives_oracle.py",
        "tests/dlm_core/test_objectives_terms.py",
        "tests/dlm_core/test_objectives_weights.py",
    ],
    "variance": ["tests/dlm_core/test_variance.py", "tests/dlm_core/test_variance_clip.py"],
    "likelihood": [
        "tests/dlm_core/test_likelihood.py",
        "tests/dlm_core/test_likelihood_errors.py",
        "tests/dlm_core/test_likelihood_rows.py",
    ],
    "corpus_bound": ["tests/dlm_core/test_corpus_bound.py"],
    "ar_init": ["tests/dlm_core/test_ar_init.py"],
    "models/config": ["tests/dlm_core/test_model_config.py"],
    "models/rope": ["tests/dlm_core/test_rope.py"],
    "models/attention": [
        "tests/dlm_core/test_attention.py",
        "tests/dlm_core/test_attention_structured.py",
        "tests/dlm_core/test_kv_cache.py",
    ],
    "models/moe": ["tests/dlm_core/test_moe.py"],
    "models/router_losses": ["tests/dlm_core/test_router_losses.py"],
    "models/init": ["tests/dlm_core/test_init.py"],
    "models/transformer": [
        "tests/dlm_core/test_dit.py",
        "tests/dlm_core/test_block_pass.py",
        "tests/dlm_core/test_transformer.py",
    ],
}
"""A module of dlm_core -> the test files whose fast tests are run against each of its mutants."""

DRAWN_FROM: dict[tuple[str, ...], int] = {
    ("schedules", "corruption", "masks", "objectives", "likelihood"): 200,
    ("noise", "blocks", "kernels", "cross_entropy", "variance", "corpus_bound"): 65,
    (
        "models/config",
        "models/rope",
        "models/attention",
        "models/moe",
        "models/router_losses",
        "models/init",
        "models/transformer",
    ): 140,
}
"""Groups of modules -> how many random mutants are drawn from each: the mathematics, what it rests on, the models.

The faults of ar_init are planted only.
"""


def source_path(module: str) -> str:
    """The module's file, relative to the root of the repository."""
    return f"dlm_core/{module}.py"
