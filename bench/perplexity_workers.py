"""What bench/perplexity.py times, each in a process of its own: `python perplexity_workers.py NAME SPEC.json`.

SPEC names directories, windows and batch size (see `perplexity.Case`). A worker prints one line of JSON: seconds from
after the imports to the last number, the peak of its resident memory, and each stage's mean NLL.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM

from mistral_prune_lora.evaluation.stages import evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import STAGES, Layout
from mistral_prune_lora.layout.segments import segment_tree
from mistral_prune_lora.models.window_scores import block_slices
from mistral_prune_lora.pruning.identity import PassLayer
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.windows import Windows

CPU = torch.device("cpu")


def ours(spec: dict) -> dict:
    """A, AB and FULL through the engine: weights digested and read, activations written and read, scores kept."""
    with tempfile.TemporaryDirectory(dir=spec["folder"]) as work_dir:
        return _evaluate(spec, STAGES, work_dir)


def full(spec: dict) -> dict:
    """FULL alone through the engine, from nothing."""
    with tempfile.TemporaryDirectory(dir=spec["folder"]) as work_dir:
        return _evaluate(spec, ["FULL"], work_dir)


def new_c(spec: dict) -> dict:
    """FULL after C's bundle has changed, with a folder of work that holds the three stages before the change."""
    with tempfile.TemporaryDirectory(dir=spec["folder"]) as work_dir:
        # In another process: this one is to know nothing, no digest of a weight either.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as before:
            before.submit(_evaluate, spec, STAGES, work_dir).result()
        changed = Path(work_dir) / "changed"
        shutil.copytree(spec["bundles"]["C"], changed)
        for file in changed.glob("layer_*.safetensors"):
            content = bytearray(file.read_bytes())
            content[-2] ^= 1  # the lowest bit of the last weight
            file.write_bytes(content)
        return _evaluate({**spec, "bundles": {**spec["bundles"], "C": str(changed)}}, ["FULL"], work_dir)


def plain(spec: dict) -> dict:
    """A, AB and FULL as anybody would: the whole model, PassLayers at the inactive layers, whole logits."""
    model, windows = _whole_model(spec), Windows.load(spec["windows"])
    layers, nll = list(model.model.layers), {}
    for stage in STAGES:
        _install(model, layers, stage, spec)
        losses = []
        with torch.inference_mode():
            for start in range(0, len(windows), spec["batch_size"]):
                ids = windows.ids[start : start + spec["batch_size"]].long()
                logits = model(ids, use_cache=False).logits[:, :-1].float()
                flat, targets = logits.flatten(0, 1), ids[:, 1:].flatten()
                losses.append(functional.cross_entropy(flat, targets, reduction="none").double().sum())
        nll[stage] = float(torch.stack(losses).sum()) / windows.predicted_tokens
    return {"nll": nll}


def bare(spec: dict) -> dict:
    """The weight matrices' products of `ours`, and nothing else: no norms, no attention, no files."""
    config = AutoModelForCausalLM.from_pretrained(spec["dense"], dtype=torch.float32)
    layer, head = config.model.layers[0], config.lm_head.weight
    matrices = [p for p in layer.parameters() if p.ndim == 2]
    windows = Windows.load(spec["windows"])
    rows = [
        min(spec["batch_size"], len(windows) - b) * windows.seqlen for b in range(0, len(windows), spec["batch_size"])
    ]
    inputs = {m.shape[1]: torch.randn(max(rows), m.shape[1]) for m in (*matrices, head)}
    passes = sum(len(segment.layers) for segment in segment_tree(Layout(**spec["layout"])))
    blocks = block_slices(windows.seqlen - 1, head.shape[0])
    began = time.perf_counter()
    with torch.inference_mode():
        for _ in range(passes):
            for count in rows:
                for matrix in matrices:
                    functional.linear(inputs[matrix.shape[1]][:count], matrix)
        for _ in range(len(STAGES) * len(windows)):
            for part in blocks:
                functional.linear(inputs[head.shape[1]][part], head)
    return {"nll": {}, "seconds": time.perf_counter() - began}


def harness(spec: dict) -> dict:
    """A alone through lm-evaluation-harness's own model class, on the same windows."""
    from lm_eval.models.huggingface import HFLM

    model, windows = _whole_model(spec), Windows.load(spec["windows"])
    _install(model, list(model.model.layers), "A", spec)
    tokenizer = AutoTokenizer.from_pretrained(spec["dense"])
    harnessed = HFLM(pretrained=model, tokenizer=tokenizer, max_length=windows.seqlen, batch_size=spec["batch_size"])
    # One context token and all that follow: the predictions of our windows. The first field only labels a request.
    requests = [((str(i), ""), row[:1], row[1:]) for i, row in enumerate(windows.ids.tolist())]
    scores = harnessed._loglikelihood_tokens(requests, disable_tqdm=True)
    return {"nll": {"A": -sum(score for score, _ in scores) / windows.predicted_tokens}}


def a_alone(spec: dict) -> dict:
    """A alone through the engine: what `harness` is compared with."""
    with tempfile.TemporaryDirectory(dir=spec["folder"]) as work_dir:
        return _evaluate(spec, ["A"], work_dir)


def _evaluate(spec: dict, stages: list[str] | tuple[str, ...], work_dir: str) -> dict:
    began = time.perf_counter()
    subject, compute = Subject.open(spec["a"], spec["bundles"]), Compute(CPU, torch.float32, spec["batch_size"])
    results: Iterator = evaluate_stages(subject, stages, Windows.load(spec["windows"]), compute, work_dir=work_dir)
    nll = {result.record["stage"]: result.record["mean_nll"] for result in results}
    return {"nll": nll, "seconds": time.perf_counter() - began}


def _whole_model(spec: dict) -> MistralForCausalLM:
    return AutoModelForCausalLM.from_pretrained(spec["dense"], dtype=torch.float32).eval()


def _install(model: MistralForCausalLM, layers: list[torch.nn.Module], stage: str, spec: dict) -> None:
    active = Layout(**spec["layout"]).active(stage)
    for i, layer in enumerate(layers):
        model.model.layers[i] = layer if i in active else PassLayer(i)


def _peak_memory() -> int:
    """Bytes resident at the highest, of this process alone: ru_maxrss would remember the one that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


WORKERS = {f.__name__: f for f in (ours, full, new_c, plain, bare, harness, a_alone)}

if __name__ == "__main__":
    name, spec_file = sys.argv[1:]
    began = time.perf_counter()
    result = WORKERS[name](json.loads(Path(spec_file).read_text(encoding="utf-8")))
    print(json.dumps({"seconds": time.perf_counter() - began, "peak": _peak_memory(), **result}))
