"""What the training command is asked for: its own flags and those of the original trainer, made into one request.

`--stage A`, `B` or `C` is this project's spelling, `--stage 1`, `2` or `3` the original trainer's. The two may stand in
one command line as long as no one thing is said twice. What a line leaves out takes the defaults of its spelling.
Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mistral_prune_lora.checkpoints.directories import bundle_layers, is_bundle_dir
from mistral_prune_lora.checkpoints.manifest import read_layout
from mistral_prune_lora.distillation.card import loss_words, stage_words
from mistral_prune_lora.distillation.schedule import passes_over, processes
from mistral_prune_lora.distillation.settings import (
    HeldOutSettings,
    HiddenLoss,
    LoraSettings,
    LossSettings,
    OptimiserSettings,
    Running,
    TrainingSettings,
)
from mistral_prune_lora.errors import CheckpointError, LayoutError, PipelineError
from mistral_prune_lora.storage.json_file import read_json_if_there

_TOGETHER = ("AB", "FULL")
# What is trained, by what --stage says: a part, or with AB and FULL all parts of that stage together.
PARTS = {"A": "A", "B": "B", "C": "C", "1": "A", "2": "B", "3": "C", "AB": "AB", "FULL": "FULL"}
_OWN = TrainingSettings()
# The adapter's, the loss's and the optimiser's stand in settings.py; here is what else a command line may leave out.
DEFAULTS = {
    "dataset": "wikitext2",
    "qa_dataset": None,
    "seqlen": 2048,
    "nsamples": None,
    **asdict(_OWN.lora),
    "target_modules": ",".join(_OWN.lora.target_modules),
    **{name: value for name, value in asdict(_OWN.loss).items() if name != "hidden"},
    **asdict(_OWN.optimiser),
    "epochs": None,
    "warmup_ratio": None,
    "adapt_layers": None,
    "hidden_loss": None,
    "stages": {},
    "skip_spikes": _OWN.skip_spikes,
    "eval_steps": 0,
    "eval_samples": 256,
    "keep": _OWN.held_out.keep,
    "patience": _OWN.held_out.patience,
    "teacher_4bit": _OWN.teacher_4bit,
    "save_steps": Running().save_steps,
    "loggers": "",
    "seed": _OWN.seed,
    "gradient_checkpointing": _OWN.gradient_checkpointing,
    "device": "auto",
    "dtype": "bf16",
    "overwrite": False,
}
# What the original trainer takes where its command line says nothing, if that differs.
ORIGINAL_DEFAULTS = {
    "dataset": None,
    "qa_dataset": "squad",
    "seqlen": 1024,
    "nsamples": 20000,
    "rank": 8,
    "alpha": 16,
    "dropout": 0.05,
    "kd_alpha": 0.1,
    "temperature": 2.0,
    "steps": None,
    "epochs": 1,
    "gradient_accumulation": 32,
    "warmup_steps": None,
    "warmup_ratio": 0.1,
}
# The original's flags that say what one of ours says, in the same way ...
SAME = {
    "base_dir": "student",
    "teacher_model": "teacher",
    "seq_len": "seqlen",
    "max_samples": "nsamples",
    "lr": "learning_rate",
    "bs": "batch_size",
    "grad_acc": "gradient_accumulation",
    "kd_T": "temperature",
    "max_eval_samples": "eval_samples",
}
# ... and in another.
INSTEAD = {
    "out_adapters": "output_dir",
    "bundles_dir": "bundle",
    "b_merged_dir": "bundle",
    "epochs": "steps",
    "warmup_ratio": "warmup_steps",
}
# Where the original nests an adapter under --out_adapters.
ADAPTER_FOLDERS = {"A": "A_lora/stageA/stageA", "B": "B_lora/stageB", "C": "C_lora/stageC"}


@dataclass(frozen=True)
class TrainingRequest:
    """One adapter to train.

    Attributes:
        stage: as written: a part, or the original trainer's number.
        part: "A", "B" or "C", whose layers are adapted.
        student, bundles: what is trained: the A model or the merged A, and the bundles restored into it.
        teacher: the dense model; None trains on cross-entropy alone.
        output_dir: the adapter's directory.
        settings: everything else, by flag in this project's spelling; every flag of `DEFAULTS` is there.
        limit: what the number of windows was limited by, in words.
    """

    stage: str
    part: str
    student: str
    bundles: tuple[str, ...]
    teacher: str | None
    output_dir: str
    settings: Mapping
    limit: str

    def training(self, windows: int) -> TrainingSettings:
        """How to train, on so many windows."""
        given = self.settings
        modules = tuple(name.strip() for name in given["target_modules"].split(","))
        # PEFT writes alpha as it is given: 16, as everybody has it, and not 16.0.
        alpha = int(given["alpha"]) if given["alpha"] == int(given["alpha"]) else given["alpha"]
        hidden = None if given["hidden_loss"] is None else HiddenLoss(*given["hidden_loss"])
        held_out = HeldOutSettings(
            given["eval_steps"] or HeldOutSettings().eval_steps, given["keep"], given["patience"]
        )
        return TrainingSettings(
            LoraSettings(given["rank"], alpha, given["dropout"], modules, given["use_rslora"], given["use_dora"]),
            LossSettings(given["kd_alpha"], given["temperature"], given["kd_loss"], hidden),
            OptimiserSettings(**self.optimiser(windows)),
            held_out,
            given["adapt_layers"],
            given["seed"],
            given["gradient_checkpointing"],
            given["skip_spikes"],
            given["teacher_4bit"],
            given["stages"],
        )

    def running(self) -> Running:
        """How the training runs."""
        loggers = tuple(name.strip() for name in self.settings["loggers"].split(",") if name.strip())
        return Running(self.settings["save_steps"], loggers)

    def optimiser(self, windows: int) -> dict:
        """Settings by the names that `OptimiserSettings` has, for so many training windows."""
        given = self.settings
        steps, warmup = given["steps"], given["warmup_steps"]
        if given["epochs"] is not None:
            update = given["batch_size"] * given["gradient_accumulation"] * processes()
            steps = math.ceil(given["epochs"] * windows / update)
        if given["warmup_ratio"] is not None:
            warmup = math.ceil(given["warmup_ratio"] * steps)
        names = ("batch_size", "gradient_accumulation", "learning_rate", "weight_decay", "max_grad_norm")
        return {"steps": steps, "warmup_steps": warmup, **{name: given[name] for name in names}}

    def told(self, windows: int, text_windows: int) -> str:
        """What is about to be done, a line a matter.

        Args:
            windows: training windows.
            text_windows: how many the whole text has.
        """
        given, fit = self.settings, self.optimiser(windows)
        part = self.part if self.stage == self.part else f"{self.part} (stage {self.stage})"
        restored = f", with {' and '.join(self.bundles)} restored" if self.bundles else ""
        loss = "cross-entropy alone, no teacher"
        if self.teacher:
            loss = f"{loss_words(asdict(self.training(windows).loss), True)}, teacher {self.teacher}"
        cut = f" ({self.limit})" if windows < text_windows else ""
        batch = f"{fit['batch_size']} x {fit['gradient_accumulation']}"
        batch += f" x {processes()} processes" if processes() > 1 else ""
        passes = passes_over(windows, self.training(windows).optimiser, processes())
        lines = [
            f"student: {self.student}{restored}; adapter of {part}{stage_words(given['stages'])}",
            f"loss:    {loss}",
            f"text:    {windows} of {text_windows} windows of {given['seqlen']} tokens{cut}",
            f"LoRA:    rank {given['rank']}, alpha {given['alpha']:g}, dropout {given['dropout']:g}",
            f"updates: {fit['steps']} of {batch} windows, {passes:.2f} times the text; {fit['warmup_steps']} to warm up"
            f" to learning rate {fit['learning_rate']:g}",
        ]
        if "logging_steps" in given:
            lines.append("log:     training.csv keeps every update, whatever --logging_steps says")
        return "\n".join(lines)


def training_request(given: Mapping[str, Any]) -> TrainingRequest:
    """Make one request of the flags that a command line gives.

    Args:
        given: what stands in the command line, by flag without its dashes; nothing that was left out.

    Raises:
        PipelineError: one thing said twice or left out, flags that contradict each other.
        LayoutError, CheckpointError: bundles that are not those of the student, or not what their flag says.
    """
    _refuse_said_twice(given)
    stage = given["stage"]
    part, original = PARTS[stage], stage != PARTS[stage]
    settings = {**DEFAULTS, **(ORIGINAL_DEFAULTS if original else {})}
    settings |= {SAME.get(name, name): value for name, value in given.items()}
    if "steps" in given:
        settings["epochs"] = None
    if "warmup_steps" in given:
        settings["warmup_ratio"] = None
    if original and "use_kd" not in given:
        _refuse_unused_teacher(given)
        settings["kd_alpha"] = 0.0
    _check_held_out(settings, given)
    if "prefix_from" in given and "prefix_states" not in given:
        raise PipelineError(
            "no states are made", where="--prefix_from", mend="give --prefix_states FILE, or leave it out"
        )
    _check_teacher(settings, "--teacher_model" if original else "--teacher")
    settings |= _text(given)
    student = _needed(settings, "student", "base_dir")
    limit = next((f"--{name}" for name in ("nsamples", "max_samples") if name in given), "the default of --max_samples")
    return TrainingRequest(
        stage=stage,
        part=part,
        student=student,
        bundles=_bundles(given, part, student),
        teacher=settings.get("teacher"),
        output_dir=_output_dir(settings, part),
        settings=settings,
        limit=limit,
    )


def _text(given: Mapping) -> dict:
    """What a command line says of the text: its words take the place of the defaults, which are one text each.

    Raises:
        PipelineError: two texts are named, or one that is neither a preset nor a path.
    """
    named = [name for name in ("dataset", "text_file", "qa_dataset") if name in given]
    if len(named) > 1:
        raise PipelineError(f"--{named[0]} and --{named[1]} name two texts", mend="give one of them")
    if "mirror" in given and named == ["qa_dataset"]:
        raise PipelineError(
            "a mirror is of a --dataset", where="--mirror", mend="give a local copy as --qa_dataset PATH"
        )
    if not named:
        return {}
    return {"dataset": given.get("dataset"), "qa_dataset": given.get("qa_dataset")}


def _refuse_said_twice(given: Mapping) -> None:
    for theirs, ours in (*SAME.items(), *INSTEAD.items()):
        if theirs in given and ours in given:
            raise PipelineError(f"--{theirs} and --{ours} say one thing twice", mend="give one of them")


def _refuse_unused_teacher(given: Mapping) -> None:
    """Raise a PipelineError for a teacher without --use_kd, which is what makes the original learn from one."""
    said = [name for name in ("teacher_model", "teacher", "teacher_states", "kd_T", "temperature") if name in given]
    said += ["kd_alpha"] if given.get("kd_alpha") else []
    if said:
        raise PipelineError(
            f"{', '.join(f'--{name}' for name in said)} without --use_kd, and so without a teacher",
            mend="give --use_kd, or leave them out to train on cross-entropy alone",
        )


def _check_teacher(settings: Mapping, flag: str) -> None:
    """Raise a PipelineError unless there is a teacher where one is needed, on the student's device."""
    needed = settings["kd_alpha"] or settings["teacher_4bit"] or "teacher_states" in settings or "use_kd" in settings
    if needed and "teacher" not in settings:
        raise PipelineError("there is no teacher to learn from", where=flag, mend="name the dense model")
    if settings["teacher_4bit"] and "teacher_states" in settings:
        raise PipelineError(
            "stored states are those of the teacher as it is, not of a quantised one",
            where="--teacher_4bit",
            mend="leave it out, or --teacher_states",
        )
    if settings["hidden_loss"] and "teacher_states" in settings:
        raise PipelineError(
            "stored states are the teacher's final ones, and those of another layer are asked for too",
            where="--hidden_loss",
            mend="leave out --teacher_states, so that the teacher runs along; the workflow stores both",
        )
    place = settings.get("teacher_device", "auto")
    if place not in ("auto", settings["device"]):
        raise PipelineError(
            f"the teacher runs where the student does, --device {settings['device']}, not on {place}",
            where="--teacher_device",
            mend=f"leave it out, or give --device {place}; --teacher_states FILE runs the teacher before the student"
            " is loaded",
        )


