"""The command that trains the LoRA adapter of one part by distillation from the dense model."""

from __future__ import annotations

import argparse
import sys

from mistral_prune_lora.argument_types import not_negative, positive
from mistral_prune_lora.errors import reports_errors

EXAMPLES = """examples, in the order they must be run (merge each adapter before the next part is trained):
  A, on the pruned model:
    python -m mistral_prune_lora.mistral_optimized_kd_lora --stage A --teacher ./Mistral-7B-v0.1 \\
      --student ./25_mistral_results/pruning/A --dataset wikitext2 \\
      --output_dir ./mistral_kd_lora_results/adapters/A_lora/stageA
  B, on the merged A with bundle B restored:
    python -m mistral_prune_lora.mistral_optimized_kd_lora --stage B --teacher ./Mistral-7B-v0.1 \\
      --student ./merged_models_mistral_7b/A_merged --bundle ./25_mistral_results/pruning/bundles/B \\
      --dataset wikitext2 --output_dir ./mistral_kd_lora_results/adapters/B_lora/stageB
  C, on the merged A and B with bundle C restored:
    python -m mistral_prune_lora.mistral_optimized_kd_lora --stage C --teacher ./Mistral-7B-v0.1 \\
      --student ./merged_models_mistral_7b/A_merged --bundle ./merged_models_mistral_7b/B_merged \\
      --bundle ./25_mistral_results/pruning/bundles/C \\
      --dataset wikitext2 --output_dir ./mistral_kd_lora_results/adapters/C_lora/stageC
"""
MODULES = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m mistral_prune_lora.mistral_optimized_kd_lora",
        description="Train a LoRA adapter for the kept layers (A) or one bundle's layers (B, C) so that the model"
        " answers like the dense one. Loss: kd_alpha T^2 KL(teacher||student) + (1 - kd_alpha) cross-entropy.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--stage", required=True, choices=("A", "B", "C"), help="the part whose layers are adapted")
    p.add_argument("--teacher", required=True, metavar="MODEL", help="the dense model: a directory or a Hub id")
    p.add_argument("--student", required=True, metavar="DIR", help="the pruned A for stage A, else the merged A")
    p.add_argument("--bundle", action="append", default=[], metavar="DIR", help="a bundle to restore; may be repeated")
    p.add_argument(
        "--output_dir", required=True, metavar="DIR", help="the adapter's directory; a former one is replaced"
    )
    p.add_argument(
        "--overwrite", action="store_true", help="replace what is there even if it is no such adapter; never an input"
    )
    p.add_argument("--teacher_states", metavar="FILE", help="reuse the teacher's states; made here if not there yet")
    text = p.add_argument_group("text")
    text.add_argument("--dataset", default="wikitext2", help="wikitext2, c4, ptb, pydoc or a path (default: wikitext2)")
    text.add_argument("--mirror", metavar="DIR", help="a local copy of the dataset (default: the Hub)")
    text.add_argument("--text_file", action="append", default=[], metavar="FILE", help="train on text files instead")
    text.add_argument("--seqlen", type=positive, default=2048, help="tokens in a window (default: %(default)s)")
    text.add_argument("--nsamples", type=positive, help="windows, from the start of the text (default: all)")
    lora = p.add_argument_group("adapter")
    lora.add_argument("--rank", type=positive, default=16, help="(default: %(default)s)")
    lora.add_argument("--alpha", type=float, default=32, help="(default: %(default)s)")
    lora.add_argument("--dropout", type=float, default=0.0, help="(default: %(default)s)")
    lora.add_argument("--target_modules", default=MODULES, help="separated by commas (default: %(default)s)")
    lora.add_argument("--use_rslora", action="store_true", help="scale by alpha / sqrt(rank)")
    lora.add_argument("--use_dora", action="store_true", help="learn magnitudes apart from directions")
    fit = p.add_argument_group("training")
    fit.add_argument("--kd_alpha", type=float, default=0.9, help="weight of the KL part (default: %(default)s)")
    fit.add_argument("--temperature", type=float, default=2.0, help="T (default: %(default)s)")
    fit.add_argument("--steps", type=positive, default=1000, help="updates (default: %(default)s)")
    fit.add_argument("--batch_size", type=positive, default=1, help="windows in a forward pass (default: %(default)s)")
    fit.add_argument("--gradient_accumulation", type=positive, default=8, help="passes in one (default: %(default)s)")
    fit.add_argument("--learning_rate", type=float, default=2e-4, help="its peak (default: %(default)s)")
    fit.add_argument("--warmup_steps", type=not_negative, default=50, help="until the peak (default: %(default)s)")
    fit.add_argument("--weight_decay", type=float, default=0.0, help="(default: %(default)s)")
    fit.add_argument("--max_grad_norm", type=float, default=1.0, help="(default: %(default)s)")
    fit.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    fit.add_argument("--gradient_checkpointing", action="store_true", help="less memory, one more forward pass")
    fit.add_argument("--device", default="auto", help="auto, cpu or cuda:N (default: %(default)s)")
    fit.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="frozen weights (default: bf16)")
    return p


@reports_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    given = parser().parse_args(argv)
    from mistral_prune_lora import distillation
    from mistral_prune_lora.model import DTYPES
    from mistral_prune_lora.model_place import model_directory
    from mistral_prune_lora.outputs import Output, claim
    from mistral_prune_lora.text import load_text
    from mistral_prune_lora.tokenizer import load_tokenizer
    from mistral_prune_lora.transaction import check_place
    from mistral_prune_lora.windows import make_windows

    read = [given.teacher, given.student, *given.bundle, *given.text_file, given.dataset, given.mirror]
    states = [given.teacher_states] if given.teacher_states else []
    outputs = [Output.directory(given.output_dir, "--output_dir", distillation.RECORD)]
    claim([*outputs, *map(distillation.states_output, states)], read, overwrite=given.overwrite)
    check_place(given.output_dir)
    check_place(*states, directory=False)
    device, dtype, teacher = given.device, DTYPES[given.dtype], model_directory(given.teacher)
    text = load_text(given.dataset, split="train", mirror=given.mirror, text_files=given.text_file)
    windows = make_windows(text, load_tokenizer(teacher), seqlen=given.seqlen, max_windows=given.nsamples)
    if states and not distillation.holds_states(given.teacher_states):
        distillation.teacher_states(teacher, windows, given.teacher_states, dtype=dtype, device=device)
    distillation.train_adapter(
        given.stage,
        student_dir=given.student,
        teacher_dir=teacher,
        windows=windows,
        output_dir=given.output_dir,
        bundles=given.bundle,
        states=given.teacher_states,
        lora=distillation.LoraSettings(
            given.rank,
            given.alpha,
            given.dropout,
            tuple(name.strip() for name in given.target_modules.split(",")),
            given.use_rslora,
            given.use_dora,
        ),
        loss=distillation.LossSettings(given.kd_alpha, given.temperature),
        optimiser=distillation.OptimiserSettings(
            given.steps,
            given.batch_size,
            given.gradient_accumulation,
            given.learning_rate,
            given.warmup_steps,
            given.weight_decay,
            given.max_grad_norm,
        ),
        dtype=dtype,
        device=device,
        seed=given.seed,
        gradient_checkpointing=given.gradient_checkpointing,
        overwrite=given.overwrite,
    )
    print(f"adapter of {given.stage}: {given.output_dir}")


if __name__ == "__main__":
    sys.exit(main())
