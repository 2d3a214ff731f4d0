"""BD3-LM (arXiv 2503.09573): whole rows first, then blocks at mask rates that are searched for."""

from dataclasses import replace

from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import ValidationConfig
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.pretrain.phases import Phase
from workflows.recipes import mdlm
from workflows.recipes.chain import published_chain, tiny_chain
from workflows.step import Workflow

OBJECTIVE = ObjectiveConfig(weighting="inverse_mask_prob", search_mask_rates=True)


def _phases(block_size: int) -> dict[str, Phase]:
    return {"rows": Phase(0.85), "blocks": Phase(0.15, block_size=block_size)}


def bd3lm_owt() -> Workflow:
    """BD3-LM on OpenWebText, blocks of 16 tokens."""
    pretrain = replace(
        mdlm.PRETRAIN,
        objective=OBJECTIVE,
        phases=_phases(16),
        validation=ValidationConfig(every_steps=5_000, num_rows=512),
        micro_batch_seqs=16,
    )
    return published_chain(
        "bd3lm_owt",
        "BD3-LM, 110M parameters: 850,000 steps on rows of 1024 tokens, 150,000 on blocks of 16",
        pretrain,
        vocab_size=50_258,
        tokenizer="GPT-2's",
        packing=PackingConfig(seq_len=1024),
        title="BD3-LM, OpenWebText",
        unpublished=("validation.num_rows",),
        deviations=(
            mdlm.NO_DROPOUT,
            "losses keep the weight of the bound at all mask rates, where the released code takes 1 once the lowest is "
            "above one half",
        ),
    )


def bd3lm_tiny() -> Workflow:
    """The course of BD3-LM for two CPU cores."""
    (pretrain,) = (step.config for step in mdlm.mdlm_tiny().steps if step.name == "pretrain")
    return tiny_chain(
        "bd3lm_tiny",
        "BD3-LM",
        "BD3-LM's two phases and its search for mask rates, for minutes on 2 CPU cores",
        replace(
            pretrain,
            objective=OBJECTIVE,
            phases=_phases(4),  # the second has a search in its midst
        ),
    )
