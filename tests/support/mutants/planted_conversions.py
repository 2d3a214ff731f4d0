"""Faults written by hand in what writes weights for others, and in the code that is written beside them."""

from tests.support.mutants.mutant import Planted

CONVERSIONS: tuple[Planted, ...] = (
    Planted(
        "pipeline/export/fit",
        "a shifted model taken for one that predicts in place",
        "if model.target_offset != wanted:",
        "if model.target_offset < wanted:",
    ),
    Planted(
        "pipeline/export/fit",
        "a model of blocks taken for one of whole rows",
        "if model.block_size and family not in IN_BLOCKS:",
        "if model.block_size and family in IN_BLOCKS:",
    ),
    Planted(
        "pipeline/export/tokenizer_files",
        "tokens of config.json over those of a checkpoint's own settings",
        "settings = found",
        "settings = found | _special_tokens(tokenizer, source.special)",
    ),
    Planted(
        "pipeline/export/hf/modeling_llada",
        "gate and up in each other's place",
        "F.silu(self.ff_proj(normed)) * self.up_proj(normed)",
        "self.ff_proj(normed) * F.silu(self.up_proj(normed))",
    ),
    Planted(
        "pipeline/export/hf/modeling_llada",
        "the epsilon of a norm left to the library",
        "nn.RMSNorm(config.d_model, eps=config.rms_norm_eps)",
        "nn.RMSNorm(config.d_model)",
    ),
    Planted(
        "pipeline/export/hf/modeling_llada",
        "the tied head read past its module",
        "(parts.ff_out or parts.wte)(x)",
        "parts.ff_out(x) if parts.ff_out else F.linear(x, parts.wte.weight)",
    ),
    Planted(
        "pipeline/export/hf/modeling_dream", "Dream without its shift", "predicts_next = True", "predicts_next = False"
    ),
    Planted(
        "pipeline/export/hf/modeling_lladamoe",
        "weights of the chosen experts that sum to 1",
        "mix_experts(self.experts, tokens, expert_ids, weights)",
        "mix_experts(self.experts, tokens, expert_ids, weights / weights.sum(-1, keepdim=True))",
    ),
    Planted(
        "pipeline/export/hf/modeling_llada2_moe",
        "weights of the chosen experts that do not sum to 1",
        "if self.top_k > 1:",
        "if self.top_k < 1:",
    ),
    Planted(
        "pipeline/export/hf/modeling_llada2_moe",
        "the bias of the choice in the weights",
        "weights = scores.gather(1, expert_ids)",
        "weights = choice.gather(1, expert_ids)",
    ),
    Planted(
        "pipeline/export/hf/diffusion_modules",
        "the rotary base of other models",
        "frequency = base ** (-torch",
        "frequency = 10000.0 ** (-torch",
    ),
    Planted(
        "pipeline/hf_config",
        "the mask of the tokenizer, not of the model",
        "to_json(replace(special, mask_token_id=record.model.mask_token_id))",
        "to_json(special)",
    ),
    Planted("pipeline/tensor_files", "ties rounded up", "0x7FFF + (upper & 1)", "0x8000"),
    Planted(
        "pipeline/tensor_files",
        "the size of the file that has the name by now",
        "os.fstat(opened).st_size",
        "os.stat(path).st_size",
    ),
)
