"""What an evaluation would take on many GPUs: worked out from assumptions, each of which is printed. No measurement.

One artefact after another goes through all GPUs: the dense model, then each run of layers that stages share, then their
tails, each in as many shards as there are GPUs and gathered by one job. A phase takes as long as its largest shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.layout.segments import segment_tree, shared_segments
from mistral_prune_lora.workflow.geometry import Geometry

GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Assumed:
    """What nothing here measured. Each stands beside the figures.

    Attributes:
        operations: a second of a GPU on matrix products in bf16.
        job_reads: bytes a second of one job, its checksums included.
        all_read: bytes a second of all jobs together, of the file system.
        gpu_start: seconds until a process can use its GPU.
        look: seconds until the main process sees that a phase's last job has ended.
    """

    operations: float = 100e12
    job_reads: float = 2e9
    all_read: float = 40e9
    gpu_start: float = 5.0
    look: float = 20.0

    def told(self) -> list[str]:
        """A line for each."""
        return [
            f"a GPU does {self.operations / 1e12:.0f}e12 operations a second, a third of an A100's bf16 peak",
            f"a job reads at {self.job_reads / 1e9:.0f} GB/s, all together at {self.all_read / 1e9:.0f} GB/s at most",
            f"CUDA adds {self.gpu_start:.0f} s to a job's start; no job waits in Slurm's queue",
            f"the main process sees the end of a phase {self.look:.0f} s late, as it looks every 20 s or more seldom",
            "each shard reads all layers of its phase; shards are equal but for the rounding to whole batches",
            "phases come one after another, each with its gathering; nothing runs beside them",
        ]


@dataclass(frozen=True)
class Case:
    """A model, how it is cut, and the windows that it is measured on: 164 are about WikiText-2's test split."""

    name: str
    geometry: Geometry
    layout: Layout
    windows: int
    seqlen: int = 2048
    batch: int = 1

    @classmethod
    def seven_billion(cls, windows: int) -> Case:
        """Mistral-7B's geometry."""
        cut = Layout(32, tuple(range(21, 25)), tuple(range(25, 29)))
        return cls("7B", Geometry(32, 4096, 14336, queries=4096, keys=1024, vocabulary=32000), cut, windows)

    @classmethod
    def seventy_billion(cls, windows: int) -> Case:
        """80 layers of width 8192, the same share of them in B and C."""
        cut = Layout(80, tuple(range(52, 62)), tuple(range(62, 72)))
        return cls("70B", Geometry(80, 8192, 28672, queries=8192, keys=1024, vocabulary=32000), cut, windows)


@dataclass(frozen=True)
class Projected:
    """Seconds of a whole evaluation on so many GPUs, by what they go to.

    Attributes:
        start_up: starts and ends of processes, and what passes until the main process has seen them.
        reading: weights.
        computing: layers and scores.
        gathering: boundary activations of all shards, read and written once more.
    """

    gpus: int
    start_up: float
    reading: float
    computing: float
    gathering: float

    @property
    def whole(self) -> float:
        """All of it."""
        return self.start_up + self.reading + self.computing + self.gathering


@dataclass(frozen=True)
class Phase:
    """Layers that all windows go through, in shards; heads that score them; whether their hidden states are kept."""

    layers: int
    heads: int
    keeps: bool


def phases(case: Case) -> list[Phase]:
    """The dense model, and what is run for A, AB and FULL of healed parts, each compared with the dense model."""
    tree = segment_tree(case.layout)
    shared = shared_segments(tree)
    stages = [Phase(len(segment.layers), 2 * len(segment.ends), segment in shared) for segment in tree]
    return [Phase(case.geometry.layers, 1, True), *stages]


def project(case: Case, start_up: float, assumed: Assumed, gpus: int) -> Projected:
    """A whole evaluation on so many GPUs.

    Args:
        case: the model and its windows.
        start_up: seconds of a job beside its work, as measured.
        assumed: what was not measured.
        gpus: how many, and at most so many shards of a phase.
    """
    batches = ceil(case.windows / case.batch)
    shards = min(gpus, batches)
    tokens = ceil(batches / shards) * case.batch * case.seqlen
    starts = reading = computing = gathering = 0.0
    for phase in phases(case):
        nbytes = phase.layers * case.geometry.layer_bytes + case.geometry.ends_bytes
        starts += start_up + assumed.gpu_start + assumed.look
        reading += max(nbytes / assumed.job_reads, shards * nbytes / assumed.all_read)
        computing += _operations(case, phase, tokens) / assumed.operations
        if shards > 1:
            starts += start_up + assumed.look
            states = case.windows * case.seqlen * case.geometry.hidden * case.geometry.itemsize
            gathering += 2 * states / assumed.job_reads if phase.keeps else 0.0
    return Projected(gpus, starts, reading, computing, gathering)


def _operations(case: Case, phase: Phase, tokens: int) -> float:
    """Multiplications and additions: of the matrices, and of attention over half a window on average."""
    matrices = phase.layers * case.geometry.layer_parameters
    matrices += phase.heads * case.geometry.vocabulary * case.geometry.hidden
    return tokens * (2 * matrices + phase.layers * 2 * case.seqlen * case.geometry.queries)


def report_projection(start_up: float, assumed: Assumed) -> None:
    """What the projection assumes, and a table for each case."""
    print("\nWhat follows is a projection and was not measured. It assumes that:")
    print(f"  - a job's start and end take {start_up:.1f} s beside its work (the shortest measured above)")
    for line in assumed.told():
        print(f"  - {line} (assumed)")
    columns = "".join(f"{name:>11}" for name in ("start-up", "reading", "computing", "gathering"))
    print(f"\nmodel  windows  GPUs{'whole, s':>10}{'efficiency':>12}{columns}")
    for windows in (164, 4096):
        for case in (Case.seven_billion(windows), Case.seventy_billion(windows)):
            _report_case(case, [project(case, start_up, assumed, gpus) for gpus in GPUS])


def _report_case(case: Case, found: list[Projected]) -> None:
    for each in found:
        efficiency = found[0].whole * found[0].gpus / (each.whole * each.gpus)
        parts = (each.start_up, each.reading, each.computing, each.gathering)
        print(f"{case.name:5}{case.windows:9}{each.gpus:6}{each.whole:10.0f}{efficiency:12.0%}", end="")
        print("".join(f"{seconds:11.0f}" for seconds in parts))
