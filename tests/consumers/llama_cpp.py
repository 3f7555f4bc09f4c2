"""The NLL of windows in llama.cpp, through its own C interface. Runs in an environment of its own, see run.py.

Prints a JSON object: {"layers": of the model, "nll": [of each window]}.

    python llama_cpp.py model.gguf windows.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

import numpy as np
from llama_cpp_py_sync import Llama
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib


def window_nll(model: Llama, ids: Sequence[int]) -> float:
    """Sum of the negative log-likelihoods of ids[1:]: float32 logits, float64 softmax and sum."""
    lib, ffi = get_lib(), get_ffi()
    lib.llama_memory_clear(lib.llama_get_memory(model._ctx), True)
    batch = lib.llama_batch_init(len(ids), 0, 1)
    try:
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = 1
        batch.n_tokens = len(ids)
        if lib.llama_decode(model._ctx, batch) != 0:
            raise RuntimeError("llama_decode failed")
        width = model.n_vocab
        nll = 0.0
        for place, target in enumerate(ids[1:]):
            row = ffi.buffer(lib.llama_get_logits_ith(model._ctx, place), width * 4)
            logits = np.frombuffer(row, dtype=np.float32).astype(np.float64)
            top = logits.max()
            nll += top + np.log(np.exp(logits - top).sum()) - logits[target]
        return float(nll)
    finally:
        lib.llama_batch_free(batch)


def main(gguf: str, windows: str) -> None:
    """Score every window; llama.cpp's own messages go to stderr."""
    with open(windows, encoding="utf-8") as file:
        ids = json.load(file)
    length = max(map(len, ids))
    with contextlib.redirect_stdout(sys.stderr):
        # The cache in float32 too: its default of float16 alone moves a perplexity by more than what is tested here.
        model = Llama(gguf, n_ctx=length, n_batch=length, n_threads=2, type_k="f32", type_v="f32", flash_attn_type=0)
        nll = [window_nll(model, window) for window in ids]
    print(json.dumps({"layers": model.n_layer, "nll": nll}))


if __name__ == "__main__":
    main(*sys.argv[1:])
