"""What an adapter's training is told: the adapter's shape, the loss, the optimiser; each value checked where it is set.

A value that is none, such as NaN or a temperature of 0, would be noticed hours later, or never.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mistral_prune_lora.errors import PipelineError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """The adapter's shape, in PEFT's terms.

    Raises:
        PipelineError: a value that cannot be; names the field.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = PROJECTIONS
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        _whole("rank", self.rank, 1)
        _number("alpha", self.alpha, above=0)
        _number("dropout", self.dropout, least=0, below=1)
        names = self.target_modules
        if isinstance(names, str) or not names or not all(isinstance(name, str) and name for name in names):
            raise PipelineError(
                f"target_modules is {names!r}, not names of modules", mend=f"Use some of {', '.join(PROJECTIONS)}"
            )
        if len(set(names)) < len(names):
            raise PipelineError(f"target_modules names a module twice: {', '.join(names)}", mend="Name each once")


@dataclass(frozen=True)
class LossSettings:
    """loss = kd_alpha * temperature^2 * KL(teacher || student) + (1 - kd_alpha) * cross-entropy.

    Raises:
        PipelineError: a value that cannot be; names the field.
    """

    kd_alpha: float = 0.9
    temperature: float = 2.0

    def __post_init__(self) -> None:
        _number("kd_alpha", self.kd_alpha, least=0, most=1)
        _number("temperature", self.temperature, above=0)


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW with linear warm-up and cosine decay to zero.

    Attributes:
        steps: updates of the weights.
        batch_size: windows in one forward pass.
        gradient_accumulation: forward passes in one update.
        learning_rate: its peak; about as far as one update moves every weight, so at most 1.
        warmup_steps: updates until the peak.
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to this norm.

    Raises:
        PipelineError: a value that cannot be; names the field.
    """

    steps: int = 1000
    batch_size: int = 1
    gradient_accumulation: int = 8
    learning_rate: float = 2e-4
    warmup_steps: int = 50
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("gradient_accumulation", 1), ("warmup_steps", 0)):
            _whole(name, getattr(self, name), least)
        _number("learning_rate", self.learning_rate, above=0, most=1)
        _number("weight_decay", self.weight_decay, least=0)
        _number("max_grad_norm", self.max_grad_norm, above=0)


@dataclass(frozen=True)
class TrainingSettings:
    """All of them.

    Attributes:
        lora, loss, optimiser: see each.
        seed: of the adapter's first weights and of the order of the windows.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
    """

    lora: LoraSettings = field(default_factory=LoraSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    seed: int = 0
    gradient_checkpointing: bool = False


def _whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PipelineError(f"{name} is {value!r}", mend=f"Give a whole number of at least {least}")


def _number(name: str, value: object, **bounds: float) -> None:
    """Raise a PipelineError unless a value is a finite number within its bounds: above, least, below, most."""
    holds = {
        "above": lambda bound: value > bound,
        "least": lambda bound: value >= bound,
        "below": lambda bound: value < bound,
        "most": lambda bound: value <= bound,
    }
    words = {"above": "above", "least": "of at least", "below": "below", "most": "of at most"}
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not all(holds[kind](bound) for kind, bound in bounds.items()):
        wanted = " and ".join(f"{words[kind]} {bound:g}" for kind, bound in bounds.items())
        raise PipelineError(f"{name} is {value!r}", mend=f"Give a number {wanted}")
