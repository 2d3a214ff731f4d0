"""What every public function of the core promises in its docstring: purpose, shapes, errors, source."""

import ast
import re
from pathlib import Path

import pytest

import dlm_core

CORE = Path(dlm_core.__file__).parent
MODULES = ["schedules", "kernels", "noise", "corruption", "blocks", "masks", "objectives", "cross_entropy", "variance"]
MODULES += ["likelihood", "answers", "answer_masks", "intervals", "corpus_bound", "ar_init", "upcycling"]
MODULES += [
    f"samplers/{name}"
    for name in ("blocks", "confident", "contexts", "guidance", "loop", "next_tokens", "padding", "planned")
]
MODULES += [f"samplers/{name}" for name in ("proposal", "quotas", "remask", "speculative")]
MODULES += [f"models/{name}" for name in ("attention", "config", "feed_forward", "init", "moe", "presets", "rope")]
MODULES += ["models/router_losses", "models/transformer"]

SOURCE = re.compile(
    r"(arXiv\s+|\()\d{4}\.\d{5}\b|Box and Muller, 1958|OOPSLA 2014"
    r"|(Biometrika|Biometrics Bull\.|Stat\. Assoc\.|Stat\. Med\.) \d+, \d{4}"
)

# Ours alone: bookkeeping around the formulas, with no paper to name.
_OWN = """
able_backends AnswerEstimate AnswerEstimate.mc_se AnswerMasks Answers Answers.offsets Answers.padded Answers.parts
Architecture Architecture.head_size Architecture.is_sparse Architecture.kv_heads Architecture.rotary_dim as_uniform Ask
Attend Attend.narrowed Attend.noisy_half AttentionMask AttentionMask.predicate AttentionMask.to block_length
BoundEstimate BoundEstimate.ppl_bound by_score Canvas Canvas.ask Canvas.device Canvas.draws Canvas.place Canvas.uniforms
Canvas.write check_losses check_score check_tokens compute_dtype Condition Condition.modulate ConfidenceLoss Context
Context.begin Context.check Context.finish Context.window Corrupted Corrupted.is_masked counts_at dense_mask
difference_interval Drawn error_of_difference estimate_bound exact_count_positions expected_initial_loss expert_scores
Experts Experts.forward experts_grouped experts_loop extend_hash first_of GradientSums GradientSums.of
GradientSums.variance hash_event hash_integer hash_permutation hash_uniform hash_words Head HeadLoss KVCache
KVCache.advance KVCache.append KVCache.replace logits_loss loss_output LossError LossOutput mask_noise_std mean_interval
ModelConfig ModelConfig.is_last_selective ModelConfig.num_active_params ModelConfig.num_params moment_sums
next_token_targets noise_positions num_blocks on_both_halves open_places Padding Padding.around Padding.seen Parts
Parts.by_size Pass per_token PiecewiseDensity PiecewiseDensity.bin_of PiecewiseDensity.sample Preset put RopeTables
Router Router.forward RouterLoss RouterTap RouterTap.close RouterTap.selection_bias RowEstimate RowEstimate.per_token
Rule Rule.turns sample sample_next_tokens Sampled Scoring Scoring.lengths sent_together shift_left stratified_counts
Stream t_bins Targets tiny token_cross_entropy tokens_per_expert tokens_per_expert_and_bin unigram_entropy
variance_of_sums WeightedTimes Weighting Weighting.is_bound Weighting.token_weight Whole Whole.begin Whole.finish
Whole.window why_not_grouped within without_pass
"""
OWN = set(_OWN.split())


def _public(module: str) -> list[tuple[str, ast.FunctionDef | ast.ClassDef, str]]:
    """(name, node, docstring) of every public function, class and method; a method may lean on its class."""
    found = []
    for node in ast.parse((CORE / f"{module}.py").read_text()).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        own = ast.get_docstring(node) or ""
        found.append((node.name, node, own))
        if isinstance(node, ast.ClassDef):  # whose methods may lean on the source that it names
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
            found += [(f"{node.name}.{method.name}", method, ast.get_docstring(method) or "") for method in methods]
    return found


PUBLIC = [(module, *entry) for module in MODULES for entry in _public(module)]
DOCS = {(module, name): doc for module, name, _, doc in PUBLIC}


def _names_source(module: str, name: str) -> bool:
    """Itself, or its class."""
    return any(SOURCE.search(DOCS[module, part]) for part in (name, name.split(".")[0]))


@pytest.mark.parametrize(("module", "name", "node", "doc"), PUBLIC, ids=[f"{m}.{n}" for m, n, *_ in PUBLIC])
def test_public_name_says_what_it_does_its_shapes_its_errors_and_its_source(module, name, node, doc):
    assert doc, "no docstring"
    first = doc.splitlines()[0]
    assert first.endswith((".", ":", "]", "}", ")")) or ":  " in first, f"the first line is cut: {first}"
    assert name in OWN or _names_source(module, name), "no source is named, and it is not listed as ours alone"
    if isinstance(node, ast.FunctionDef):
        hints = [a.annotation for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation] + [node.returns]
        bare = [
            ast.unparse(h) for h in hints if h is not None and re.search(r"(?<![\[\w])Tensor\b(?!,)", ast.unparse(h))
        ]
        assert not bare, f"tensors without a shape: {bare}"
    own_raises = [n for n in ast.walk(node) if isinstance(n, ast.Raise) and "ValueError" in ast.unparse(n)]
    if own_raises and isinstance(node, ast.FunctionDef):
        assert "ValueError" in doc, "it raises ValueError and doesn't say when"
    checks = [n for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"]
    if checks and any(isinstance(n, ast.Raise) for n in ast.walk(checks[0])):
        assert "ValueError" in doc, "its construction raises ValueError and the docstring doesn't say when"


def test_names_listed_as_ours_alone_are_those_that_name_no_source():
    assert {name for module, name, *_ in PUBLIC if not _names_source(module, name)} == OWN


def test_readme_names_only_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", (CORE / "README.md").read_text()))
    here = Path(__file__).parent
    files = [*here.glob("test_*.py"), *(here.parent / "pipeline").glob("test_*.py")]
    defined = {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    assert len(named) > 50
    assert not named - defined
