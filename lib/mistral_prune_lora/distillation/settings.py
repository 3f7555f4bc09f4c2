"""What an adapter's training is told: the adapter's shape, the loss, the optimiser; each value checked where it is set.

A value that is none, such as NaN or a temperature of 0, would be noticed hours later, or never.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.layout.partition import STAGES

KEEP = ("last", "best")
LOGGERS = ("tensorboard", "trackio")
KD_LOSSES = ("forward_kl", "reverse_kl", "js")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """The adapter's shape, in PEFT's terms.

    Attributes:
        rank, alpha, dropout, use_rslora, use_dora: as PEFT has them.
        target_modules: the linear modules of a layer that get an adapter: their names, `q_proj` or `mlp.up_proj`, or
            patterns, `*_proj` or `mlp.*`.
        rank_pattern, alpha_pattern: other ranks and alphas for some of them, by name or pattern.

    Raises:
        PipelineError: a value that cannot be; names the field.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = PROJECTIONS
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

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
        for name, rank in self.rank_pattern.items():
            _whole(f"rank_pattern.{name}", rank, 1)
        for name, alpha in self.alpha_pattern.items():
            _number(f"alpha_pattern.{name}", alpha, above=0)


@dataclass(frozen=True)
class HiddenLoss:
    """weight * (1 - cosine), mean over the scored tokens, of the hidden states that leave two layers.

    Attributes:
        student_layer: an active layer of the student, at or above its first adapted one; its original index.
        teacher_layer: the dense model's.
        weight: what it counts beside the loss at the head.

    Raises:
        PipelineError: a value that cannot be; names the field.
    """

    student_layer: int
    teacher_layer: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        _whole("hidden.student_layer", self.student_layer, 0)
        _whole("hidden.teacher_layer", self.teacher_layer, 0)
        _number("hidden.weight", self.weight, above=0)


@dataclass(frozen=True)
class LossSettings:
    """loss = kd_alpha * temperature^2 * divergence from the teacher + (1 - kd_alpha) * cross-entropy.

    Attributes:
        kd_alpha: the divergence's share.
        temperature: that both logits are divided by for the divergence.
        kd_loss: the divergence: "forward_kl" is KL(teacher || student), "reverse_kl" KL(student || teacher), "js" the
            Jensen-Shannon divergence.
        hidden: also bring one hidden state close to the teacher's; None leaves that out.

    Raises:
        PipelineError: a value that cannot be; names the field.
    """

    kd_alpha: float = 0.9
    temperature: float = 1.0
    kd_loss: str = "forward_kl"
    hidden: HiddenLoss | None = None

    def __post_init__(self) -> None:
        _number("kd_alpha", self.kd_alpha, least=0, most=1)
        _number("temperature", self.temperature, above=0)
        if self.kd_loss not in KD_LOSSES:
            raise PipelineError(f"kd_loss is {self.kd_loss!r}", mend=f"use one of {', '.join(KD_LOSSES)}")


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
class HeldOutSettings:
    """What is done with windows that are not trained on.

    Attributes:
        eval_steps: updates between two looks at them; one more at the start and at the end.
        keep: "last" keeps the adapter of the last update, "best" that with the least divergence from the dense model on
            these windows, or the least NLL without a teacher.
        patience: looks without a better one before training ends; None never ends it early.

    Raises:
        PipelineError: a value that cannot be; names the field.
    """

    eval_steps: int = 50
    keep: str = "last"
    patience: int | None = None

    def __post_init__(self) -> None:
        _whole("eval_steps", self.eval_steps, 1)
        if self.keep not in KEEP:
            raise PipelineError(f"keep is {self.keep!r}", mend=f"use one of {', '.join(KEEP)}")
        if self.patience is not None:
            _whole("patience", self.patience, 1)


@dataclass(frozen=True)
class TrainingSettings:
    """All that decides what comes out.

    Attributes:
        lora, loss, optimiser, held_out: see each.
        adapt_layers: which layers of the part get an adapter, by original index; None means all of them.
        seed: of the adapter's first weights, of dropout and of the order of the windows.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        skip_spikes: leave an update out whose loss is above so many times the median of the last 20; None never does.
        teacher_4bit: quantise the teacher, which runs along on a GPU, to four bits.
        stages: what one adapter of A is trained to serve: the stages' shares of the loss, by stage; none trains the
            part at the stage that it is first run at.

    Raises:
        PipelineError: a value that cannot be; names the field.
    """

    lora: LoraSettings = field(default_factory=LoraSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    held_out: HeldOutSettings = field(default_factory=HeldOutSettings)
    adapt_layers: tuple[int, ...] | None = None
    seed: int = 0
    gradient_checkpointing: bool = False
    skip_spikes: float | None = None
    teacher_4bit: bool = False
    stages: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for stage, share in self.stages.items():
            if stage not in STAGES:
                raise PipelineError(f"stages names {stage!r}", mend=f"use some of {', '.join(STAGES)}")
            _number(f"stages.{stage}", share, above=0)
        if self.adapt_layers is not None:
            for layer in self.adapt_layers:
                _whole("adapt_layers", layer, 0)
        if self.skip_spikes is not None:
            _number("skip_spikes", self.skip_spikes, above=1)


def training_settings(given: Mapping) -> TrainingSettings:
    """Settings out of plain mappings, such as a configuration's; what is left out takes its default.

    Raises:
        PipelineError: a value that cannot be; names the field.
    """
    plain = ("adapt_layers", "seed", "gradient_checkpointing", "skip_spikes", "teacher_4bit", "stages")
    known = {name: given[name] for name in plain if name in given}
    if known.get("adapt_layers") is not None:
        known["adapt_layers"] = tuple(known["adapt_layers"])
    loss = dict(given.get("loss", {}))
    if loss.get("hidden") is not None:
        loss["hidden"] = HiddenLoss(**loss["hidden"])
    lora = dict(given.get("lora", {}))
    if "target_modules" in lora:
        lora["target_modules"] = tuple(lora["target_modules"])
    optimiser, held_out = given.get("optimiser", {}), given.get("held_out") or {}
    return TrainingSettings(
        LoraSettings(**lora), LossSettings(**loss), OptimiserSettings(**optimiser), HeldOutSettings(**held_out), **known
    )


@dataclass(frozen=True)
class Running:
    """How a training runs; nothing of what comes out depends on it.

    Attributes:
        save_steps: updates between two saved states, from which a killed run goes on; 0 saves one only when the process
            is asked to end.
        loggers: what else is told of every update: "tensorboard", "trackio".

    Raises:
        PipelineError: a value that cannot be; names the field.
    """

    save_steps: int = 50
    loggers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _whole("save_steps", self.save_steps, 0)
        for name in self.loggers:
            if name not in LOGGERS:
                raise PipelineError(f"loggers names {name!r}", mend=f"use some of {', '.join(LOGGERS)}")


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
