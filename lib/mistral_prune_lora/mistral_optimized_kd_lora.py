"""The command that trains the LoRA adapter of one part by distillation from the dense model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mistral_prune_lora.argument_types import (
    dropout,
    learning_rate,
    not_negative,
    positive,
    positive_number,
    seed,
    share,
    temperature,
)
from mistral_prune_lora.distillation.arguments import (
    ADAPTER_FOLDERS,
    DEFAULTS,
    NOT_TAKEN,
    ORIGINAL_DEFAULTS,
    PARTS,
    training_request,
)
from mistral_prune_lora.errors import CheckpointError, reports_errors

EXAMPLES = """examples, in the order they must be run (merge each adapter before the next part is trained):
  A, on the pruned model:
    python -m mistral_prune_lora.mistral_optimized_kd_lora --stage A --teacher ./Mistral-7B-v0.1 \\
      --student ./25_mistral_results/pruning/A --dataset wikitext2 \\
      --output_dir ./mistral_kd_lora_results/adapters/A_lora/stageA/stageA
  B, on the merged A with bundle B restored:
    python -m mistral_prune_lora.mistral_optimized_kd_lora --stage B --teacher ./Mistral-7B-v0.1 \\
      --student ./merged_models_mistral_7b/A_merged --bundle ./25_mistral_results/pruning/bundles/B \\
      --dataset wikitext2 --output_dir ./mistral_kd_lora_results/adapters/B_lora/stageB
  C, on the merged A and B with bundle C restored:
    python -m mistral_prune_lora.mistral_optimized_kd_lora --stage C --teacher ./Mistral-7B-v0.1 \\
      --student ./merged_models_mistral_7b/A_merged --bundle ./merged_models_mistral_7b/B_merged \\
      --bundle ./25_mistral_results/pruning/bundles/C \\
      --dataset wikitext2 --output_dir ./mistral_kd_lora_results/adapters/C_lora/stageC
  A, in the original trainer's flags (see docs/from-the-original-scripts.md):
    python -m mistral_prune_lora.mistral_optimized_kd_lora --stage 1 \\
      --base_dir ./25_mistral_results/pruning/A --bundles_dir ./25_mistral_results/pruning/bundles \\
      --out_adapters ./mistral_kd_lora_results/adapters --dataset wikitext2 \\
      --seq_len 1024 --lr 3e-4 --epochs 1 --bs 1 --grad_acc 32 \\
      --use_kd --teacher_model ./Mistral-7B-v0.1 --kd_alpha 0.1 --kd_T 2.0
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments. Nothing has a default here: `training_request` is told only what was given."""
    p = argparse.ArgumentParser(
        prog="python -m mistral_prune_lora.mistral_optimized_kd_lora",
        description="Train a LoRA adapter for the kept layers (A) or one bundle's layers (B, C) so that the model"
        " answers like the dense one. Loss: kd_alpha T^2 KL(teacher||student) + (1 - kd_alpha) cross-entropy.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    p.add_argument("--stage", required=True, choices=tuple(PARTS),
        help="the part whose layers are adapted; 1, 2, 3 are A, B, C with the original trainer's defaults")  # fmt: skip
    p.add_argument("--teacher", metavar="MODEL",
        help="the dense model: a directory or a Hub id; needed unless --kd_alpha is 0")  # fmt: skip
    p.add_argument("--student", metavar="DIR", help="the pruned A for stage A, else the merged A")
    p.add_argument("--bundle", action="append", metavar="DIR", help="a bundle to restore; may be repeated")
    p.add_argument("--output_dir", metavar="DIR", help="the adapter's directory; a former one is replaced")
    p.add_argument("--overwrite", action="store_true",
        help="replace what is there even if it is no such adapter; never an input")  # fmt: skip
    p.add_argument("--teacher_states", metavar="FILE", help="reuse the teacher's states; made here if not there yet")
    _add_text(p.add_argument_group("text"))
    _add_adapter(p.add_argument_group("adapter"))
    _add_training(p.add_argument_group("training"))
    _add_original(p)
    return p


def _default(name: str) -> str:
    theirs = f"; {ORIGINAL_DEFAULTS[name]} with --stage 1, 2, 3" if ORIGINAL_DEFAULTS.get(name) is not None else ""
    return f"(default: {DEFAULTS[name]}{theirs})"


def _add_text(text) -> None:
    text.add_argument("--dataset",
        help="wikitext2, c4, ptb, pydoc or a path (default: wikitext2; none with --stage 1, 2, 3)")  # fmt: skip
    text.add_argument("--mirror", metavar="DIR", help="a local copy of the dataset (default: the Hub)")
    text.add_argument("--text_file", action="append", metavar="FILE", help="train on text files instead")
    text.add_argument("--seqlen", type=positive, metavar="N", help=f"tokens in a window {_default('seqlen')}")
    text.add_argument("--nsamples", type=positive, metavar="N",
        help="windows, from the start of the text (default: all; 20000 at most with --stage 1, 2, 3)")  # fmt: skip


def _add_adapter(lora) -> None:
    lora.add_argument("--rank", type=positive, metavar="N", help=_default("rank"))
    lora.add_argument("--alpha", type=positive_number, metavar="X", help=_default("alpha"))
    lora.add_argument("--dropout", type=dropout, metavar="X", help=_default("dropout"))
    lora.add_argument("--target_modules", metavar="LIST", help=f"separated by commas {_default('target_modules')}")
    lora.add_argument("--use_rslora", action="store_true", help="scale by alpha / sqrt(rank)")
    lora.add_argument("--use_dora", action="store_true", help="learn magnitudes apart from directions")


def _add_training(fit) -> None:
    fit.add_argument("--kd_alpha", type=share, metavar="X", help=f"weight of the KL part {_default('kd_alpha')}")
    fit.add_argument("--temperature", type=temperature, metavar="X", help=f"T {_default('temperature')}")
    fit.add_argument("--steps", type=positive, metavar="N",
        help=f"updates (default: {DEFAULTS['steps']}; with --stage 1, 2, 3 what --epochs 1 comes to)")  # fmt: skip
    fit.add_argument("--batch_size", type=positive, metavar="N",
        help=f"windows in a forward pass {_default('batch_size')}")  # fmt: skip
    fit.add_argument("--gradient_accumulation", type=positive, metavar="N",
        help=f"forward passes in an update {_default('gradient_accumulation')}")  # fmt: skip
    fit.add_argument("--learning_rate", type=learning_rate, metavar="X", help=f"its peak {_default('learning_rate')}")
    fit.add_argument("--warmup_steps", type=not_negative, metavar="N",
        help=f"updates until the peak (default: {DEFAULTS['warmup_steps']}; with --stage 1, 2, 3 what"
        " --warmup_ratio 0.1 comes to)")  # fmt: skip
    fit.add_argument("--weight_decay", type=share, metavar="X", help=_default("weight_decay"))
    fit.add_argument("--max_grad_norm", type=positive_number, metavar="X", help=_default("max_grad_norm"))
    fit.add_argument("--seed", type=seed, metavar="N", help=_default("seed"))
    fit.add_argument("--gradient_checkpointing", action="store_true", help="less memory, one more forward pass")
    fit.add_argument("--device", help=f"auto, cpu or cuda:N {_default('device')}")
    fit.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help=f"of frozen weights {_default('dtype')}")


def _add_original(p: argparse.ArgumentParser) -> None:
    places = ", ".join(f"{ADAPTER_FOLDERS[part]} for {stage}" for stage, part in PARTS.items() if stage != part)
    same = p.add_argument_group(
        "the original trainer's flags", "They may stand beside the others, unless both say the same thing."
    )
    same.add_argument("--base_dir", metavar="DIR", help="as --student")
    same.add_argument("--bundles_dir", metavar="DIR",
        help="where the pruned B and C lie; stage 3 may be given C itself. Found there: --bundle")  # fmt: skip
    same.add_argument("--b_merged_dir", metavar="DIR", help="the merged B, needed for stage 3 unless --bundle is given")
    same.add_argument("--out_adapters", metavar="DIR", help=f"--output_dir is then below it: {places}")
    same.add_argument("--max_samples", type=positive, metavar="N", help="as --nsamples")
    same.add_argument("--seq_len", type=positive, metavar="N", help="as --seqlen")
    same.add_argument("--lr", type=learning_rate, metavar="X", help="as --learning_rate")
    same.add_argument("--epochs", type=positive_number, metavar="X",
        help="instead of --steps: as many updates as so many passes over the text make, rounded up")  # fmt: skip
    same.add_argument("--bs", type=positive, metavar="N", help="as --batch_size")
    same.add_argument("--grad_acc", type=positive, metavar="N", help="as --gradient_accumulation")
    same.add_argument("--warmup_ratio", type=share, metavar="X",
        help="instead of --warmup_steps: a share of the updates, rounded up")  # fmt: skip
    same.add_argument("--use_kd", action="store_true",
        help="learn from the teacher; with --stage 1, 2, 3, it is cross-entropy alone without this flag")  # fmt: skip
    same.add_argument("--teacher_model", metavar="MODEL", help="as --teacher")
    same.add_argument("--teacher_device", metavar="DEVICE", help="auto, or what --device says: they share one")
    same.add_argument("--kd_T", type=temperature, metavar="X", help="as --temperature")
    same.add_argument("--logging_steps", type=not_negative, metavar="N",
        help="changes nothing: every update is in training.csv")  # fmt: skip
    refused = p.add_argument_group("the original trainer's flags that are not taken")
    refused.add_argument("--teacher_4bit", action="store_true", help=NOT_TAKEN["teacher_4bit"])
    refused.add_argument("--qa_dataset", metavar="NAME", help=NOT_TAKEN["qa_dataset"])
    for name in ("max_eval_samples", "eval_steps", "save_steps", "save_total_limit"):
        refused.add_argument(f"--{name}", type=not_negative, metavar="N", help=NOT_TAKEN[name])


@reports_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    request = training_request(vars(parser().parse_args(argv)))
    from mistral_prune_lora.checkpoints.families import read_config
    from mistral_prune_lora.checkpoints.model_place import model_directory
    from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
    from mistral_prune_lora.distillation.student import Student
    from mistral_prune_lora.distillation.teacher import TeacherFiles
    from mistral_prune_lora.distillation.teacher_states import holds_states, states_output, teacher_states
    from mistral_prune_lora.distillation.train import RECORD, train_adapter
    from mistral_prune_lora.storage.outputs import Output, claim
    from mistral_prune_lora.storage.transaction import check_place
    from mistral_prune_lora.streaming.compute import Compute
    from mistral_prune_lora.text.sources import load_text
    from mistral_prune_lora.text.windows import make_windows

    given, overwrite = request.settings, request.settings["overwrite"]
    compute, states = Compute.named(given["device"], given["dtype"]), given.get("teacher_states")
    read = [request.teacher, request.student, *request.bundles, *given.get("text_file", ()), given["dataset"]]
    outputs = [Output.directory(request.output_dir, "--output_dir", RECORD)]
    kept = [states] if states else []
    claim([*outputs, *map(states_output, kept)], [*read, given.get("mirror")], overwrite=overwrite)
    check_place(request.output_dir)
    check_place(*kept, directory=False)
    teacher = model_directory(request.teacher) if request.teacher else None
    if teacher:
        _check_whole(teacher)
        _check_vocabularies(request.student, teacher)
    read_config(request.student)  # refused before the text is fetched
    text = load_text(given["dataset"], split="train", mirror=given.get("mirror"), text_files=given.get("text_file", ()))
    tokenizer = load_tokenizer(teacher or request.student)
    windows = make_windows(text, tokenizer, seqlen=given["seqlen"], max_windows=given["nsamples"])
    print(request.told(len(windows), windows.identity.text_windows), flush=True)
    if teacher and states and not holds_states(states):
        teacher_states(teacher, windows, states, compute=compute, overwrite=overwrite)
    train_adapter(
        request.part,
        Student(request.student, request.bundles),
        TeacherFiles(teacher, states) if teacher else None,
        windows,
        request.output_dir,
        settings=request.training(len(windows)),
        compute=compute,
        overwrite=overwrite,
    )
    print(f"adapter of {request.part}: {request.output_dir}")


def _check_whole(teacher: Path) -> None:
    """Raise a CheckpointError for a pruned model: nobody wants to be taught what its missing layers come to."""
    from mistral_prune_lora.checkpoints.manifest import read_layout

    layout = read_layout(teacher)
    if layout and layout.dropped:
        raise CheckpointError(
            f"the teacher is a pruned model: its manifest.json drops layers {list(layout.dropped)}",
            where=teacher,
            mend="name the dense model that the student was cut from, or one tuned from it",
        )


def _check_vocabularies(student: str, teacher: Path) -> None:
    """Raise a CheckpointError where the two models' logits are not of the same tokens."""
    from mistral_prune_lora.checkpoints.families import read_config

    sizes = [read_config(folder).get("vocab_size") for folder in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the teacher's vocabulary has {sizes[1]} tokens, the student's {sizes[0]}",
            where=teacher,
            mend="name the dense model that the student was cut from, or one tuned from it",
        )


if __name__ == "__main__":
    sys.exit(main())
