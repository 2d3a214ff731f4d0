"""Learning rates against their closed forms, and the limits of the optimizer's configuration."""

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlm_core.models.config import Architecture, MoE
from pipeline.config import apply_settings
from pipeline.errors import UserError
from pipeline.pretrain.config import PretrainConfig
from pipeline.pretrain.lr_schedule import LRSchedule
from pipeline.pretrain.optimizer_config import LRScale, OptimizerConfig

LINEAR = LRSchedule("linear", warmup_steps=4)
WSD = LRSchedule("wsd", warmup_steps=4, decay_share=0.2, final_scale=0.1)
LLADA = LRSchedule("step_down", warmup_steps=4, drop_share=0.5, drop_scale=0.25, decay_share=0.2, final_scale=0.025)


def scales(schedule: LRSchedule, num_steps: int) -> list[float]:
    """Scale of every step."""
    return [schedule.scale_at(step, num_steps) for step in range(num_steps)]


def test_linear_rises_over_the_warm_up_and_falls_to_almost_zero() -> None:
    found = scales(LINEAR, 20)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[4:] == [(20 - step) / 16 for step in range(4, 20)]


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    assert scales(LRSchedule("constant", warmup_steps=2), 6) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_cosine_falls_along_half_a_wave() -> None:
    found = scales(LRSchedule("cosine", warmup_steps=4, final_scale=0.2), 20)
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert found[4:] == pytest.approx([0.6 + 0.4 * math.cos(math.pi * k / 16) for k in range(16)])


@pytest.mark.parametrize(
    ("decay", "fall"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.5 - 0.25 * math.sqrt(2)]),
        ("1-sqrt", [1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]),
    ],
)
def test_wsd_is_stable_and_then_decays_in_the_given_form(decay: Any, fall: list[float]) -> None:
    found = scales(replace(WSD, decay=decay), 20)
    assert found[:16] == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 12])
    assert found[16:] == pytest.approx([0.1 + 0.9 * share for share in fall])


def test_step_down_drops_and_then_decays_linearly() -> None:
    found = scales(LLADA, 20)
    assert found[:10] == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 6])
    assert found[10:] == pytest.approx([*[0.25] * 6, 0.25, 0.19375, 0.1375, 0.08125])


def test_step_down_by_default_is_the_training_of_llada() -> None:
    optimizer = OptimizerConfig(lr=4e-4, lr_schedule=LRSchedule("step_down", warmup_steps=2000, final_scale=0.025))
    num_steps = 440_000
    at = [
        optimizer.lr_at(round(tokens / 2.3 * num_steps), num_steps) for tokens in (0.1, 1.1, 1.25, 1.95, 2.15, 2.2999)
    ]
    assert at == pytest.approx([4e-4, 4e-4, 1e-4, 1e-4, 5.5e-5, 1e-5], rel=0.02)


SCHEDULES = st.one_of(
    st.builds(LRSchedule, st.just("constant"), st.integers(0, 40)),
    st.builds(LRSchedule, st.sampled_from(["linear", "cosine"]), st.integers(0, 40), st.floats(0, 1)),
    st.builds(
        LRSchedule,
        st.just("wsd"),
        st.integers(0, 40),
        st.floats(0, 1),
        st.floats(0.05, 1),
        st.sampled_from(["linear", "cosine", "1-sqrt"]),
    ),
    st.builds(
        LRSchedule,
        st.just("step_down"),
        st.integers(0, 40),
        st.floats(0, 0.5),
        st.floats(0.05, 0.5),
        drop_share=st.floats(0, 0.5),
        drop_scale=st.floats(0.5, 1),
    ),
)


@given(SCHEDULES, st.integers(1, 60))
def test_scale_rises_in_the_warm_up_falls_after_it_and_stays_in_range(schedule: LRSchedule, num_steps: int) -> None:
    found = scales(schedule, num_steps)
    assert all(0.0 < scale <= 1.0 for scale in found)
    peak = found.index(max(found))
    slack = 1e-12
    assert all(later >= earlier - slack for earlier, later in pairwise(found[: peak + 1]))
    assert all(later <= earlier + slack for earlier, later in pairwise(found[peak:]))
    assert all(scale >= min(schedule.final_scale, found[0]) - slack for scale in found)


