"""The user's folder that is attacked: one of everything, pruned and merged by the commands themselves."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pandas as pd
import yaml
from cut_model import save_dense
from output_project import INPUTS, LAYOUT, merge, prune, write_inputs
from tiny import save_adapter, save_tokenizer
from tiny_gguf import llama, write_gguf

from attack import row_edits
from attack.scenes import must


def write_project(folder: Path) -> None:
    """Make `inputs`, and `tables` of row_edits, in a folder."""
    inputs = folder / "inputs"
    inputs.mkdir(parents=True)
    write_inputs(inputs)
    os.chdir(inputs)
    for seed, part in ((2, "C"), (3, "A"), (4, "B")):
        save_adapter(Path(f"adapters/{part}_lora"), Path(INPUTS["dense"]), list(LAYOUT.layers_of(part)), seed)
    save_tokenizer(save_dense(inputs / "other/dense", seed=1, vocab_size=259))
    for dense, place in ((INPUTS["dense"], "pruned"), ("other/dense", "other")):
        must(prune, "--model", dense, *["--b_layers", "3", "4", "--c_layers", "5", "6", "--save_dir"], f"{place}/A",
            "--save_removed_dir", f"{place}/bundles")  # fmt: skip
    adapters = {"A": INPUTS["A_lora"], "B": INPUTS["B_lora"], "C": "adapters/C_lora"}
    for part, adapter in adapters.items():
        base = "pruned/A" if part == "A" else f"pruned/bundles/{part}"
        sharded = ["--max_shard_size", "100KB"] if part == "A" else ["--skeleton", "pruned/A"]
        must(merge, "--base_model", base, "--adapter_path", adapter, "--output_dir", f"merged/{part}_merged",
            "--device", "cpu", *sharded)  # fmt: skip
    _write_texts(inputs / "texts")
    (inputs / "gguf").mkdir()
    write_gguf(inputs / "gguf/model.gguf", llama(False))
    (inputs / "config.yaml").write_text(yaml.safe_dump(_configuration()))
    row_edits.make_tables(folder / "tables")


def _write_texts(folder: Path) -> None:
    import datasets

    folder.mkdir()
    rows = [f"Row {i} says that {i} times {i} is {i * i}." for i in range(60)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.json").write_text(json.dumps([{"text": row} for row in rows]))
    (folder / "rows.json.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    table = pd.DataFrame({"number": range(60), "text": rows})
    table.to_csv(folder / "rows.csv", index=False)
    table.to_parquet(folder / "rows.parquet")
    datasets.Dataset.from_pandas(table).save_to_disk(str(folder / "saved"))


def _configuration() -> dict:
    """A dense model, and a pruned one with given adapters."""
    perplexity = {"datasets": ["corpus"], "seqlen": 32, "windows": 6, "batch_size": 4, "dtype": "fp32"}
    adapters = {"A": INPUTS["A_lora"], "B": INPUTS["B_lora"], "C": "adapters/C_lora"}
    common = {"model": "dense", "adapters": adapters, "perplexity": perplexity}
    return {
        "models": {"dense": {"path": INPUTS["dense"], "num_layers": 8}},
        "datasets": {"corpus": {"text_files": [INPUTS["text"]]}},
        "experiments": {
            "cut_here": {**common, "layers": {"B": [3, 4], "C": [5, 6]}},
            "given": {**common, "pruned": {"A": "pruned/A", "bundles": "pruned/bundles"}},
        },
    }
