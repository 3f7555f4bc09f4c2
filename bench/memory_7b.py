"""How much memory the ranking of layers and the teacher's states take for a model of Mistral-7B's size, on the CPU.

  python bench/memory_7b.py --folder /scratch                      # 14.5 GB of random bf16 weights there
  python bench/memory_7b.py --folder /scratch --dtype fp32         # the same model computed in float32
  python bench/memory_7b.py --folder /tmp --layers 4 --hidden 512  # a trial of the benchmark itself

Each runs in a process of its own with what the workflow grants a job of 8 GB. Weights are written once and used again.
What is printed is the highest resident memory of each process, and the weights' size beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from perplexity_7b import TARGET, watch
from random_model import mistral_config, write_model

from mistral_prune_lora.device import granted
from mistral_prune_lora.distillation.teacher_states import teacher_states
from mistral_prune_lora.pruning.importance import angular_distances, last_token_states
from mistral_prune_lora.sizes import parse_size
from mistral_prune_lora.storage.dtypes import COMPUTE_DTYPES
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.windows import Windows, WindowsIdentity, ids_digest

JOBS = ("importance", "teacher states")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, required=True, help="where the model goes, or was put by an earlier run")
    p.add_argument("--layers", type=int, default=32, help="layers (default: %(default)s)")
    p.add_argument("--hidden", type=int, default=4096, help="hidden size (default: %(default)s)")
    p.add_argument("--windows", type=int, default=4, help="windows (default: %(default)s)")
    p.add_argument("--seqlen", type=int, default=512, help="token ids in a window (default: %(default)s)")
    p.add_argument("--batch_size", type=int, default=4, help="windows at once (default: %(default)s, the workflow's)")
    p.add_argument("--dtype", choices=COMPUTE_DTYPES, default="bf16", help="of the computation (default: %(default)s)")
    p.add_argument("--job", choices=JOBS, help="run this in the process itself; what the benchmark starts")
    args = p.parse_args()
    model = args.folder / f"dense-{args.layers}x{args.hidden}"
    if args.job:
        run(args, model)
        return
    write_once(model, args.layers, args.hidden)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    size = f"{args.windows} windows of {args.seqlen} token ids, batches of {args.batch_size}"
    print(f"weights on disk    {weights / 1e9:.2f} GB, computed in {args.dtype}; {size}")
    for job in JOBS:
        began = time.perf_counter()
        peak = watch(subprocess.Popen([sys.executable, *sys.argv, "--job", job]))
        seconds, verdict = time.perf_counter() - began, "ok" if peak < parse_size(TARGET) else "MISSED"
        print(f"{job:15}    {peak / 1e9:.2f} GB at its peak, {seconds:.0f} s   {verdict} (under {TARGET})", flush=True)


def run(args: argparse.Namespace, model: Path) -> None:
    """One of the two, as the workflow's script runs it in a job of 8 GB."""
    ids = torch.randint(256, (args.windows, args.seqlen), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    output = args.folder / f"{model.name}.{args.job.replace(' ', '_')}"
    memory = granted(torch.get_num_threads(), 0, parse_size(TARGET) // 10**6).memory_bytes
    compute = Compute.named("cpu", args.dtype, args.batch_size, memory)
    if args.job == "importance":
        table = angular_distances(
            last_token_states(model, ids, beside=output, compute=compute), max(1, args.layers // 4)
        )
        print(table[table.recommended].to_string(index=False))
        return
    identity = WindowsIdentity(
        "random", "train", "nowhere", "", ids_digest(ids), "", "", 0, args.seqlen, args.windows, args.windows
    )
    teacher_states(model, Windows(ids, identity), output, compute=compute)
    output.unlink()


def write_once(model: Path, layers: int, hidden: int) -> None:
    """A dense model in Mistral-7B's proportions, written if it is not there."""
    if model.is_dir():
        return
    config = mistral_config(
        layers=layers,
        hidden=hidden,
        intermediate=hidden * 7 // 2,
        heads=hidden // 128,
        kv_heads=max(1, hidden // 512),
        vocabulary=32000,
    )
    unfinished = model.with_name(f"unfinished-{os.getpid()}")
    write_model(unfinished, config)
    unfinished.rename(model)


if __name__ == "__main__":
    main()
