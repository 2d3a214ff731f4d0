"""How a GGUF file says that text is cut before its merges are applied.

The file has a name for it, ``tokenizer.ggml.pre``.  transformers takes the cut of GPT-2 for each name that its version
doesn't know, which gives other ids without a word; so the names are read here.  Names and patterns: src/llama-vocab.cpp
of github.com/ggml-org/llama.cpp.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.gguf_header import INSTEAD

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MODEL, _CUT = "tokenizer.ggml.model", "tokenizer.ggml.pre"
_BYTES = "gpt2"
"""Byte pairs over bytes, the one kind of which the cut is all that the file leaves to the reader."""
_AS_GPT2 = ("gpt-2", "mpt", "olmo")
_DIGITS_ALONE = ("codeshell", "command-r", "exaone", "refact", "smollm", "starcoder")
"""Each digit by itself, and what is between them as GPT-2 does."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = ("llama-bpe", "llama-v3", "llama3")
"""A piece that is a token as it stands is taken whole, whatever merges would make of it."""
_QWEN2 = ("deepseek-r1-qwen", "qwen2")
_KNOWN = (*_AS_GPT2, *_DIGITS_ALONE, *_LLAMA3, *_QWEN2)


def why_no_tokenizer(keys: Mapping[str, Any]) -> str:
    """What keeps the file's tokenizer from being passed on; empty if nothing does."""
    model, cut = keys.get(_MODEL), keys.get(_CUT)
    if model == _BYTES and cut in _KNOWN:
        return ""
    reason = (
        f"{_MODEL} is {model!r}" if model != _BYTES else f"{_CUT} is {cut!r}, of which no cut of text is known here"
    )
    return (
        f"the tokenizer of the file is not passed on: {reason}; passed on are those of {_MODEL} {_BYTES!r} with {_CUT} "
        f"{', '.join(sorted(_KNOWN))}. {INSTEAD}"
    )


def set_cut(tokenizer: "Tokenizer", keys: Mapping[str, Any]) -> None:
    """Let a tokenizer cut text as the file says; for files that ``why_no_tokenizer`` lets pass."""
    from tokenizers import Regex, pre_tokenizers

    cut = keys[_CUT]
    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if cut in _AS_GPT2:
        tokenizer.pre_tokenizer = as_gpt2
    elif cut in _DIGITS_ALONE:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_gpt2])
    else:
        pattern = _WORDS % (r"\p{N}{1,3}" if cut in _LLAMA3 else r"\p{N}")
        pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    if cut in _LLAMA3:
        tokenizer.model.ignore_merges = True
