"""Faults written by hand in what reads weights of others."""

from tests.support.mutants.mutant import Planted

IMPORTS: tuple[Planted, ...] = (
    Planted(
        "pipeline/hf_directory",
        "the shift of an export forgotten",
        "**{name: getattr(training, name) for name in names},",
        '**{name: getattr(training, name) for name in names if name != "target_offset"},',
    ),
    Planted(
        "pipeline/hf_directory",
        "the tokenizer of an export forgotten",
        '{"tokenizer": manifest.inputs.get("tokenizer", ""), **manifest.stats}',
        '{**manifest.stats, "tokenizer": manifest.inputs.get("tokenizer", "")}',
    ),
    Planted(
        "pipeline/import_checkpoint/source",
        "weights of an export taken as they are",
        "if path.name != MANIFEST:",
        "if path.name == CONFIG:",
    ),
    Planted(
        "pipeline/import_checkpoint/source",
        "a manifest that identifies nothing",
        "[source.directory / MANIFEST] if source.manifest is not None else []",
        "[]",
    ),
    Planted(
        "pipeline/import_checkpoint/gguf_keys",
        "a key of tomorrow passed over",
        "if name not in neutral or keys[name] != neutral[name]:",
        "if name in neutral and keys[name] != neutral[name]:",
    ),
    Planted(
        "pipeline/import_checkpoint/gguf_keys",
        "positions stretched only where the kind of stretch is told",
        '"none" if factor is None else "linear"',
        '"none"',
    ),
    Planted(
        "pipeline/import_checkpoint/gguf_keys",
        "rows of queries and keys as they lie in a file that does not count the keys' heads",
        '"attention.head_count", "attention.head_count_kv")',
        '"attention.head_count")',
    ),
    Planted(
        "pipeline/import_checkpoint/gguf_tokenizer",
        "numbers of Qwen2 cut as those of Llama 3",
        "if cut in _LLAMA3 else r",
        "if cut in _LLAMA3 + _QWEN2 else r",
    ),
    Planted(
        "pipeline/import_checkpoint/dequantise",
        "chosen experts whose weights keep their sum",
        'if config.get("model_type") == "qwen3_moe" else {}',
        "if not config else {}",
    ),
    Planted(
        "pipeline/repack",
        "every part of a joined tensor from its beginning",
        "self.packed.ours, self.start + first, numel",
        "self.packed.ours, first, numel",
    ),
    Planted(
        "pipeline/repack",
        "files that may lack any number of tensors",
        "num_found + _MAX_MISSING",
        "num_promised + _MAX_MISSING",
    ),
)
