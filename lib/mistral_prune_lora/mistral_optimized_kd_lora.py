"""The command that trains the LoRA adapter of one part by distillation from the dense model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mistral_prune_lora.argument_types import (
    dropout,
    hidden_loss,
    layer_list,
    learning_rate,
    not_negative,
    positive,
    positive_number,
    seed,
    share,
    stage_shares,
    temperature,
)
from mistral_prune_lora.distillation.arguments import (
    ADAPTER_FOLDERS,
    DEFAULTS,
    ORIGINAL_DEFAULTS,
    PARTS,
    training_request,
)
from mistral_prune_lora.distillation.schedule import processes
from mistral_prune_lora.distillation.settings import KD_LOSSES, KEEP
from mistral_prune_lora.errors import CheckpointError, reports_errors
from mistral_prune_lora.quick_imports import huge_pages, quick_imports
from mistral_prune_lora.text.dataset_spec import DatasetSpec, question_dataset

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
        " answers like the dense one. Loss: kd_alpha T^2 divergence from the teacher + (1 - kd_alpha) cross-entropy.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    p.add_argument("--stage", required=True, choices=tuple(PARTS),
        help="the part whose layers are adapted; 1, 2, 3 are A, B, C with the original trainer's defaults; AB and FULL"
        " train all parts of that stage together, for comparison")  # fmt: skip
    p.add_argument("--teacher", metavar="MODEL",
        help="the dense model: a directory or a Hub id; needed unless --kd_alpha is 0")  # fmt: skip
    p.add_argument("--student", metavar="DIR", help="the pruned A for stage A, else the merged A")
    p.add_argument("--bundle", action="append", metavar="DIR", help="a bundle to restore; may be repeated")
    p.add_argument("--start_adapter", metavar="DIR",
        help="a LoRA adapter of this part to start from, say in closed form; the result holds it too")  # fmt: skip
    p.add_argument("--output_dir", metavar="DIR", help="the adapter's directory; a former one is replaced")
    p.add_argument("--overwrite", action="store_true",
        help="replace what is there even if it is no such adapter; never an input")  # fmt: skip
    p.add_argument("--teacher_states", metavar="FILE", help="reuse the teacher's states; made here if not there yet")
    p.add_argument("--prefix_states", metavar="FILE",
        help="reuse what enters the first adapted layer, for other seeds and settings; made here if not there yet."
        " Without it, that is kept while training goes over the text more than once")  # fmt: skip
    p.add_argument("--prefix_from", metavar="FILE", help="B's --prefix_states, for C's to set out from")
    _add_text(p.add_argument_group("text"))
    _add_adapter(p.add_argument_group("adapter"))
    _add_training(p.add_argument_group("training"))
    _add_held_out(p.add_argument_group("held-out text"))
    _add_original(p)
    return p


def _default(name: str) -> str:
    theirs = f"; {ORIGINAL_DEFAULTS[name]} with --stage 1, 2, 3" if ORIGINAL_DEFAULTS.get(name) is not None else ""
    return f"(default: {DEFAULTS[name]}{theirs})"


def _add_text(text) -> None:
    text.add_argument("--dataset",
        help="wikitext2, c4, ptb, pydoc or a path (default: wikitext2; with --stage 1, 2, 3"
        " --qa_dataset squad)")  # fmt: skip
    text.add_argument("--mirror", metavar="DIR", help="a local copy of the dataset (default: the Hub)")
    text.add_argument("--text_file", action="append", metavar="FILE", help="train on text files instead")
    text.add_argument("--seqlen", type=positive, metavar="N", help=f"tokens in a window {_default('seqlen')}")
    text.add_argument("--nsamples", type=positive, metavar="N",
        help="windows from the start of the text, or questions (default: all; 20000 at most with --stage 1, 2,"
        " 3)")  # fmt: skip


def _add_adapter(lora) -> None:
    lora.add_argument("--rank", type=positive, metavar="N", help=_default("rank"))
    lora.add_argument("--alpha", type=positive_number, metavar="X", help=_default("alpha"))
    lora.add_argument("--dropout", type=dropout, metavar="X", help=_default("dropout"))
    lora.add_argument("--target_modules", metavar="LIST", 
        help=f"names or patterns, such as mlp.*, separated by commas {_default('target_modules')}")  # fmt: skip
    lora.add_argument("--adapt_layers", type=layer_list, metavar="LIST",
        help="original indices, such as 20-23,29 (default: all of the part's layers)")  # fmt: skip
    lora.add_argument("--use_rslora", action="store_true", help="scale by alpha / sqrt(rank)")
    lora.add_argument("--use_dora", action="store_true", help="learn magnitudes apart from directions")


def _add_training(fit) -> None:
    fit.add_argument("--kd_loss", choices=KD_LOSSES, help=f"the divergence from the teacher {_default('kd_loss')}")
    fit.add_argument("--kd_alpha", type=share, metavar="X",
        help=f"weight of the divergence; the rest is cross-entropy's {_default('kd_alpha')}")  # fmt: skip
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
    fit.add_argument("--stages", type=stage_shares, metavar="A=X,AB=Y,FULL=Z",
        help="train A's adapter for several stages at once, each with its share of the loss, with the bundles of the"
        " largest restored (default: for stage A)")  # fmt: skip
    fit.add_argument("--hidden_loss", type=hidden_loss, metavar="S:T[:W]",
        help="also W (1 - cosine) of what leaves the student's layer S and the teacher's T (default: no)")  # fmt: skip
    fit.add_argument("--skip_spikes", type=positive_number, metavar="X",
        help="leave out updates whose loss is above X times the median of the last 20 (default: never)")  # fmt: skip
    fit.add_argument("--save_steps", type=not_negative, metavar="N",
        help="updates between two saved states, from which the same command goes on after a kill; 0: only when asked to"
        f" end {_default('save_steps')}")  # fmt: skip
    fit.add_argument("--loggers", metavar="LIST", help="tensorboard, trackio (default: none)")
    fit.add_argument("--seed", type=seed, metavar="N", help=_default("seed"))
    fit.add_argument("--gradient_checkpointing", action="store_true", help="less memory, one more forward pass")
    fit.add_argument("--device", help=f"auto, cpu or cuda:N {_default('device')}")
    fit.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help=f"of frozen weights {_default('dtype')}")


def _add_held_out(look) -> None:
    look.add_argument("--eval_steps", type=not_negative, metavar="N",
        help="updates between two looks at held-out windows; 0 looks at none (default: 0)")  # fmt: skip
    look.add_argument("--eval_dataset", metavar="NAME",
        help="the validation split of another text (default: what follows the training windows in theirs)")  # fmt: skip
    look.add_argument("--eval_samples", type=positive, metavar="N",
        help=f"windows at most {_default('eval_samples')}")  # fmt: skip
    look.add_argument("--keep", choices=KEEP,
        help=f"the adapter of the last update, or the one closest to the teacher there {_default('keep')}")  # fmt: skip
    look.add_argument("--patience", type=positive, metavar="N",
        help="looks without a better one until training ends (default: never)")  # fmt: skip


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
    same.add_argument("--max_eval_samples", type=positive, metavar="N", help="as --eval_samples")
    same.add_argument("--save_total_limit", type=not_negative, metavar="N",
        help="changes nothing: one state is kept, the last, until the adapter is there")  # fmt: skip
    same.add_argument("--teacher_4bit", action="store_true",
        help="quantise the teacher to four bits: needs a GPU and the package bitsandbytes")  # fmt: skip
    same.add_argument("--qa_dataset", metavar="NAME",
        help="train on answers to questions: squad or squad_v2 from the Hub, a PATH to such files, or NAME=PATH"
        " (default with --stage 1, 2, 3: squad)")  # fmt: skip


@reports_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    request = training_request(vars(parser().parse_args(argv)))
    huge_pages()
    with quick_imports():
        from mistral_prune_lora.checkpoints.families import read_config
        from mistral_prune_lora.checkpoints.model_place import model_directory
        from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
        from mistral_prune_lora.distillation.prefix import holds_prefix, open_prefix, prefix_output, prefix_states
        from mistral_prune_lora.distillation.prepare import TrainingData
        from mistral_prune_lora.distillation.schedule import FROZEN_BATCH
        from mistral_prune_lora.distillation.student import Student
        from mistral_prune_lora.distillation.teacher_record import check_teacher
        from mistral_prune_lora.distillation.teacher_states import holds_states, states_output, teacher_states
        from mistral_prune_lora.distillation.train import TrainingJob, train_adapter
        from mistral_prune_lora.distillation.written import RECORD
        from mistral_prune_lora.storage.outputs import Output, claim
        from mistral_prune_lora.storage.transaction import check_place
        from mistral_prune_lora.streaming.compute import Compute

    given, overwrite = request.settings, request.settings["overwrite"]
    part = request.part
    compute, states = Compute.named(given["device"], given["dtype"], FROZEN_BATCH), given.get("teacher_states")
    prefix, start = given.get("prefix_states"), given.get("prefix_from")
    read = [
        request.teacher,
        request.student,
        *request.bundles,
        *given.get("text_file", ()),
        given["dataset"],
        start,
        given.get("start_adapter"),
    ]
    questions = None if given["qa_dataset"] is None else question_dataset(given["qa_dataset"])
    read += [questions.dataset] if questions else []
    outputs = [Output.directory(request.output_dir, "--output_dir", RECORD)]
    outputs += [*map(states_output, [states] if states else []), *map(prefix_output, [prefix] if prefix else [])]
    claim(outputs, [*read, given.get("mirror"), given.get("eval_dataset")], overwrite=overwrite)
    check_place(request.output_dir)
    check_place(*(path for path in (states, prefix) if path), directory=False)
    teacher = model_directory(request.teacher) if request.teacher else None
    if teacher:
        check_teacher(teacher, request.student)
    read_config(request.student)  # refused before the text is fetched
    student = Student(request.student, request.bundles)
    first = min(student.adapted_layers(part, given["adapt_layers"], tuple(given["stages"])))
    windows, held_out = _windows(given, questions, load_tokenizer(teacher or request.student))
    print(request.told(len(windows), windows.identity.text_windows), flush=True)
    if told := windows.identity.examples:
        print(f"answers: {windows.predicted_tokens} tokens of {told['examples']} examples are learnt", flush=True)
    data = TrainingData(windows, states if teacher else None, prefix_states=prefix)
    job = TrainingJob(
        part,
        student,
        teacher,
        data,
        Path(request.output_dir),
        request.training(len(windows)),
        compute,
        None if held_out is None else TrainingData(held_out),
        request.running(),
        given.get("start_adapter"),
    )
    job.check()
    missing = [
        path for path, is_there in ((prefix, holds_prefix), (states, holds_states)) if path and not is_there(path)
    ]
    if missing and processes() > 1:
        raise CheckpointError("is not there yet", where=missing[0], mend="make it first, with a single process")
    if prefix and prefix in missing:
        prefix_states(student, first, windows, prefix, compute=compute, start=start, overwrite=overwrite)
    elif prefix:
        open_prefix(prefix, student, first, windows, compute.dtype, compute.device)
    if teacher and states and states in missing:
        teacher_states(teacher, windows, states, compute=compute, overwrite=overwrite)
    train_adapter(job, overwrite=overwrite)
    print(f"adapter of {part}: {request.output_dir}")


def _windows(given, questions: DatasetSpec | None, tokenizer):
    """The training windows, of a text or of questions, and the held-out ones if any are looked at."""
    from mistral_prune_lora.errors import DataError
    from mistral_prune_lora.text.sources import load_text
    from mistral_prune_lora.text.windows import first_windows, make_windows, windows_between

    texts, seqlen, count = given.get("text_file", ()), given["seqlen"], given["nsamples"]
    looked = given["eval_samples"] if given["eval_steps"] else 0
    follow = looked if "eval_dataset" not in given else 0
    most = count + follow if count else None
    if questions:
        every = _question_windows(questions, tokenizer, seqlen, most)
    else:
        text = load_text(given["dataset"], split="train", mirror=given.get("mirror"), text_files=texts)
        every = make_windows(text, tokenizer, seqlen=seqlen, max_windows=most)
    if follow and len(every) < 2:
        raise DataError(
            "the text has one window, and none is left to hold out",
            where=every.identity.source,
            mend="name an --eval_dataset",
        )
    if follow:
        # Of a text that is too short for both, at most half is held out.
        kept = min(count or len(every), max(len(every) - follow, (len(every) + 1) // 2))
        return first_windows(every, kept), windows_between(every, kept, min(kept + follow, len(every)))
    if not looked:
        return every, None
    other = load_text(given["eval_dataset"], split="validation")
    return every, make_windows(other, tokenizer, seqlen=seqlen, max_windows=looked)


def _question_windows(questions: DatasetSpec, tokenizer, seqlen: int, count: int | None):
    """The windows of questions; DataError with a way out where the Hub is not to be had."""
    from mistral_prune_lora.errors import DataError
    from mistral_prune_lora.text.dataset_windows import dataset_windows

    try:
        return dataset_windows(questions, tokenizer, seqlen=seqlen, count=count)
    except DataError as error:
        if not questions.is_on_hub:
            raise
        mend = f"{error.mend}; a local copy is given as --qa_dataset {questions.preset}=PATH"
        raise DataError(error.what, where=error.where, mend=mend) from None


if __name__ == "__main__":
    sys.exit(main())
