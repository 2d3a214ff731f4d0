"""Run in a process of its own, without this repository: what transformers makes of exported directories.

python open_exports.py ROOT OUT   # every folder of ROOT; reports go to OUT by torch.save
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM


def _load(kind: Any, folder: Path, **options: Any) -> Any:
    return kind.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)


def _problems(info: dict[str, Any]) -> list[str]:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return [f"{kind}: {sorted(map(str, info[kind]))}" for kind in kinds if info.get(kind)]


@torch.no_grad()
def report(folder: Path, again: Path, xt: torch.Tensor) -> dict[str, Any]:
    """Logits of tokens [B, L] in several ways of loading and masking, and some generated text."""
    model, info = _load(AutoModelForCausalLM, folder, dtype=torch.float32)
    model.eval()
    found: dict[str, Any] = {"version": transformers.__version__, "class": type(model).__name__}
    found |= {"problems": _problems(info), "num_params": sum(p.numel() for p in model.parameters())}
    found["logits"] = model(xt).logits
    padded = torch.cat([torch.full((len(xt), 3), 1), xt], dim=1)
    is_token = torch.ones_like(padded)
    is_token[:, :3] = 0
    found["padded"] = model(padded, attention_mask=is_token).logits[:, 3:]
    positions = (is_token.cumsum(1) - 1).clamp(min=0)
    found["positions"] = model(padded, attention_mask=is_token, position_ids=positions).logits[:, 3:]
    causal = torch.ones(xt.shape[1], xt.shape[1], dtype=torch.bool).tril().expand(len(xt), 1, -1, -1)
    found["causal"] = model(xt, attention_mask=causal).logits
    found["causal added"] = model(xt, attention_mask=torch.zeros(causal.shape).masked_fill(~causal, -torch.inf)).logits

    base, info = _load(AutoModel, folder, dtype=torch.float32)
    found |= {"base class": type(base).__name__, "base problems": _problems(info)}
    base_out = base.eval()(xt)
    found["base"] = base_out.logits if hasattr(base_out, "logits") else model.lm_head(base_out.last_hidden_state)

    half, _ = _load(AutoModelForCausalLM, folder, dtype=torch.bfloat16)
    found["half logits"] = half.eval()(xt).logits
    found["half dtypes"] = {name: str(tensor.dtype) for name, tensor in half.state_dict().items()}

    model.save_pretrained(again)
    found["saved files"] = sorted(path.name for path in again.iterdir())
    found["saved config"] = json.loads((again / "config.json").read_text())
    back, info = _load(AutoModelForCausalLM, again, dtype=torch.float32)
    found |= {"back problems": _problems(info), "back": back.eval()(xt).logits}

    fresh = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    found["drawn"] = {name: float(p.std()) for name, p in fresh.named_parameters() if p.ndim > 1}

    found["greedy"] = model.generate(xt, max_new_tokens=10)
    found["greedy again"] = model.diffusion_generate(xt, max_new_tokens=10)
    found["greedy padded"] = model.generate(padded, is_token, max_new_tokens=10)[:, 3:]
    options = {"max_new_tokens": 10, "temperature": 1.0, "steps": 5}
    found["drawn 7"] = model.generate(xt, seed=7, **options)
    found["drawn 7 again"] = model.generate(xt, seed=7, **options)
    found["drawn 8"] = model.generate(xt, seed=8, **options)
    return found


def main() -> None:
    root, out = map(Path, sys.argv[1:])
    xt = torch.load(root / "xt.pt")
    names = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    torch.save({name: report(root / name, out.parent / f"again-{name}", xt) for name in names}, out)


if __name__ == "__main__":
    main()