def _check_held_out(settings: Mapping, given: Mapping) -> None:
    """Raise a PipelineError for what only held-out windows can decide, where none are looked at."""
    if settings["eval_steps"]:
        return
    said = [name for name in ("patience", "eval_dataset", "eval_samples", "max_eval_samples") if name in given]
    said += ["keep"] if settings["keep"] == "best" else []
    if said:
        raise PipelineError(
            f"{', '.join(f'--{name}' for name in said)} without --eval_steps: no held-out windows are looked at",
            mend="give --eval_steps N, or leave it out",
        )


def _needed(settings: Mapping, ours: str, theirs: str) -> str:
    if ours not in settings:
        raise PipelineError(f"neither --{ours} nor --{theirs} is given", mend="see --help for whole command lines")
    return settings[ours]


def _output_dir(settings: Mapping, part: str) -> str:
    if "out_adapters" in settings:
        if part in _TOGETHER:
            raise PipelineError("parts that are trained together have no place in the original's folders",
                where="--out_adapters", mend="give --output_dir")  # fmt: skip
        return str(Path(settings["out_adapters"]) / ADAPTER_FOLDERS[part])
    return _needed(settings, "output_dir", "out_adapters")


def _bundles(given: Mapping, part: str, student: str) -> tuple[str, ...]:
    """The bundles to restore: those named outright, or found for the part where the original looks for them.

    --bundles_dir holds B and C; for stage 3 the original is given C's own directory, which is taken too.
    """
    merged, pruned = given.get("b_merged_dir"), given.get("bundles_dir")
    if merged is not None and part != "C" and part not in _TOGETHER:
        raise PipelineError(
            f"only C's adapter is trained with the merged B, and this is {part}'s",
            where="--b_merged_dir",
            mend="leave it out",
        )
    if part in _TOGETHER:
        return tuple(given.get("bundle", ()))
    if part == "A":
        if pruned is not None:
            _check_same_pruning(student, Path(pruned))
        return tuple(given.get("bundle", ()))
    if "bundle" in given:
        return tuple(given["bundle"])
    if pruned is None or (part == "C" and merged is None):
        flag = "bundles_dir" if pruned is None else "b_merged_dir"
        needs = "bundle B" if part == "B" else "the merged B and bundle C"
        raise PipelineError(
            f"{part}'s adapter is trained with {needs} restored", where=f"--{flag}", mend=f"give --{flag} (or --bundle)"
        )
    own = _bundle_in(Path(pruned), part)
    if merged is None:  # B's student, which has no merged B
        return (own,)
    _check_merged(Path(merged))
    return (merged, own)


