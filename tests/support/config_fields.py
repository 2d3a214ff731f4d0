"""Every field of every stage's configuration: what is identity, what is execution, and another valid value of it."""

from dataclasses import replace
from typing import Any

from dlm_core.models.config import Architecture, MoE, RopeScaling
from pipeline.ar_init.config import ArInitConfig
from pipeline.convert.config import ConvertConfig
from pipeline.corpus.config import CorpusConfig, Source
from pipeline.evaluate.config import EvaluateConfig
from pipeline.export.config import ExportConfig
from pipeline.generate.config import GenerateConfig
from pipeline.import_checkpoint.config import ImportConfig
from pipeline.inference.sampler import Kind, SamplerConfig
from pipeline.pretrain.adaptation import AdaptationConfig
from pipeline.pretrain.averaging import AverageConfig
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.lr_schedule import LRSchedule
from pipeline.pretrain.objective import ObjectiveConfig, RouterLossConfig
from pipeline.pretrain.optimizer_config import LRScale, OptimizerConfig
from pipeline.pretrain.phases import Phase
from pipeline.tasks.config import TaskConfig, TasksConfig
from pipeline.tokenization.config import TokenizationConfig
from pipeline.tokenizer.config import TokenizerConfig

ALL_CONFIGS = (
    CorpusConfig, TokenizerConfig, TokenizationConfig, ArInitConfig, PretrainConfig, ConvertConfig, EvaluateConfig,
    TasksConfig, GenerateConfig, ImportConfig, ExportConfig,
)  # fmt: skip

CHANGED: dict[type, dict[str, Any]] = {
    CorpusConfig: {
        "text_field": "body", "undecodable": "skip",
        "max_bad_ratio": 0.5, "txt_document_chars": 10, "held_out_fraction": 0.5, "split_seed": 1, "shard_bytes": 9,
        "max_line_bytes": 99, "filters.min_chars": 5, "filters.max_chars": 99, "filters.drop_duplicates": False,
        "filters.quality": ["pipeline.corpus.filters:repeated_lines"],
    },
    TokenizerConfig: {
        "vocab_size": 999, "max_train_bytes": 7, "mask_token": "<m>", "eos_token": "<e>",
        "pad_token": "<p>", "mask_from": "new_row",
    },
    ArInitConfig: {"mask_row": "keep"},
    PretrainConfig: {
        "architecture.d_model": 64, "architecture.num_layers": 2, "architecture.num_heads": 2, "architecture.d_ff": 8,
        "architecture.rope_base": 7.0, "architecture.norm_eps": 1e-3, "architecture.init_std": 0.5,
        "architecture.qk_norm": True, "architecture.num_kv_heads": 2, "architecture.head_dim": 32,
        "architecture.norm": "layer", "architecture.activation": "gelu", "architecture.qkv_bias": True,
        "architecture.rope_fraction": 0.5,
        "architecture.cond_dim": 8, "architecture.tied_head": False, "architecture.init": "normal",
        "optimizer.lr": 0.5, "optimizer.lr_schedule.warmup_steps": 1, "optimizer.beta1": 0.1, "optimizer.beta2": 0.1,
        "optimizer.kind": "muon", "optimizer.ema_decay": 0.9, "optimizer.lr_schedule.kind": "cosine",
        "optimizer.lr_schedule.final_scale": 0.5, "optimizer.lr_scale.embedding": 0.5,
        "optimizer.lr_scale.mask_embedding": 0.5,
        "optimizer.eps": 1e-3, "optimizer.weight_decay": 0.0, "optimizer.max_grad_norm": 9.0,
        "validation.every_steps": 7, "adaptation.anneal_steps": 3,
        "num_steps": 7, "global_batch_seqs": 4, "short_step_share": 0.5, "spike_sigmas": 6.0, "spike_window_steps": 9,
        "objective.t_min": 0.1, "objective.block_size": 4, "objective.schedule": "cosine",
        "objective.weighting": "uniform", "objective.target_offset": 1, "objective.within_documents": True,
        "objective.kind": "autoregressive", "objective.masking": "exact_count", "precision": "bf16",
        "init_seed": 1, "data_seed": 1, "noise_seed": 1,
    },
    ConvertConfig: {"weights": "ema"},
    ImportConfig: {"name": "somebody/model"},
    ExportConfig: {
        "family": "dream", "dtype": "float32", "max_shard_bytes": 9, "without_tokenizer": True, "name": "a model",
        "license": "mit", "proof": "tensors",
    },
    EvaluateConfig: {"num_replicates": 9, "noise_seed": 1},
    TasksConfig: {"likelihood.num_masks": 9, "likelihood.guidance": 0.5, "likelihood.noise_seed": 1},
    GenerateConfig: {
        "num_samples": 5, "length": 5, "temperature": 0.5, "noise_seed": 1, "num_frames": 3, "top_k": 5, "top_p": 0.5,
        "block_size": 8, "cache": "none", "sampler.kind": "random", "sampler.num_steps": 50,
        "sampler.noise_removal": True, "guidance": 0.5, "suppressed": [7], "suppresses_eos": True,
        "ends_at_eos": True, "prompts": ["a text"],
    },
}  # fmt: skip
"""Another valid value for every field that changes the expected result."""

