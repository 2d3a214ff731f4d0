"""Run in a process of its own: what transformers makes of exported directories.

python -m tests.support.prove_exports JOBS ANSWERS   # JSON: a list of {folder, weights, family, dtype, texts}
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any


def answer(job: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Difference of the logits, what the code of the model card prints, and ids of texts by the tokenizer."""
    from pipeline.export.prove import prove_logits

    found = prove_logits(job["folder"], job["weights"], job["family"], job["dtype"], scratch)
    (code,) = re.findall(r"```python\n(.*?)```", (Path(job["folder"]) / "README.md").read_text(), re.DOTALL)
    os.chdir(job["folder"])
    printed = io.StringIO()
    scope: dict[str, Any] = {}
    with contextlib.redirect_stdout(printed):
        exec(code, scope)
    loaded, model = scope["tokenizer"], scope["model"].float()  # in which a prompt gives the same beside another one
    batch = loaded(["the token learns", "the"], padding=True, return_tensors="pt")
    alone = loaded(["the"], padding=True, return_tensors="pt")
    ids = [loaded(text, add_special_tokens=False)["input_ids"] for text in job["texts"]]
    return {
        **found,
        "printed": printed.getvalue(),
        "ids": ids,
        "texts": [loaded.decode(one) for one in ids],
        "special": [loaded.mask_token_id, loaded.eos_token_id, loaded.pad_token_id],
        "second mask": batch.attention_mask[1].tolist(),
        "new in a batch": model.generate(**batch, max_new_tokens=4)[1, batch.input_ids.shape[1] :].tolist(),
        "new alone": model.generate(**alone, max_new_tokens=4)[0, alone.input_ids.shape[1] :].tolist(),
        "out": scope["out"].tolist(),
        "prompt": scope["prompt"].tolist(),
    }


def main(jobs: Path, answers: Path) -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, job in json.loads(jobs.read_text()).items():
            try:
                found[name] = answer(job, scratch)
            except Exception as error:  # noqa: BLE001 - told by name, and the next one asked
                found[name] = {"error": f"{type(error).__name__}: {error}"}
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:]))
