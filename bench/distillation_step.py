"""One training step beside its own matrix products: `python distillation_step.py CASE.json PART [STEPS]`.

Steps and products take turns in one process: after each step of the real loop, the same products are computed on the
student's own weights with nothing between them. Prints one line of JSON: medians, the median of the ratios, what else
the step's time goes to, and what a step keeps in memory for its backward pass.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from mistral_prune_lora.checkpoints.tokenizer import load_tokenizer
from mistral_prune_lora.distillation.adapted import AdaptedStudent
from mistral_prune_lora.distillation.batches import Shelf
from mistral_prune_lora.distillation.curve import COLUMNS, HELD_OUT_COLUMNS, Table
from mistral_prune_lora.distillation.loop import Loop, Watch
from mistral_prune_lora.distillation.prefix import open_prefix, prefix_sources, prefix_states
from mistral_prune_lora.distillation.ranks import Ranks
from mistral_prune_lora.distillation.settings import LoraSettings, LossSettings, OptimiserSettings, TrainingSettings
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.teacher import Teacher, TeacherFiles
from mistral_prune_lora.distillation.teacher_states import teacher_states
from mistral_prune_lora.models.pass_layer import PassLayer
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.sources import load_text
from mistral_prune_lora.text.windows import Windows, make_windows

CPU = torch.device("cpu")
STEPS, PROFILED, SHOWN = 9, 2, 15
ADAPTER = "default"  # PEFT's name for the first one


@dataclass(frozen=True)
class Matrix:
    """A projection, and the factors of its update if it has one."""

    weight: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor] | None
    first: bool  # of the lowest adapted layer, where no gradient goes on below


class Products:
    """The matrix products of a step from the first adapted layer on, as `distillation_bound.work` counts them."""

    def __init__(self, student: AdaptedStudent, teacher_head: torch.Tensor, geometry: Mapping, seqlen: int) -> None:
        self._layers = _matrices(student)
        self._heads = (student.head.detach(), teacher_head)
        widths = {width for layer in self._layers for matrix in layer for width in matrix.weight.shape}
        factors = [m.factors[0] for layer in self._layers for m in layer if m.factors]
        self._wide = {width: torch.randn(seqlen, width) for width in widths}
        self._thin = torch.randn(seqlen, factors[0].shape[0])
        heads, size = geometry["heads"], geometry["head_dim"]
        # Half the keys have the causal half's number of products.
        self._queries, self._keys = torch.randn(heads, seqlen, size), torch.randn(heads, seqlen // 2, size)
        self._weights = torch.randn(heads, seqlen, seqlen // 2)
        self._final = torch.randn(seqlen - 1, geometry["hidden"])
        self._logits = torch.empty(seqlen - 1, geometry["vocabulary"])

    @torch.no_grad()
    def __call__(self) -> None:
        """Compute them."""
        for layer in self._layers:
            for matrix in layer:
                self._forward(matrix)
            self._attention(2)
        for head in self._heads:
            torch.mm(self._final, head.T, out=self._logits)
        self._logits @ self._heads[0]
        for layer in reversed(self._layers):
            for matrix in layer:
                self._backward(matrix)
            self._attention(4)

    def _forward(self, matrix: Matrix) -> None:
        entering = self._wide[matrix.weight.shape[1]]
        functional.linear(entering, matrix.weight)
        if matrix.factors:
            functional.linear(entering, matrix.factors[0])
            functional.linear(self._thin, matrix.factors[1])

    def _backward(self, matrix: Matrix) -> None:
        leaving, entering = (self._wide[width] for width in matrix.weight.shape)
        if not matrix.first:
            leaving @ matrix.weight
        if matrix.factors:
            leaving @ matrix.factors[1]
            leaving.T @ self._thin
            self._thin.T @ entering
            if not matrix.first:
                self._thin @ matrix.factors[0]

    def _attention(self, products: int) -> None:
        for _ in range(products // 2):
            torch.bmm(self._queries, self._keys.transpose(1, 2))
            torch.bmm(self._weights, self._keys)


@dataclass
class InTurn:
    """A logger of the loop that lets the products follow each step."""

    products: Products
    steps: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    tokens: int = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note a step's seconds and take as many for the products."""
        self.steps.append(values["tokens"] / values["tokens_per_second"])
        began = time.perf_counter()
        self.products()
        self.bare.append(time.perf_counter() - began)

    def close(self) -> None:
        """Nothing is open."""


