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
}
"""A module of dlm_core -> the test files whose fast tests are run against each of its mutants."""

DRAWN_FROM: dict[tuple[str, ...], int] = {
    ("schedules", "corruption", "masks", "objectives", "likelihood"): 200,
    ("noise", "blocks", "kernels", "cross_entropy", "variance", "corpus_bound"): 65,
}
"""Groups of modules -> how many random mutants are drawn from each: the five main modules, and what they rest on.

The faults of ar_init are planted only.
"""


def source_path(module: str) -> str:
    """The module's file, relative to the root of the repository."""
    return f"dlm_core/{module}.py"
