"""What the evaluation command is given: pruned parts, merged parts, adapters, texts, in the folders of a user."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from cut_model import cut, save_dense
from peft import PeftModel
from tiny import save_adapter, save_tokenizer
from transformers import MistralForCausalLM

from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.mistral_eval_ppl_mergedmodel import main

LAYOUT = Layout(8, (3, 4), (5, 6))
PRUNED, MERGED = "25_mistral_results/pruning", "merged_models_mistral_7b"
WIKITEXT = [f" Row {i} of a wiki says {i * i} . \n" if i % 3 else "" for i in range(220)]


def write_project(folder: Path) -> None:
    """The dense model, its pruned parts, adapters A_lora.. and the parts merged by PEFT's own merge, texts."""
    save_dense(folder / "dense", vocab_size=259, max_position_embeddings=4096)
    save_tokenizer(folder / "dense")
    cut(folder / "dense", LAYOUT, folder / PRUNED)
    for seed, part in enumerate("ABC"):
        save_adapter(folder / f"adapters/{part}_lora", folder / "dense", list(LAYOUT.layers_of(part)), seed)
    merge_with_peft(folder, folder / MERGED)
    (folder / "eval_corpus.txt").write_text("\n".join(f"Line {i} is about {i * i}." for i in range(400)))
    mirror = folder / "wikitext/wikitext-2-raw-v1"
    mirror.mkdir(parents=True)
    pd.DataFrame({"text": WIKITEXT}).to_parquet(mirror / "test-00000-of-00001.parquet")


def merge_with_peft(folder: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """A_merged, B_merged, C_merged: every adapter merged into the dense model, which is then cut."""
    model = MistralForCausalLM.from_pretrained(folder / "dense", dtype=dtype)
    for part in "ABC":
        model = PeftModel.from_pretrained(model, folder / f"adapters/{part}_lora").merge_and_unload()
    whole = target / "whole"
    model.save_pretrained(whole)
    save_tokenizer(whole)
    a, bundles = cut(whole, LAYOUT, target, dtype)
    a.rename(target / "A_merged")
    for part, bundle in bundles.items():
        # As merging writes it.
        meta = {"layer_indices": list(LAYOUT.layers_of(part)), "merged": True}
        (bundle / "bundle_meta.json").write_text(json.dumps(meta))
        bundle.rename(target / f"{part}_merged")
    shutil.rmtree(whole)


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


def evaluate(folder: Path, *arguments: str) -> Outcome:
    """Run the command in `folder`, in this process."""
    before, out, err = os.getcwd(), io.StringIO(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*arguments, "--device", "cpu"] if "--device" not in arguments else list(arguments))
    finally:
        os.chdir(before)
    return Outcome(code, out.getvalue(), err.getvalue())


def results(folder: Path, *arguments: str) -> list[dict]:
    """Run the command in float32 and return its JSON results."""
    done = evaluate(folder, *arguments, "--dtype", "fp32", "--json", "results.json")
    assert done.code == 0, done.err
    return json.loads((folder / "results.json").read_text())["results"]