def _bundle_in(folder: Path, part: str) -> str:
    return str(folder if is_bundle_dir(folder) else folder / part)


def _check_merged(bundle: Path) -> None:
    """Raise an error for a B whose bundle_meta.json does not say that its adapter is merged in."""
    if not is_bundle_dir(bundle):
        raise CheckpointError("is not a bundle", where=bundle, mend="give the directory that merging B wrote")
    bundle_layers(bundle)  # words the error of a malformed bundle_meta.json
    meta = read_json_if_there(bundle / "bundle_meta.json", LayoutError)
    if meta is not None and meta.get("merged") is not True:
        raise LayoutError(
            "this bundle is not a merged one, and C would be trained on a B without its adapter",
            where=bundle,
            mend="merge B's adapter first; to train on the pruned B all the same, name both bundles with --bundle",
        )


def _check_same_pruning(student: str, folder: Path) -> None:
    """Raise a LayoutError where the bundles of a directory, which A's training does not need, are another model's."""
    found = {part: folder / part for part in "BC" if is_bundle_dir(folder / part)}
    if not found:
        raise LayoutError("holds neither B nor C", where=folder, mend="give the directory that pruning wrote them to")
    layout = read_layout(student)
    if layout is None or layout.unassigned:
        return  # training refuses a student without parts; of one that does not tell B from C nothing can be said
    for part, bundle in found.items():
        held = bundle_layers(bundle)
        if held != layout.layers_of(part):
            raise LayoutError(
                f"{part} holds layers {list(held)}, and {student} was cut into {list(layout.layers_of(part))}",
                where=bundle,
                mend="give the bundles of the same pruning",
            )
