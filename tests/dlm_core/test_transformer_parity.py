"""The denoiser against transformers' Llama and Qwen3 made bidirectional: tiny random weights, offline."""

import pytest
import torch

from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.transformer import Denoiser

LOGITS_ATOL = 1e-5  # float32 logits of order 1 from two orders of summation


def _bidirectional_peer(config: ModelConfig):
    """Qwen3 is Llama with normalised queries and keys."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    a = config.architecture
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": a.d_model,
        "intermediate_size": a.d_ff,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_heads,
        "head_dim": a.head_dim,
        "rms_norm_eps": a.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": a.rope_base},
        "tie_word_embeddings": True,
        "attn_implementation": "eager",
    }
    peer = Qwen3ForCausalLM(Qwen3Config(**values)) if a.qk_norm else LlamaForCausalLM(LlamaConfig(**values))
    for layer in peer.model.layers:
        layer.self_attn.is_causal = False
    return peer.eval()


def _peer_state(model: Denoiser) -> dict[str, torch.Tensor]:
    """Our weights under their names, the fused matrices split."""
    state = {
        "model.embed_tokens.weight": model.embedding.weight,
        "lm_head.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
    }
    for index, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv.weight.chunk(3)
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        layer = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attention.out.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.feed_forward.down.weight,
            "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.feed_forward_norm.weight,
        }
        if block.attention.q_norm.state_dict():
            layer |= {"self_attn.q_norm": block.attention.q_norm.weight}
            layer |= {"self_attn.k_norm": block.attention.k_norm.weight}
        state |= {f"model.layers.{index}.{name}.weight": weight for name, weight in layer.items()}
    return {name: weight.detach() for name, weight in state.items()}


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture(d_model=16, num_layers=2, num_heads=2, d_ff=24, init_std=0.2),
        Architecture(d_model=32, num_layers=1, num_heads=4, d_ff=20, rope_base=500.0, norm_eps=1e-2, init_std=0.2),
        Architecture(d_model=16, num_layers=2, num_heads=2, d_ff=24, qk_norm=True, norm_eps=1e-2, init_std=0.2),
    ],
)
def test_denoiser_logits_equal_those_of_bidirectional_peer(architecture):
    config = ModelConfig(architecture, vocab_size=19, mask_token_id=4)
    model = Denoiser(config)
    model.init_weights(3)
    with torch.no_grad():  # norms away from 1, so that their order and place matter
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    peer = _bidirectional_peer(config)
    peer.load_state_dict(_peer_state(model), strict=True)

    xt = torch.randint(19, (3, 11), generator=torch.Generator().manual_seed(0))
    everywhere = torch.zeros(3, 1, 11, 11)  # additive: 0 = may attend
    with torch.no_grad():
        theirs = peer(input_ids=xt, attention_mask=everywhere, use_cache=False).logits.flatten(0, 1)
        causal = peer(input_ids=xt, use_cache=False).logits.flatten(0, 1)
        ours = model(xt)
    real = torch.arange(19) != config.mask_token_id
    torch.testing.assert_close(ours[:, real], theirs[:, real], rtol=0, atol=LOGITS_ATOL)
    assert float((causal - theirs).abs().max()) > 100 * LOGITS_ATOL  # else the mask was not applied
