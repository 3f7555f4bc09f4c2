"""What a job needs, from the geometry of its model: memory, time and whether a GPU is of use. Imports no torch.

Memory is the host's, in megabytes of 10^6 bytes, and holds on the CPU as well: a job that asks for a GPU runs there if
the machine has none. Jobs that stream layers use what they are granted (`device.granted`), so they get what
they use well rather than the least that they run with.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mistral_prune_lora.choosing.settings import Amount
from mistral_prune_lora.workflow.geometry import ITEMSIZE, Geometry

_PROCESS = 800_000_000  # what `device.granted` leaves to Python, torch and their buffers
_CUDA = (
    2_000_000_000  # host memory of CUDA's libraries and of pinned copies; by experience with torch, not measured here
)
_FLAT = 2000  # MB: a stream of rows peaked at 364 MB for a merge of any size; the rest is for the page cache
_TEXT = 8000  # MB: a text and its token ids; the longest of the named ones, a shard of C4, is 800 MB
_HELD_LAYERS = 4_000_000_000  # more layers at once only save trips of the hidden states to disk
_HELD_STATES = 4_000_000_000  # more hidden states at once only save reading the layers again
_SCORED_LOGITS = 1 << 23  # `models.window_scores` holds four blocks of so many float32
_LOSS_LOGITS = 1 << 23  # `distillation.loss` on a CPU: student's and teacher's, and two slices that make a third
_LOSS_BLOCKS = 3
_STREAMED_BATCH = 4  # windows at once of the teacher's states and of the ranking of layers

# Operations a second. A CPU: of matrix products on 2 cores without bf16 instructions, 38e9 in float32 and 6e9 in bf16,
# the 79 % that README says a run reaches. A GPU: no measurement, but a fraction of what the data sheet of an A100 says,
# 312e12 in 16 bits and 19.5e12 in float32.
_SPEED = {("cpu", 4): 30e9, ("cpu", 2): 5e9, ("gpu", 4): 5e12, ("gpu", 2): 20e12}
_DISK = 250e6  # bytes a second: README's 4.01 GB were merged and checked in 15.3 s
_NETWORK = 10e6  # bytes a second
_WHOLE_TEXT = 10_000_000  # tokens, of a text that is not cut off: four times WikiText-2's training split
_GENEROUS = 4  # times what is expected
_LEAST_MINUTES = 10
_START = 60  # seconds in which Python and torch are imported


@dataclass(frozen=True)
class Needs:
    """What a job asks for.

    Attributes:
        mem_mb: megabytes of 10^6 bytes.
        runtime: minutes.
        gpu: how many it makes use of, 0 or 1.
    """

    mem_mb: int
    runtime: int
    gpu: int = 0


@dataclass(frozen=True)
class Pass:
    """Windows that go through layers.

    Attributes:
        dtype: "bf16", "fp16" or "fp32".
        seqlen: token ids in a window.
        windows: how many; None for a whole text.
        batch_size: windows at once.
        gpu: whether a GPU is asked for; without one, the time is a CPU's.
    """

    dtype: str
    seqlen: int
    windows: int | None
    batch_size: int = _STREAMED_BATCH
    gpu: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return ITEMSIZE[self.dtype]

    @property
    def tokens(self) -> int:
        """In all windows."""
        return _WHOLE_TEXT if self.windows is None else self.windows * self.seqlen

    @property
    def speed(self) -> float:
        """Operations a second."""
        return _SPEED["gpu" if self.gpu else "cpu", self.itemsize]


def scaled(value: int, attempt: int) -> int:
    """Memory or time for a job's n-th attempt."""
    return value * attempt


def fetch(geometry: Geometry, *, converted: bool) -> Needs:
    """The dense model from the network; `converted` from a GGUF file, for which it is in float32 twice for a while."""
    nbytes = 2 * 4 * geometry.weights_bytes() // geometry.itemsize if converted else 0
    seconds = geometry.weights_bytes() * (1 / _NETWORK + 3 / _DISK)
    return Needs(_megabytes(nbytes + _PROCESS) if converted else _FLAT, _minutes(seconds))


def prune(geometry: Geometry) -> Needs:
    """A and the bundles: a file's tensors one after another, each read, digested and written."""
    return Needs(_megabytes(3 * geometry.largest_tensor_bytes + _PROCESS), _copied(geometry.weights_bytes()))


def windows() -> Needs:
    """A text cut into windows: the text decides, not the model."""
    return Needs(_TEXT, 3 * _LEAST_MINUTES)


def merge(geometry: Geometry, layers: int, *, ends: bool = False) -> Needs:
    """An adapter into so many layers, for A with embedding, norm and head (`ends`): memory does not grow with them."""
    return Needs(_FLAT, _copied(_part_bytes(geometry, layers, ends)))