@given(SCHEDULES, st.integers(50, 60))
def test_scale_after_the_last_step_would_be_the_final_one(schedule: LRSchedule, num_steps: int) -> None:
    end = schedule.scale_at(num_steps, num_steps)
    assert end == pytest.approx(1.0 if schedule.kind == "constant" else schedule.final_scale, abs=1e-9)


@pytest.mark.parametrize(
    ("given_values", "said"),
    [
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"final_scale": 1.5}, "final_scale is 1.5"),
        ({"kind": "wsd", "decay_share": 0.0}, "decay_share is 0.0"),
        ({"kind": "wsd", "decay_share": 1.1}, "decay_share is 1.1"),
        ({"kind": "step_down", "drop_share": -0.1}, "drop_share is -0.1"),
        ({"kind": "step_down", "drop_scale": 1.1}, "drop_scale is 1.1"),
        ({"kind": "constant", "final_scale": 0.1}, "final_scale is 0.1, but the schedule is constant"),
        ({"decay_share": 0.3}, "decay_share is 0.3, but the schedule is linear.* set kind to wsd or step_down"),
        ({"kind": "step_down", "decay": "cosine"}, "decay is cosine, but the schedule is step_down"),
        ({"kind": "cosine", "drop_share": 0.1}, "drop_share is 0.1, but the schedule is cosine"),
        ({"kind": "wsd", "drop_scale": 0.1}, "drop_scale is 0.1, but the schedule is wsd"),
        ({"kind": "step_down", "drop_share": 0.9}, "drop_share 0.9 and decay_share 0.13 sum to more than 1"),
        ({"kind": "step_down", "final_scale": 0.3}, "final_scale 0.3 is above drop_scale 0.25"),
    ],
)
def test_a_schedule_with_a_bad_or_a_useless_option_is_refused(given_values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LRSchedule(**given_values)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0), ("eps", 0.0), ("max_grad_norm", 0.0), ("beta1", 1.0), ("beta2", -0.1), ("weight_decay", -0.1),
        ("ema_decay", 1.0), ("ema_decay", -0.1), ("muon_momentum", 1.0), ("muon_iterations", 0),
    ],
)  # fmt: skip
def test_an_optimizer_setting_out_of_range_names_the_field_and_the_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        OptimizerConfig(kind="muon", **{field: value})


@pytest.mark.parametrize(("field", "value"), [("muon_momentum", 0.9), ("muon_iterations", 6)])
def test_an_option_of_muon_beside_adamw_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}, but kind is adamw"):
        OptimizerConfig(**{field: value})


@pytest.mark.parametrize("field", ["experts", "embedding", "mask_embedding"])
def test_a_negative_scale_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is -1"):
        LRScale(**{field: -1.0})


def test_a_rate_of_experts_without_experts_is_refused() -> None:
    optimizer = OptimizerConfig(lr_scale=LRScale(experts=0.5))
    with pytest.raises(ValueError, match=r"lr_scale\.experts is 0\.5, but the architecture has no experts"):
        PretrainConfig(optimizer=optimizer)
    optimizer.check_fits(Architecture(moe=MoE(num_experts=4, top_k=2, d_ff_expert=8), d_ff=None))


def test_an_option_that_the_kind_ignores_is_refused_on_the_command_line_with_its_path() -> None:
    with pytest.raises(
        UserError, match=r"pretrain\.optimizer\.lr_schedule: decay_share is 0\.5, but the schedule is linear"
    ):
        apply_settings({"pretrain": PretrainConfig()}, [("pretrain.optimizer.lr_schedule.decay_share", 0.5)])


def test_configuration_is_imported_without_torch() -> None:
    code = "import pipeline.pretrain.optimizer_config, sys; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lr", "eps", "max_grad_norm", "weight_decay", "beta1", "ema_decay"])
def test_numbers_that_are_none_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        OptimizerConfig(**{name: value})


def test_scales_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="experts is nan"):
        LRScale(experts=math.nan)