_HUB = {"text": Source(("hf:x",))}

_EXPERTS = MoE(num_experts=4, top_k=2, d_ff_expert=8)

_SAMPLERS: dict[str, tuple[Kind, Any]] = {
    "per_pass": ("first_hitting", 2), "quotas": ("random", "timed"), "is_tempered": ("entropy", True),
    "order_temperature": ("entropy", 0.5), "takes_eos_last": ("margin", True), "tau": ("threshold", 0.5),
    "factor": ("factor", 2.0), "gamma": ("entropy_bound", 0.5), "remasking": ("remdm", "loop"), "eta": ("remdm", 0.5),
    "num_states": ("self_speculative", 2),
}  # fmt: skip
"""Another value of a setting, and a kind of sampler that takes it."""

NOT_ALONE: dict[type, dict[str, tuple[Any, Any]]] = {
    TasksConfig: {"tasks": (TasksConfig(), TasksConfig({"a": TaskConfig("text", "t.jsonl")}))},
    GenerateConfig: {
        "refresh_every": (GenerateConfig(cache="dual"), GenerateConfig(cache="dual", refresh_every=2)),
        **{
            f"sampler.{name}": (SamplerConfig(kind), replace(SamplerConfig(kind), **{name: value}))
            for name, (kind, value) in _SAMPLERS.items()
        },
    },
    TokenizerConfig: {
        "rare_token_id": (
            TokenizerConfig(mask_from="rare_token", rare_token_id=7),
            TokenizerConfig(mask_from="rare_token", rare_token_id=8),
        ),
    },
    ArInitConfig: {
        "upcycle": (ArInitConfig(), ArInitConfig(upcycle=_EXPERTS)),
        "router_std": (ArInitConfig(upcycle=_EXPERTS), ArInitConfig(upcycle=_EXPERTS, router_std=0.5)),
        "init_seed": (ArInitConfig(upcycle=_EXPERTS), ArInitConfig(upcycle=_EXPERTS, init_seed=1)),
    },
    CorpusConfig: {
        "hub_split": (CorpusConfig(source=_HUB), CorpusConfig(source=_HUB, hub_split="test")),
        "hub_revision": (CorpusConfig(source=_HUB), CorpusConfig(source=_HUB, hub_revision="abc")),
    },
    PretrainConfig: {
        "short_step_min": (
            PretrainConfig(short_step_share=0.5),
            PretrainConfig(short_step_share=0.5, short_step_min=2),
        ),
        "validation.num_rows": (ValidationConfig(1), ValidationConfig(1, num_rows=7)),
        "validation.num_replicates": (ValidationConfig(1), ValidationConfig(1, num_replicates=9)),
        "validation.noise_seed": (ValidationConfig(1), ValidationConfig(1, noise_seed=1)),
        "mixture": (PretrainConfig(), PretrainConfig(mixture={"a": 1.0})),
        "phases": (PretrainConfig(), PretrainConfig(phases={"a": Phase(), "b": Phase(block_size=4)})),
        "objective.mask_rates": (
            ObjectiveConfig(weighting="inverse_mask_prob"),
            ObjectiveConfig(weighting="inverse_mask_prob", mask_rates=(0.1, 0.9)),
        ),
        "objective.search_mask_rates": (
            ObjectiveConfig(weighting="inverse_mask_prob"),
            ObjectiveConfig(weighting="inverse_mask_prob", search_mask_rates=True),
        ),
        "objective.cart_p": (
            ObjectiveConfig(weighting="cart", cart_p=0.1),
            ObjectiveConfig(weighting="cart", cart_p=0.3),
        ),
        "adaptation.mask_noise_std": (
            AdaptationConfig(mask_noise_std=0.5, mask_noise_steps=3),
            AdaptationConfig(mask_noise_std=0.6, mask_noise_steps=3),
        ),
        "adaptation.mask_noise_steps": (
            AdaptationConfig(mask_noise_std=0.5, mask_noise_steps=3),
            AdaptationConfig(mask_noise_std=0.5, mask_noise_steps=4),
        ),
        "average.keep": (AverageConfig(), AverageConfig("best", 2)),
        "average.count": (AverageConfig("best", 2), AverageConfig("best", 3)),
        "average.every_steps": (AverageConfig("last", 2, 5), AverageConfig("last", 2, 6)),
        "router_loss.balance": (RouterLossConfig(), RouterLossConfig(balance=0.1)),
        "router_loss.bias_rate": (RouterLossConfig(), RouterLossConfig(bias_rate=0.1)),
        "router_loss.z": (RouterLossConfig(), RouterLossConfig(z=0.1)),
        "router_loss.group_seqs": (RouterLossConfig(), RouterLossConfig(group_seqs=2)),
        "optimizer.lr_scale.experts": (LRScale(), LRScale(experts=0.5)),
        "optimizer.muon_momentum": (OptimizerConfig("muon"), OptimizerConfig("muon", muon_momentum=0.9)),
        "optimizer.muon_iterations": (OptimizerConfig("muon"), OptimizerConfig("muon", muon_iterations=6)),
        "optimizer.lr_schedule.decay_share": (LRSchedule("wsd"), LRSchedule("wsd", decay_share=0.2)),
        "optimizer.lr_schedule.decay": (LRSchedule("wsd"), LRSchedule("wsd", decay="cosine")),
        "optimizer.lr_schedule.drop_share": (LRSchedule("step_down"), LRSchedule("step_down", drop_share=0.3)),
        "optimizer.lr_schedule.drop_scale": (LRSchedule("step_down"), LRSchedule("step_down", drop_scale=0.3)),
        "architecture.head_bias": (Architecture(tied_head=False), Architecture(tied_head=False, head_bias=True)),
        "architecture.time_conditioning": (Architecture(cond_dim=8), Architecture(cond_dim=8, time_conditioning=True)),
        "architecture.rope_scaling": (Architecture(), Architecture(rope_scaling=RopeScaling("linear", 2.0))),
        "architecture.moe": (Architecture(), Architecture(moe=_EXPERTS, d_ff=None)),
    },
}
"""Fields that change with others, hold a part of their own, or make a model that this stage refuses: before, after."""

