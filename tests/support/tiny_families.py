"""Small architectures with the options of the families, and rotary stretches that show at a few positions."""

from dlm_core.models.config import Architecture, MoE, RopeScaling

SMALL = Architecture(
    d_model=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    d_ff=24,
    tied_head=False,
    init="normal",
    init_std=0.25,
    norm_eps=1e-2,
    rope_base=500.0,
)
EXPERTS = MoE(num_experts=5, top_k=2, d_ff_expert=8, renormalise=False)
GROUPED = MoE(
    num_experts=8,
    top_k=3,
    d_ff_expert=8,
    num_shared_experts=2,
    router_score="sigmoid",
    routed_scale=2.5,
    num_groups=4,
    top_groups=2,
    selection_bias=True,
    first_k_dense=1,
)
LLAMA3 = RopeScaling("llama3", 8.0, original_seq_len=16, low_factor=1.0, high_factor=4.0)
YARN = RopeScaling("yarn", 4.0, original_seq_len=16, low_factor=1.0, high_factor=32.0)
