"""Which windows an update is made from, and how far it goes: functions of the seed and of the update's number alone.

Imports no torch.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator

from mistral_prune_lora.distillation.settings import OptimiserSettings

FROZEN_BATCH = 4  # windows that go through a frozen layer together


def batches_of_updates(count: int, optimiser: OptimiserSettings, seed: int, processes: int = 1) -> Iterator[list[list]]:
    """For every update, the windows of each of its forward passes.

    Every window comes once before any comes again; each pass over them draws their order anew.

    Args:
        count: how many windows there are.
        optimiser: windows in a forward pass, passes in an update.
        seed: of the order.
        processes: that share an update; each makes `gradient_accumulation` passes.
    """
    order, waiting, size = random.Random(seed), list[int](), optimiser.batch_size
    passes = optimiser.gradient_accumulation * processes
    while True:
        while len(waiting) < size * passes:
            fresh = list(range(count))
            order.shuffle(fresh)
            waiting += fresh
        yield [waiting[i * size : (i + 1) * size] for i in range(passes)]
        waiting = waiting[size * passes :]


def processes() -> int:
    """How many processes `torchrun` has started to train one adapter; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def passes_over(count: int, optimiser: OptimiserSettings, processes: int = 1) -> float:
    """How often every one of so many windows is trained on, on average."""
    return optimiser.steps * optimiser.batch_size * optimiser.gradient_accumulation * processes / count


def rate_share(step: int, settings: OptimiserSettings) -> float:
    """The share of the peak learning rate: linear warm-up, then a cosine that would reach zero after the last step.

    Args:
        step: the update's number, from 0.
        settings: the number of updates, and of those that warm up.
    """
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