EXECUTION: dict[type, dict[str, Any]] = {
    CorpusConfig: {
        "source.text.paths": ["a", "b"], "source.text.text_field": "body", "source.text.filters": {"min_chars": 3},
        "source.text.held_out_fraction": 0.5,
        "max_decompression_ratio": 9.0,
    },
    TokenizerConfig: {"file": "t.json"},
    TokenizationConfig: {"backend": "tokenizers", "batch_chars": 3},
    PretrainConfig: {
        "workers": 4, "min_workers": 2, "requires_gpus": True, "zero_stage": 3, "micro_batch_seqs": 1,
        "threads_per_worker": 3, "checkpoint_every_steps": 7,
        "keep_checkpoints": 9, "max_skipped_steps": 2, "track": False, "activation_checkpointing": True,
        "offload_optimizer": True, "compile": True, "log_norms_every_steps": 3,
        "replica_check_every_steps": 3, "watchdog.start_s": 1.0, "watchdog.first_step_s": 1.0, "watchdog.step_s": 9.0,
        "watchdog.step_medians": 3.0, "watchdog.checkpoint_s": 1.0, "watchdog.evaluation_s": 1.0,
        "peak_tflops_per_worker": 312.0,
        "max_failed_saves": 1, "accept_changed_identity": True,
    },
    ConvertConfig: {"proof": "tensors"},
    ImportConfig: {"path": "/m", "gguf_file": "x.gguf", "proof": "tensors"},
    EvaluateConfig: {"num_shards": 9, "batch_rows": 3, "device": "cpu", "gpus": 0.5},
    TasksConfig: {
        "num_shards": 9, "device": "cpu", "gpus": 0.5, "track": False, "likelihood.batch_rows": 3,
        "allow_unsandboxed": True,
    },
    GenerateConfig: {"batch_rows": 3, "device": "cpu"},
}  # fmt: skip
"""Another valid value for every field that may change in a resume."""


EXPERTS = Architecture(moe=_EXPERTS, d_ff=None)
EXECUTION_NOT_ALONE: dict[type, dict[str, tuple[Any, Any]]] = {
    PretrainConfig: {
        "ep_size": (PretrainConfig(architecture=EXPERTS), PretrainConfig(architecture=EXPERTS, ep_size=2))
    },
    GenerateConfig: {
        "sampler.look_every": (SamplerConfig("threshold"), SamplerConfig("threshold", look_every=3)),
    },
}
"""Fields that may change in a resume, and need others: before, after."""
