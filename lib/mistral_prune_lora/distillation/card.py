"""The model card of a trained adapter: what it is for, what it was trained on and how, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mistral_prune_lora.layout.partition import spans

_HEADER = """---
library_name: peft
base_model: {base}
tags:
- lora
- knowledge-distillation
- layer-pruning
---

# LoRA adapter of part {part}

Trained by {package} {version} for layers {layers} (original indices) of a model that was cut into a fast-starting
part A and the restorable bundles B and C.

"""


def model_card(about: Mapping, held_out: Sequence[Mapping] = ()) -> str:
    """The card as Markdown.

    Args:
        about: the content of training.json.
        held_out: rows of held_out.csv.
    """
    lora, optimiser = about["settings"]["lora"], about["settings"]["optimiser"]
    versions = dict(about["versions"])
    package, version = next(iter(versions.items()))
    text = _HEADER.format(
        base=about["student"]["dir"],
        part=about["stage"],
        package=package,
        version=version,
        layers=spans(about["layers"]),
    )
    windows = about["windows"]
    batch = f"{optimiser['batch_size']} x {optimiser['gradient_accumulation']}"
    batch += f" x {about['processes']} processes" if about["processes"] > 1 else ""
    rows = {
        "student": _student(about),
        **({"started from": about["start"]["dir"]} if about.get("start") else {}),
        "teacher": about["teacher"]["dir"] if about["teacher"] else "none",
        "loss": loss_words(about["settings"]["loss"], bool(about["teacher"]))
        + stage_words(about["settings"].get("stages") or {}),
        "LoRA": f"rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, on"
        f" {', '.join(lora['target_modules'])}",
        "data": f"{windows['windows']} windows of {windows['seqlen']} tokens of {windows['dataset']}"
        f" ({windows['split']}), {about['scored_tokens']} tokens scored",
        "updates": f"{about['updates']} of {optimiser['steps']}, each of {batch} windows",
        "learning rate": f"{optimiser['learning_rate']:g} after {optimiser['warmup_steps']} updates of warm-up, then a"
        " cosine to zero",
        "kept": f"the adapter after update {about['kept_step']}"
        + (f"; {about['skipped']} updates were left out as spikes" if about["skipped"] else ""),
        "dtype": f"{about['dtype']} of frozen weights, float32 of the adapter; seed {about['seed']}",
    }
    text += "| | |\n|---|---|\n" + "".join(f"| {name} | {told} |\n" for name, told in rows.items())
    if held_out:
        text += "\nOn windows that were not trained on:\n\n" + _table(held_out)
    return text + (
        "\n`training.json` has the digests of everything that went in, `training.csv` a row for every update.\n"
        "The adapter's indices are those of the dense model: merge it with\n"
        "`python -m mistral_prune_lora.pruning.mistral_merge_adapter`, or load it with PEFT onto the student above.\n"
        "Its licence is that of the model it was trained on.\n"
    )


def loss_words(loss: Mapping, taught: bool) -> str:
    """The loss as a formula."""
    if not taught:
        return "cross-entropy"
    words = {
        "forward_kl": "KL(teacher || student)", "reverse_kl": "KL(student || teacher)", "js": "JS(teacher, student)",
    }  # fmt: skip
    alpha, t = loss["kd_alpha"], loss["temperature"]
    pieces = (
        [f"{'' if alpha == 1 else f'{alpha:g} '}{'' if t == 1 else 'T^2 '}{words[loss['kd_loss']]}"] if alpha else []
    )
    pieces += [f"{1 - alpha:g} cross-entropy"] if alpha < 1 else []
    if loss["hidden"]:
        hidden = loss["hidden"]
        pieces.append(
            f"{hidden['weight']:g} (1 - cosine) of layers {hidden['student_layer']} and {hidden['teacher_layer']}"
        )
    return " + ".join(pieces) + ("" if t == 1 or not alpha else f", T {t:g}")


def stage_words(stages: Mapping[str, float]) -> str:
    """The stages that one adapter is trained for, behind what it is the adapter of; empty for its own."""
    told = ", ".join(f"{stage} ({share / sum(stages.values()):.0%})" for stage, share in stages.items())
    return f" for the stages {told}" if told else ""


def _student(about: Mapping) -> str:
    bundles = list(about["bundles"])
    return about["student"]["dir"] + (f", with {' and '.join(bundles)} restored" if bundles else "")


def _table(rows: Sequence[Mapping]) -> str:
    names = [name for name in rows[0] if any(not math.isnan(row[name]) for row in rows)]
    shown = [rows[0], *([rows[-1]] if len(rows) > 1 else [])]
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(f"{row[name]:.6g}" for name in names) for row in shown]
    return "".join(f"| {line} |\n" for line in lines)
