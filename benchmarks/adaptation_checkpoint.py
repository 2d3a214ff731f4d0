"""A tiny untrained checkpoint in the layout of transformers, for a quick run."""

import json
import sysconfig
from pathlib import Path

from dlm_core.models.config import Architecture, ModelConfig
from pipeline.corpus.config import CorpusConfig, Source
from pipeline.hf_config import SpecialIds, write_config
from pipeline.hf_names import to_family
from pipeline.weights import ModelRecord

ARCHITECTURE = Architecture(
    d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48, norm_eps=1e-5, init="normal"
)
QUICK_CORPUS = CorpusConfig(
    source={
        name: Source((str(Path(sysconfig.get_path("stdlib")) / name),), held_out_fraction=share)
        for name, share in (("json", 0.0), ("logging", 1.0))
    }
)
_VOCAB_SIZE = 320


def make_checkpoint(directory: Path) -> Architecture:
    """Write config.json, model.safetensors and a tokenizer of the standard library; the architecture."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from dlm_core.models.transformer import Denoiser

    directory.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in (Path(sysconfig.get_path("stdlib")) / "json").glob("*.py")], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    model = Denoiser(ModelConfig(ARCHITECTURE, tokenizer.get_vocab_size(), None))
    model.init_weights(0)
    record = ModelRecord(model.config, 128, "autoregressive_nll")
    config = write_config("llama", record, SpecialIds(eos_token_id=0))
    (directory / "config.json").write_text(json.dumps(config))
    theirs = to_family("llama", ARCHITECTURE, model.state_dict())
    save_file({name: tensor.clone() for name, tensor in theirs.items()}, str(directory / "model.safetensors"))
    return ARCHITECTURE
