"""Text to rows as scripts on Hugging Face datasets do it: transformers' run_clm, MDLM's dataloader.

Documents are tokenized by ``map``, closed by their end token, concatenated and cut by a second ``map``.  What those
scripts carry along and masked diffusion doesn't need is left out: attention masks, labels, a copy by save_to_disk.
"""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = "input_ids"


def run(text: str, tokenizer_file: str, end_token: str, seq_len: str, num_proc: str, out: str) -> None:
    """Leave the rows in the cache of ``datasets`` below ``out``, and tokenized.json, rows.json with its files."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token=end_token)
    end, length = tokenizer.convert_tokens_to_ids(end_token), int(seq_len)
    documents: Any = datasets.load_dataset("json", data_files=text, split="train", cache_dir=out)

    def tokenize(examples: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(
            examples["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )
        return {TOKENS: [[*ids, end] for ids in encoded[TOKENS]]}

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        flat = list(chain(*examples[TOKENS]))
        whole = len(flat) // length * length
        return {TOKENS: [flat[start : start + length] for start in range(0, whole, length)]}

    tokenized = documents.map(tokenize, batched=True, num_proc=int(num_proc), remove_columns=documents.column_names)
    rows = tokenized.map(group_texts, batched=True, num_proc=int(num_proc))
    for name, dataset in (("tokenized", tokenized), ("rows", rows)):
        (Path(out) / f"{name}.json").write_text(json.dumps([file["filename"] for file in dataset.cache_files]))


def read_lists(out: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Flat ids and length of each list of a dataset that ``run`` left."""
    import datasets

    files = json.loads((out / f"{name}.json").read_text())
    ids: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for file in files:
        for lists in datasets.Dataset.from_file(file).data.column(TOKENS).chunks:
            ids.append(lists.flatten().to_numpy())
            lengths.append(np.diff(lists.offsets.to_numpy()))
    return np.concatenate(ids), np.concatenate(lengths)
