"""The NLL of windows in vLLM on the CPU, in float32. Runs in an environment of its own, see run.py.

Prints a JSON object: {"nll": [of each window]}.

    python vllm_cpu.py model_directory windows.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

# One process, and little memory: both must be said before vLLM is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def window_nll(answer, ids: Sequence[int]) -> float:
    """Sum of the negative log-likelihoods of ids[1:], as vLLM reports them for a prompt."""
    return -sum(found[token].logprob for found, token in zip(answer.prompt_logprobs[1:], ids[1:], strict=True))


def main(folder: str, windows: str) -> None:
    """Score every window; vLLM's own messages go to stderr."""
    with open(windows, encoding="utf-8") as file:
        ids = json.load(file)
    answers_to, sys.stdout = sys.stdout, sys.stderr
    from vllm import LLM, SamplingParams

    model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=len(ids[0]) + 1, max_num_seqs=1)
    wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
    answers = model.generate([{"prompt_token_ids": window} for window in ids], wanted, use_tqdm=False)
    nll = [window_nll(answer, window) for answer, window in zip(answers, ids, strict=True)]
    print(json.dumps({"nll": nll}), file=answers_to)


if __name__ == "__main__":
    main(*sys.argv[1:])
