"""Learning-rate schedule: warm-up from a floor, then decay to it (DeepSpeed's WarmupDecayLR)."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from llm2comp.recipe import Schedule


def learning_rate(schedule: Schedule, steps: int, step: int) -> float:
    """Learning rate of optimiser step `step` (0 = the first) in a stage of `steps` steps."""
    peak, floor, warmup = schedule.peak, schedule.floor_learning_rate, schedule.warmup_steps
    total = schedule.total_steps or steps
    if step < warmup:
        share = (
            math.log(step + 1) / math.log(max(2, warmup))
            if schedule.warmup == "logarithmic"
            else step / warmup
        )
    elif schedule.decay == "constant":
        share = 1.0
    else:
        share = max(0.0, (total - step) / max(1, total - warmup))
    return floor + (peak - floor) * share


def scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> LambdaLR:
    """The schedule over an optimizer whose own learning rate is the schedule's peak."""
    return LambdaLR(optimizer, lambda step: learning_rate(schedule, steps, step) / schedule.peak)
