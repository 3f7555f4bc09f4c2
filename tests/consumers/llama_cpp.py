"""The NLL of windows in llama.cpp, through its server's own interface. Runs in an environment of its own, see run.py.

Prints a JSON object: {"nll": [of each window]}.

    python llama_cpp.py model.gguf windows.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import xllamacpp as xlc

_CERTAIN = 1e9  # added to a token's logit, so that it is the one that is drawn


def open_server(gguf: str, seqlen: int) -> xlc.Server:
    """A server of one slot, everything in float32.

    So is its cache: the default of float16 is coarser than what is compared here.
    """
    params = xlc.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel, params.warmup = seqlen + 1, 1, False
    params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = 1
    return xlc.Server(params)


def window_nll(server: xlc.Server, ids: Sequence[int]) -> float:
    """Sum of the negative log-likelihoods of ids[1:].

    The server tells the likelihood of the token that it draws, as the model gave it before any bias. So each token in
    turn is made the one that is drawn; what comes before it is in the cache, as when text is generated.
    """
    nll = 0.0
    for place in range(1, len(ids)):
        answer = server.handle_completions(
            {
                "prompt": list(ids[:place]),
                "n_predict": 1,
                "n_probs": 1,
                "temperature": 0,
                "logit_bias": [[ids[place], _CERTAIN]],
                "cache_prompt": True,
            }
        )
        drawn = answer["choices"][0]["logprobs"]["content"][0]
        if drawn["id"] != ids[place]:
            raise RuntimeError(f"asked for token {ids[place]}, and {drawn['id']} was drawn")
        nll -= drawn["logprob"]
    return nll


def main(gguf: str, windows: str) -> None:
    """Score every window."""
    with open(windows, encoding="utf-8") as file:
        ids = json.load(file)
    server = open_server(gguf, max(map(len, ids)))
    print(json.dumps({"nll": [window_nll(server, window) for window in ids]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