class Trained:
    """A part's training as the command has it: its student, and the files of states."""

    def __init__(self, case: Mapping, part: str, folder: Path) -> None:
        given, self._case = case["parts"][part], case
        text, tokenizer = load_text(text_files=[case["text"]], split="train"), load_tokenizer(case["dense"])
        windows = make_windows(text, tokenizer, seqlen=case["seqlen"], max_windows=case["windows"])
        student = Student(given["student"], tuple(given["bundles"]))
        self._layers, compute = student.layers(part), Compute(CPU, torch.float32, 4)
        teacher_states(case["dense"], windows, folder / "teacher", compute=compute)
        self.teacher = Teacher(TeacherFiles(case["dense"], folder / "teacher"), windows, torch.float32, CPU)
        self._shelf = Shelf(windows, CPU, taught=self.teacher.states)
        self._enter(student, windows, folder / "prefix", compute)
        prefixed = self._shelf.entering is not None
        self.student = AdaptedStudent(student, self._layers, self._settings(1), compute, with_prefix=not prefixed)
        self.teacher.same_head(self.student.head)

    def _enter(self, student: Student, windows: Windows, path: Path, compute: Compute) -> None:
        first = min(self._layers)
        if prefix_sources(student, first):
            prefix_states(student, first, windows, path, compute=compute)
            entering = open_prefix(path, student, first, windows, torch.float32, CPU)
            self._shelf = replace(self._shelf, entering=entering)

    def _settings(self, steps: int) -> TrainingSettings:
        lora, loss = dict(self._case["lora"]), LossSettings(**self._case["loss"])
        lora["target_modules"] = tuple(lora["target_modules"])
        return TrainingSettings(LoraSettings(**lora), loss, OptimiserSettings(steps, 1, 1, 2e-4, 0))

    def run(self, steps: int, loggers: tuple = ()) -> None:
        """Train so many steps more."""
        watch = Watch(Table(None, COLUMNS), Table(None, HELD_OUT_COLUMNS), loggers, None, 0)
        Loop(self.student, self.teacher, self._shelf, None, self._settings(steps), watch, Ranks()).run()

    def saved_bytes(self) -> int:
        """Bytes that a forward pass of one window keeps for the backward pass, beside weights."""
        weights = {p.untyped_storage().data_ptr() for p in self.student.model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage  # held, so that no other one comes to lie there
            return tensor

        batch = self._shelf.read([0])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            final, _ = self.student.hidden(batch)
        del final
        return sum(storage.nbytes() for storage in kept.values())


def main() -> None:
    file, part, *rest = sys.argv[1:]
    steps, case = int(rest[0]) if rest else STEPS, json.loads(Path(file).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=case["folder"]) as folder:
        trained = Trained(case, part, Path(folder))
        in_turn = InTurn(Products(trained.student, trained.teacher.head, case["geometry"], case["seqlen"]))
        trained.run(steps + 1, (in_turn,))
        turns = list(zip(in_turn.steps, in_turn.bare, strict=True))[1:]  # the first one warms up
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            trained.run(PROFILED)
        found = {
            "step": statistics.median(step for step, _ in turns),
            "products": statistics.median(bare for _, bare in turns),
            "ratio": statistics.median(step / bare for step, bare in turns),
            "other": _shares(profiled),
            "kept": trained.saved_bytes(),
            "weights": sum(p.numel() * p.element_size() for p in trained.student.model.parameters()),
        }
    print(json.dumps(found))


def _matrices(student: AdaptedStudent) -> list[list[Matrix]]:
    """The projections of the layers that a step goes through."""
    layers = [layer for layer in student.model.get_base_model().model.layers if not isinstance(layer, PassLayer)]
    found = []
    for layer in layers:
        row = []
        for name, module in layer.named_modules():
            last = name.rpartition(".")[2]
            if not last.endswith("_proj"):
                continue
            factors = None
            if hasattr(module, "lora_A"):
                factors = (module.lora_A[ADAPTER].weight.detach(), module.lora_B[ADAPTER].weight.detach())
            weight = (module.base_layer if factors else module).weight.detach()
            row.append(Matrix(weight, factors, layer is layers[0] and last in ("q_proj", "k_proj", "v_proj")))
        found.append(row)
    return found


def _shares(profiled: profile) -> list[tuple[float, str]]:
    """The operators that take the most time themselves, as shares of all."""
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    most = sorted(events, key=lambda event: -event.self_cpu_time_total)[:SHOWN]
    return [(event.self_cpu_time_total / total, f"{event.key} ({event.count // PROFILED})") for event in most]


if __name__ == "__main__":
    main()