def export(geometry: Geometry, layers: int) -> Needs:
    """A stage of so many layers as a checkpoint: the same stream as a merge."""
    return Needs(_FLAT, _copied(_part_bytes(geometry, layers, True)))


def segment(geometry: Geometry, layers: int, run: Pass) -> Needs:
    """So many layers from token ids or boundary activations to boundary activations."""
    return _streamed(geometry, layers, run)


def perplexity(geometry: Geometry, layers: int, run: Pass, *, compared: bool) -> Needs:
    """So many layers and the score; `compared` with the dense model, whose head is then in memory too."""
    return _streamed(geometry, layers, run, heads=1 + compared)


def dense_perplexity(geometry: Geometry, run: Pass) -> Needs:
    """The whole dense model and its score."""
    return _streamed(geometry, geometry.layers, run, heads=1)


def teacher_states(geometry: Geometry, run: Pass) -> Needs:
    """The dense model's final hidden states of the training windows."""
    return _streamed(geometry, geometry.layers, run)


def gather(geometry: Geometry, run: Pass) -> Needs:
    """Shards of hidden states into one file, a batch in memory."""
    token = geometry.hidden * run.itemsize
    held = 3 * run.batch_size * run.seqlen * token
    return Needs(max(_FLAT, _megabytes(held + _PROCESS)), _copied(run.tokens * token))


def importance(geometry: Geometry, run: Pass) -> Needs:
    """The ranking of layers, which also keeps every window's last token in float32 before and after each of them."""
    states = 4 * (geometry.layers + 1) * (run.windows or 0) * geometry.hidden
    return _streamed(geometry, geometry.layers, run, beside=states)


def closed_form(geometry: Geometry, layers: int, run: Pass) -> Needs:
    """An adapter in closed form: so many layers, the moments of one layer's features, and their eigenvectors.

    In float64: sums for two sets of windows, of which one is mixed of several texts', and the solver's copies.
    """
    inner, hidden = geometry.intermediate, geometry.hidden
    moments = 8 * (6 * inner * inner + 6 * inner * hidden)
    passes = _streamed(geometry, layers, run, beside=moments)
    sums = 2 * run.tokens * inner * (inner + hidden) * (1 if run.gpu else 2)  # float64 has half a CPU's speed
    solving = 30 * inner**3
    return Needs(passes.mem_mb, passes.runtime + _minutes((sums + solving) / run.speed), passes.gpu)


