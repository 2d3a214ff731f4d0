"""SmolLM2 135M (arXiv 2502.02737) as a diffusion model: a real checkpoint adapted in minutes on two CPU cores."""

from dlm_core.models.presets import PRESETS
from pipeline.corpus.config import CorpusConfig
from pipeline.generate.config import GenerateConfig
from pipeline.inference.sampler import SamplerConfig
from pipeline.packing.config import PackingConfig
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.lr_schedule import LRSchedule
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.pretrain.optimizer_config import OptimizerConfig
from pipeline.tokenizer.config import TokenizerConfig
from workflows.recipes.chain import adapted_chain
from workflows.step import Workflow


def smollm2_to_diffusion() -> Workflow:
    """SmolLM2 135M, trained on as a shifted masked-diffusion model."""
    pretrain = PretrainConfig(
        architecture=PRESETS["smollm2-135m"].model.architecture,
        objective=ObjectiveConfig(masking="exact_count", target_offset=1),
        optimizer=OptimizerConfig(lr=3e-4, lr_schedule=LRSchedule("cosine", 10, final_scale=0.1), weight_decay=0.01),
        num_steps=160,
        global_batch_seqs=2,
        precision="bf16",
        validation=ValidationConfig(every_steps=40, num_rows=16),
        workers=1,
        threads_per_worker=2,
        checkpoint_every_steps=40,
    )
    return adapted_chain(
        "smollm2_to_diffusion",
        "SmolLM2 135M adapted to diffusion on 82 thousand tokens, in some 20 minutes on 2 CPU cores",
        pretrain,
        corpus=CorpusConfig(source={}),
        tokenizer=TokenizerConfig(eos_token="<|endoftext|>"),
        packing=PackingConfig(seq_len=256),
        generate=GenerateConfig(num_samples=2, length=64, sampler=SamplerConfig(num_steps=32)),
        title="SmolLM2 135M as a diffusion model",
        deviations=(
            "neither the checkpoint nor the text comes with the recipe; import_checkpoint.path and "
            "corpus.source are to be given",
        ),
    )
