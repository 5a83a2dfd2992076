"""Learning rates are those of DeepSpeed's WarmupDecayLR, written out here as in its
deepspeed/runtime/lr_schedules.py.
"""

import math

import pytest
import torch
from pydantic import ValidationError

from llm2comp.recipe import Schedule
from llm2comp.training.schedule import learning_rate, scheduler


def warmup_decay_lr(step, *, minimum, maximum, warmup_num_steps, total_num_steps, warmup_type):
    """`WarmupDecayLR` after `step` steps: min + (max − min) · gamma."""
    warmup_num_steps = max(2, warmup_num_steps)
    if step < warmup_num_steps:
        gamma = (
            math.log(step + 1) / math.log(warmup_num_steps)
            if warmup_type == "log"
            else step / warmup_num_steps
        )
    else:
        gamma = max(
            0.0, float(total_num_steps - step) / float(max(1.0, total_num_steps - warmup_num_steps))
        )
    return minimum + (maximum - minimum) * gamma


STEPS = [0, 1, 2, 9, 100, 1599, 3198, 3199, 3200, 3201, 10_000, 17_600, 31_999, 32_000, 40_000]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("warmup", "kind"), [("logarithmic", "log"), ("linear", "linear")])
def test_release_settings_equal_deepspeed(warmup, kind, step):
    schedule = Schedule(
        learning_rate=1e-4, floor_learning_rate=1e-5, warmup_steps=3200, warmup=warmup
    )
    expected = warmup_decay_lr(
        step,
        minimum=1e-5,
        maximum=1e-4,
        warmup_num_steps=3200,
        total_num_steps=32_000,
        warmup_type=kind,
    )
    assert learning_rate(schedule, 32_000, step) == pytest.approx(expected, rel=1e-12)


def test_known_points():
    schedule = Schedule(learning_rate=1e-4, floor_learning_rate=1e-5, warmup_steps=3200)
    rates = {step: learning_rate(schedule, 32_000, step) for step in STEPS}
    assert rates[0] == pytest.approx(1e-5)
    assert rates[3199] == pytest.approx(1e-4)
    assert rates[3200] == pytest.approx(1e-4)
    assert rates[17_600] == pytest.approx(5.5e-5)
    assert rates[32_000] == rates[40_000] == pytest.approx(1e-5)
    assert (
        rates[100]
        > learning_rate(schedule.model_copy(update={"warmup": "linear"}), 32_000, 100) * 4
    )


def test_schedule_longer_than_the_stage():
    """SCL: 200 steps of a 2,000-step schedule stop at the end of the warm-up."""
    schedule = Schedule(learning_rate=1e-4, warmup_steps=200, total_steps=2000)
    for step in (0, 50, 199, 200, 1100):
        expected = warmup_decay_lr(
            step,
            minimum=1e-5,
            maximum=1e-4,
            warmup_num_steps=200,
            total_num_steps=2000,
            warmup_type="log",
        )
        assert learning_rate(schedule, 200, step) == pytest.approx(expected, rel=1e-12)


def test_constant_decay_stays_at_the_peak():
    schedule = Schedule(
        learning_rate=1e-3,
        floor_learning_rate=1e-4,
        warmup_steps=10,
        warmup="linear",
        decay="constant",
    )
    assert learning_rate(schedule, 100, 0) == pytest.approx(1e-4)
    assert learning_rate(schedule, 100, 5) == pytest.approx(5.5e-4)
    assert {learning_rate(schedule, 100, step) for step in (10, 50, 99, 1000)} == {1e-3}


def test_without_warm_up_the_first_step_is_the_peak():
    schedule = Schedule(learning_rate=1e-3, floor_learning_rate=0.0)
    assert learning_rate(schedule, 10, 0) == pytest.approx(1e-3)
    assert learning_rate(schedule, 10, 5) == pytest.approx(5e-4)
    assert learning_rate(schedule, 10, 10) == 0.0


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 3, 4])
def test_short_stages_have_finite_rates_between_floor_and_peak(steps, warmup_steps):
    schedule = Schedule(learning_rate=1e-3, floor_learning_rate=1e-4, warmup_steps=warmup_steps)
    rates = [learning_rate(schedule, steps, step) for step in range(steps + 2)]
    assert all(1e-4 - 1e-12 <= rate <= 1e-3 + 1e-12 for rate in rates)


def test_scheduler_drives_an_optimizer():
    weight = torch.nn.Parameter(torch.zeros(1))
    schedule = Schedule(learning_rate=2e-3, floor_learning_rate=1e-4, warmup_steps=3)
    optimizer = torch.optim.AdamW([{"params": [weight]}], lr=schedule.learning_rate)
    driver, rates = scheduler(optimizer, schedule, 8), []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        driver.step()
    assert rates == pytest.approx(
        [learning_rate(schedule, 8, step) for step in range(8)], rel=1e-12
    )
    assert max(rates) == pytest.approx(2e-3)


def test_floor_above_the_peak_is_refused():
    with pytest.raises(ValidationError, match="is above learning_rate"):
        Schedule(learning_rate=1e-5, floor_learning_rate=1e-4)