def choice(geometry: Geometry, amount: Amount, run: Pass) -> Needs:
    """Candidates that go through a tree of layers together, a layer at a time, their hidden states in memory.

    Those of all windows at once where they go into 4 GB, and of one batch at least; and what the norm makes of a batch.
    """
    window = run.seqlen * geometry.hidden * run.itemsize
    batch, whole = run.batch_size * window, amount.most_alive * (run.tokens // run.seqlen) * window
    states = max(amount.most_alive * batch, min(whole, _HELD_STATES)) + amount.most_ends * batch
    budget = streamed_bytes(geometry, 1, run, heads=1) + states
    rounds = max(1, ceil(whole / max(states, 1)))
    seconds = _operations(geometry, amount.passes, run, heads=amount.scored) / run.speed
    seconds += rounds * geometry.weights_bytes() / _DISK
    return Needs(_megabytes(budget + _PROCESS + _CUDA * run.gpu), _minutes(seconds), run.gpu)


def streamed_bytes(geometry: Geometry, layers: int, run: Pass, heads: int = 0) -> int:
    """What a streamed run is to be allowed for layers and all that stands beside them.

    As many of the layers as go into 4 GB, but two at least; the embedding as it is stored; one layer's forward pass as
    `streaming.memory` reckons with it, and a batch on its way in and out; heads and the block that they score.
    """
    layer = geometry.layer_parameters * run.itemsize
    held = min(layers, _held_layers(geometry, run)) * layer
    tokens = run.batch_size * run.seqlen
    forward = tokens * (8 * geometry.hidden + 3 * geometry.intermediate) * 4 + run.seqlen**2
    on_their_way = 3 * tokens * geometry.hidden * run.itemsize
    embedding = geometry.vocabulary * geometry.hidden
    scored = embedding * run.itemsize + 4 * 4 * max(_SCORED_LOGITS, geometry.vocabulary)
    return held + forward + on_their_way + embedding * geometry.itemsize + heads * scored


@dataclass(frozen=True)
class Training:
    """How an adapter is trained, as the configuration's section distill says.

    Attributes:
        dtype: of the frozen weights.
        seqlen: token ids in a window.
        rows: windows that go through the student together, the optimiser's batch_size.
        accumulation: such batches in a step.
        steps: of the optimiser.
        rank: of the adapter, on all seven projections.
        checkpointing: whether activations are computed again for the backward pass.
        shared_teacher: whether the teacher's states were made before; else the dense model is in memory too.
        gpu: as for `Pass`.
    """

    dtype: str
    seqlen: int
    rows: int
    accumulation: int
    steps: int
    rank: int
    checkpointing: bool
    shared_teacher: bool
    gpu: int = 1

    @property
    def as_pass(self) -> Pass:
        """All windows that it sees."""
        return Pass(self.dtype, self.seqlen, self.rows * self.accumulation * self.steps, self.rows, self.gpu)


def train_adapter(geometry: Geometry, layers: int, adapted: int, training: Training) -> Needs:
    """The adapter of a part, on a student of so many layers, `adapted` of them with an adapter.

    In memory are the student, the teacher or its head alone, the adapter with gradient and both moments, the
    activations that the backward pass asks for, and the loss over one block of tokens.
    """
    run = training.as_pass
    embedding = geometry.vocabulary * geometry.hidden
    student = layers * geometry.layer_parameters + geometry.ends_parameters
    teacher = embedding if training.shared_teacher else geometry.weights_bytes() // geometry.itemsize
    adapter = 4 * 4 * adapted * _lora_parameters(geometry, training.rank)
    loss = 4 * _LOSS_BLOCKS * max(_LOSS_LOGITS, geometry.vocabulary) + 4 * run.itemsize * embedding
    held = (student + teacher) * run.itemsize + adapter + activation_bytes(geometry, layers, training) + loss
    # Forward, backward and, with checkpointing, forward again; the backward pass of a head is one of its own.
    passes = 2 + training.checkpointing
    operations = passes * _operations(geometry, layers, run, heads=2)
    operations += 0 if training.shared_teacher else _operations(geometry, geometry.layers, run)
    seconds = operations / run.speed + (student + teacher) * geometry.itemsize / _DISK
    return Needs(_megabytes(held + _PROCESS + _CUDA * run.gpu), _minutes(seconds), run.gpu)


def activation_bytes(geometry: Geometry, layers: int, training: Training) -> int:
    """What the backward pass through so many layers asks for, at most, with LoRA on all projections.

    Of each token in a layer: norms and what goes into the projections in float32, as LoRA's factors take it; queries
    and keys with their values before and after attention; the MLP's inner states, one of them in float32 too.
    """
    itemsize, tokens = training.as_pass.itemsize, training.rows * training.seqlen
    attention = 3 * (geometry.queries + geometry.keys) * itemsize
    whole = tokens * (8 * geometry.hidden * 4 + geometry.intermediate * (3 * itemsize + 4) + attention)
    if not training.checkpointing:
        return (layers + 1) * whole
    return layers * tokens * geometry.hidden * itemsize + 2 * whole


def _lora_parameters(geometry: Geometry, rank: int) -> int:
    """Of one layer with an adapter on all seven projections; with DoRA's magnitudes, used or not."""
    q, k, hidden, inner = geometry.queries, geometry.keys, geometry.hidden, geometry.intermediate
    ends = 2 * (hidden + q) + 2 * (hidden + k) + 3 * (hidden + inner)
    return rank * ends + q + 2 * k + 2 * hidden + 2 * inner


def _streamed(geometry: Geometry, layers: int, run: Pass, heads: int = 0, beside: int = 0) -> Needs:
    budget = streamed_bytes(geometry, layers, run, heads)
    trips = max(1, ceil(layers / _held_layers(geometry, run)))
    moved = 2 * trips * run.tokens * geometry.hidden * run.itemsize
    read = layers * geometry.layer_bytes + geometry.ends_bytes
    seconds = _operations(geometry, layers, run, heads) / run.speed + (moved + read) / _DISK
    return Needs(_megabytes(budget + beside + _PROCESS + _CUDA * run.gpu), _minutes(seconds), run.gpu)


def _held_layers(geometry: Geometry, run: Pass) -> int:
    return max(2, _HELD_LAYERS // (geometry.layer_parameters * run.itemsize))


def _operations(geometry: Geometry, layers: int, run: Pass, heads: int = 0) -> int:
    """Of all windows through layers and heads."""
    layer = 2 * geometry.layer_parameters + 4 * run.seqlen * geometry.queries
    return run.tokens * (layers * layer + heads * 2 * geometry.vocabulary * geometry.hidden)


def _part_bytes(geometry: Geometry, layers: int, ends: bool) -> int:
    return geometry.weights_bytes(layers) if ends else layers * geometry.layer_bytes


def _copied(nbytes: int) -> int:
    """Minutes in which so many bytes are read, worked on, written and read back; fp32 instead of 16 bits, perhaps."""
    return _minutes(2 * nbytes / _DISK)


def _megabytes(nbytes: int) -> int:
    return ceil(nbytes / 10**6)


def _minutes(seconds: float) -> int:
    return max(_LEAST_MINUTES, ceil(_GENEROUS * (seconds + _START) / 60))
