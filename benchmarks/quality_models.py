"""The models that are compared by quality: one size, one data order, and what each is trained with."""

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dlm_core.models.config import Architecture, MoE
from pipeline.corpus.config import CorpusConfig, Source
from pipeline.pretrain.config import PretrainConfig, ValidationConfig
from pipeline.pretrain.lr_schedule import LRSchedule
from pipeline.pretrain.objective import ObjectiveConfig
from pipeline.pretrain.optimizer_config import OptimizerConfig
from pipeline.pretrain.phases import Phase
from pipeline.tokenizer.config import TokenizerConfig
from workflows.recipes.bd3lm import OBJECTIVE as BLOCK_OBJECTIVE
from workflows.recipes.chain import SMALL_TEXT
from workflows.recipes.llada_moe import ROUTER_LOSS

WORKERS = 2
VALIDATIONS = 40
"""Of a training whose mask rates are searched for; the blocks, its last 15 %, see six of them."""
MIN_STEPS = 20
"""Fewer leave a phase of a trial without a step."""


@dataclass(frozen=True)
class Model:
    """One line of the table."""

    label: str
    slug: str
    place: int
    """In the order that is expected: 0 has the fewest bits a byte; equal numbers are not compared."""
    is_autoregressive: bool = False
    block_size: int = 0
    """Of the last 15 % of the steps."""
    has_experts: bool = False


AR = Model("AR", "ar", 0, is_autoregressive=True)
MDLM = Model("MDLM", "mdlm", 3)
MODELS = (
    AR,
    Model("BD3-LM, blocks of 4", "bd3lm_4", 1, block_size=4),
    Model("BD3-LM, blocks of 16", "bd3lm_16", 2, block_size=16),
    MDLM,
    Model("LLaDA-MoE tiny", "llada_moe", 3, has_experts=True),
)


@dataclass(frozen=True)
class Size:
    """What all models have in common."""

    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    seq_len: int
    global_batch_seqs: int
    architecture: Architecture
    """Of the dense models."""
    num_experts: int
    top_k: int
    """Experts of a token: together as wide as the dense network."""
    validation_rows: int
    learning_rates: tuple[float, ...]

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return self.seq_len * self.global_batch_seqs


FULL = Size(
    corpus=replace(SMALL_TEXT, held_out_fraction=0.02),
    tokenizer=TokenizerConfig(vocab_size=2048),
    seq_len=128,
    global_batch_seqs=16,
    architecture=Architecture(d_model=128, num_layers=4, num_heads=4, d_ff=352, qk_norm=True, rope_base=100.0),
    num_experts=8,
    top_k=2,
    validation_rows=32,
    learning_rates=(1e-3, 2e-3, 4e-3),
)
QUICK_STEPS = 30
_QUICK_FOLDERS = ("asyncio", "email", "json", "xml")
QUICK = Size(
    corpus=replace(
        SMALL_TEXT,
        source={name: Source((str(Path(sysconfig.get_path("stdlib")) / name),)) for name in _QUICK_FOLDERS},
        held_out_fraction=0.03,
    ),
    tokenizer=TokenizerConfig(vocab_size=512, max_train_bytes=200_000),
    seq_len=64,
    global_batch_seqs=8,
    architecture=replace(FULL.architecture, d_model=32, num_layers=2, num_heads=2, d_ff=64),
    num_experts=4,
    top_k=2,
    validation_rows=8,
    learning_rates=(2e-3,),
)


def with_text(size: Size, paths: Sequence[Path]) -> Size:
    """The same on other text."""
    source = {f"text{number}": Source((str(path.resolve()),)) for number, path in enumerate(paths)}
    return replace(size, corpus=replace(size.corpus, source=source))


def pretrain_config(model: Model, size: Size, num_steps: int, lr: float) -> PretrainConfig:
    """A training of one model.  Data, order, noise, batch, length and schedule are those of all.

    The rate is held and then lowered over the last tenth, so that blocks, which come last, are met at the full rate.
    """
    config = PretrainConfig(
        architecture=size.architecture,
        optimizer=OptimizerConfig(
            lr=lr, lr_schedule=LRSchedule("wsd", warmup_steps=min(50, num_steps // 10), decay_share=0.1)
        ),
        num_steps=num_steps,
        global_batch_seqs=size.global_batch_seqs,
        workers=WORKERS,
        checkpoint_every_steps=200,
        track=False,
    )
    if model.is_autoregressive:
        return replace(config, objective=ObjectiveConfig(kind="autoregressive"))
    if model.block_size:
        return replace(
            config,
            objective=BLOCK_OBJECTIVE,
            phases={"rows": Phase(0.85), "blocks": Phase(0.15, block_size=model.block_size)},
            validation=ValidationConfig(max(2, num_steps // VALIDATIONS), size.validation_rows),
        )
    if model.has_experts:
        return replace(config, architecture=_with_experts(size), router_loss=ROUTER_LOSS)
    return config


def _with_experts(size: Size) -> Architecture:
    width = size.architecture.d_ff or 0
    moe = MoE(size.num_experts, size.top_k, width // size.top_k, renormalise=False)
    return replace(size.architecture, d_ff=None, moe=moe)
