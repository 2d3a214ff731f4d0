"""Compiled layers: something is compiled, the numbers stay, and a training goes on past what is compiled anew."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import torch

from dlm_core.cross_entropy import HeadLoss
from dlm_core.models.attention import AttentionMask
from dlm_core.models.config import Architecture, ModelConfig
from dlm_core.models.transformer import Denoiser
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


def gradients(architecture: Architecture, *, compiled: bool, checkpointed: bool) -> dict[str, torch.Tensor]:
    """Gradients of a loss by name of the parameter."""
    model = Denoiser(ModelConfig(architecture, vocab_size=50, mask_token_id=49))
    model.init_weights(0)
    if checkpointed:
        keep_no_activations(model)
    if compiled:
        compile_blocks(SimpleNamespace(module=model))
    xt = torch.randint(0, 49, (2, 8), generator=torch.Generator().manual_seed(1))
    select = torch.arange(16)
    answers = model(xt, select, xt.flatten(), torch.ones(16), mask=AttentionMask("full"))
    HeadLoss(*answers).loss_sum.backward()
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


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_compiled_training_crosses_a_boundary_whose_layers_are_compiled_anew(made: Artifacts, tmp_path: Path) -> None:
    config = tiny(
        num_steps=6,
        phases={"rows": Phase(), "blocks": Phase(block_size=4)},
        architecture=replace(TINY.architecture, num_layers=1),
        watchdog=WatchdogLimits(step_s=10.0, step_medians=0.01),  # a compilation takes longer
    )
    plain = start_gang(STAGE, config, made.inputs(), tmp_path / "plain")
    assert plain.wait() == [0], plain.log()
    compiled = replace(config, compile=True, activation_checkpointing=True)
    gang = start_gang(STAGE, compiled, made.inputs(), tmp_path / "out")
    assert gang.wait(within_s=550.0) == [0], gang.log()
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
