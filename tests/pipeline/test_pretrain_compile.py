"""Compiled layers: something is compiled, the numbers stay, and a training goes on past what is compiled anew."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import torch
from torch._dynamo import config as dynamo_config

from dlm_core.cross_entropy import HeadLoss
from dlm_core.models.attention import AttentionMask
from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.router_losses import RouterTap
from dlm_core.models.transformer import FULL, Denoiser
from pipeline.errors import UserError
from pipeline.pretrain import engine
from pipeline.pretrain.config import STAGE
from pipeline.pretrain.engine import compile_blocks, keep_no_activations
from pipeline.pretrain.phases import Phase
from pipeline.pretrain.watchdog import WatchdogLimits
from tests.support.resuming import EXPERTS
from tests.support.tiny_run import TINY, Artifacts, losses, start_gang, tiny


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that are compiled; they run as they are, and without the check of shapes, which none can hold."""
    found: list[Any] = []

    def keep(graph: Any, _: Any) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    jaxtyping.config.update("jaxtyping_disable", True)
    yield found
    jaxtyping.config.update("jaxtyping_disable", False)


def made_model(architecture: Architecture, *, compiled: bool = True, checkpointed: bool = False) -> Denoiser:
    model = Denoiser(ModelConfig(architecture, vocab_size=50, mask_token_id=49))
    model.init_weights(0)
    if checkpointed:
        keep_no_activations(model)
    return compiled_model(model) if compiled else model


def compiled_model(model: Denoiser) -> Denoiser:
    compile_blocks(SimpleNamespace(module=model), tiny())
    return model


def loss_of(model: Denoiser, mask: AttentionMask = FULL, seq_len: int = 8) -> torch.Tensor:
    """A loss of two rows."""
    xt = torch.randint(0, 49, (2, seq_len), generator=torch.Generator().manual_seed(1))
    answers = model(xt, torch.arange(xt.numel()), xt.flatten(), torch.ones(xt.numel()), mask=mask)
    return HeadLoss(*answers).loss_sum


def gradients(architecture: Architecture, *, compiled: bool, checkpointed: bool) -> dict[str, torch.Tensor]:
    """Gradients of a loss by name of the parameter."""
    model = made_model(architecture, compiled=compiled, checkpointed=checkpointed)
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("architecture", [TINY.architecture, EXPERTS], ids=["dense", "experts"])
def test_layers_whose_activations_are_computed_again_are_compiled_to_the_same_numbers(
    graphs: list[Any], architecture: Architecture
) -> None:
    wanted = gradients(architecture, compiled=False, checkpointed=False)
    assert not graphs
    gradients(architecture, compiled=True, checkpointed=False)
    num_plain = len(graphs)
    torch._dynamo.reset()
    found = gradients(architecture, compiled=True, checkpointed=True)
    assert len(graphs) == 2 * num_plain > 0
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "again"])
def test_tapped_layers_of_one_shape_share_a_graph_for_all_lengths(graphs: list[Any], checkpointed: bool) -> None:
    model = made_model(replace(EXPERTS, num_layers=9), compiled=False, checkpointed=checkpointed)
    tap = RouterTap(model)
    compiled_model(model)
    for seq_len in (8, 6, 12, 5, 7):
        with tap:
            loss = loss_of(model, seq_len=seq_len)
        assert [len(logits) for logits in tap.logits.values()] == [2 * seq_len] * 9
        loss.backward()
    # sizes that are fixed, then free ones; what is computed again is not taken
    assert len(graphs) == (4 if checkpointed else 2)


PHASES = [
    (FULL, 12),
    (AttentionMask("full", doc_ids=torch.ones(2, 12, dtype=torch.long)), 12),
    (AttentionMask("causal"), 12),
    (FULL, 1),
    (AttentionMask("full", doc_ids=torch.ones(2, 1, dtype=torch.long)), 1),
]
"""Masks and lengths of rows, for each of which a layer is compiled anew."""


def test_five_phases_are_compiled_with_and_without_gradients_in_any_thread(graphs: list[Any]) -> None:
    model = made_model(replace(TINY.architecture, num_layers=1))
    with ThreadPoolExecutor(1) as other:  # as for what is computed again on a GPU
        for number, (mask, seq_len) in enumerate(PHASES, 1):
            other.submit(loss_of, model, mask, seq_len).result().backward()
            with torch.no_grad():
                loss_of(model, mask, seq_len)
            assert len(graphs) == 2 * number


def test_layers_that_would_be_left_uncompiled_end_the_training(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "most_graphs", lambda config: 2)
    model = made_model(replace(TINY.architecture, num_layers=1))
    for mask, seq_len in PHASES[:2]:
        loss_of(model, mask, seq_len)
    with pytest.raises(UserError, match=r"2 times are allowed for the phases .* Resume with pretrain.compile=false"):
        loss_of(model, *PHASES[2])
    assert len(graphs) == 2
    assert dynamo_config.recompile_limit != 2, "what else is compiled keeps its own limit"


def test_more_graphs_are_allowed_for_more_phases_and_for_short_rows() -> None:
    phased = tiny(phases={"rows": Phase(), "blocks": Phase(block_size=4)})
    assert 8 < engine.most_graphs(tiny()) < engine.most_graphs(phased)
    assert engine.most_graphs(replace(phased, short_step_share=0.1)) > engine.most_graphs(phased)


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("change", [{"activation_checkpointing": True}, {"zero_stage": 3}], ids=str)
def test_a_compiled_training_crosses_a_boundary_whose_layers_are_compiled_anew(
    change: dict[str, Any], made: Artifacts, tmp_path: Path
) -> None:
    config = tiny(
        num_steps=6,
        phases={"rows": Phase(), "blocks": Phase(block_size=4)},
        architecture=replace(TINY.architecture, num_layers=1),
        watchdog=WatchdogLimits(step_s=10.0, step_medians=0.01),  # a compilation takes longer
    )
    plain = start_gang(STAGE, config, made.inputs(), tmp_path / "plain")
    assert plain.wait() == [0], plain.log()
    compiled = replace(config, compile=True, **change)
    gang = start_gang(STAGE, compiled, made.inputs(), tmp_path / "out")
    assert gang.wait(within_s=550.0) == [0], gang.log()
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
