"""How much memory the evaluation command takes for a model of Mistral-7B's size: A, AB and FULL in float32 on the CPU.

  python bench/perplexity_7b.py --folder /scratch                       # 14.5 GB of random bf16 weights there
  python bench/perplexity_7b.py --folder /scratch --max_memory 5GB      # as small as asked for
  python bench/perplexity_7b.py --folder /tmp --layers 6 --hidden 512   # a trial of the benchmark itself

Weights are written once and used again. What is printed is the highest resident memory of the command's process, the
weights' size beside it, and the command's own output.
"""

from __future__ import annotations

import argparse
import os
import random
import string
import subprocess
import sys
import time
from pathlib import Path

from random_model import mistral_config, write_parts

from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.sizes import parse_size

TARGET = "8GB"
MODULE = "mistral_prune_lora.mistral_eval_ppl_mergedmodel"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, required=True, help="where the model goes, or was put by an earlier run")
    p.add_argument("--layers", type=int, default=32, help="layers (default: %(default)s)")
    p.add_argument("--hidden", type=int, default=4096, help="hidden size (default: %(default)s)")
    p.add_argument("--windows", type=int, default=2, help="windows (default: %(default)s)")
    p.add_argument("--seqlen", type=int, default=128, help="token ids in a window (default: %(default)s)")
    p.add_argument("--max_memory", help="passed on to the command (default: the command's own)")
    args = p.parse_args()
    folder = args.folder / f"random-{args.layers}x{args.hidden}"
    parts = write_once(folder, args.layers, args.hidden)
    text = folder / "text.txt"
    # A byte is a token.
    text.write_text("".join(random.Random(0).choices(string.ascii_letters, k=args.windows * args.seqlen)))
    command = [sys.executable, "-m", MODULE, "--model_path", f"{parts}/A", "--bundles_dir", f"{parts}/bundles"]
    command += ["--text_file", str(text), "--seqlen", str(args.seqlen), "--device", "cpu", "--dtype", "fp32"]
    command += ["--max_memory", args.max_memory] if args.max_memory else []
    began = time.perf_counter()
    peak = watch(subprocess.Popen(command, env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}))
    weights = sum(file.stat().st_size for file in parts.rglob("*.safetensors"))
    print(f"\nweights on disk    {weights / 1e9:.2f} GB in bf16, {2 * weights / 1e9:.2f} GB in float32")
    print(f"time               {time.perf_counter() - began:.0f} s")
    print(
        f"peak memory        {peak / 1e9:.2f} GB   {'ok' if peak < parse_size(TARGET) else 'MISSED'} (under {TARGET})"
    )


def write_once(folder: Path, layers: int, hidden: int) -> Path:
    """The directory of A and bundles, cut where Mistral-7B is cut into 24 + 4 + 4 layers; written if need be."""
    parts, unfinished = folder / "parts", folder / f"unfinished-{os.getpid()}"
    if not parts.is_dir():
        # The proportions are Mistral-7B's.
        config = mistral_config(
            layers=layers,
            hidden=hidden,
            intermediate=hidden * 7 // 2,
            heads=hidden // 128,
            kv_heads=max(1, hidden // 512),
            vocabulary=32000,
        )
        size = max(1, layers // 8)
        first = layers - 2 * size - max(1, layers * 3 // 32)
        layout = Layout(layers, tuple(range(first, first + size)), tuple(range(first + size, first + 2 * size)))
        write_parts(unfinished, config, layout)
        unfinished.rename(parts)
    return parts


def watch(process: subprocess.Popen) -> int:
    """The highest resident memory of a process, in bytes, asked of the kernel until it ends."""
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        except OSError:
            break
        # Absent once the process has ended and is only waited for.
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))])
        time.sleep(0.05)
    if process.wait():
        raise SystemExit(f"the command failed with exit code {process.returncode}")
    return peak


if __name__ == "__main__":
    main()
