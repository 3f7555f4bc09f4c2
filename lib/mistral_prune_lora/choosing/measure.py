"""KL(dense || candidate) and NLL of many candidates on the same windows, in one process.

Windows go in rounds, as many at once as all live branches' hidden states fit into memory for. Each round walks the
whole tree, so that a layer is read once a round; one round where memory suffices. What a finished round has found is in
a journal, from which a killed run goes on. Nothing is written to disk between layers: with a branch for each candidate,
it would be many times the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
from tqdm import tqdm

from mistral_prune_lora.choosing.candidates import Missing, running
from mistral_prune_lora.choosing.proxies import BatchProxies, Proxies
from mistral_prune_lora.choosing.ranking import survivors
from mistral_prune_lora.choosing.tree import Tree
from mistral_prune_lora.choosing.walk import Walk
from mistral_prune_lora.console import progress
from mistral_prune_lora.errors import NumberError
from mistral_prune_lora.layout.partition import spans
from mistral_prune_lora.models.config import head_name
from mistral_prune_lora.models.window_scores import Head, head_bytes, score_models
from mistral_prune_lora.results.statistics import WindowScores
from mistral_prune_lora.storage.finite import mend_for
from mistral_prune_lora.storage.journal import Journal
from mistral_prune_lora.streaming.backbone import Backbone
from mistral_prune_lora.streaming.compute import LayerSource
from mistral_prune_lora.streaming.faults import layers_blamed
from mistral_prune_lora.streaming.memory import resident_groups, working_bytes
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.streaming.record import parameters

DENSE: Missing = ()
_SHARE_OF_HOST = 4  # beside a GPU, hidden states between layers take this part of the host's free memory


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        scores: of each candidate, and of the dense model under DENSE. One that a race has dropped has fewer windows.
        proxies: of the dense model; None if they were not asked for.
        passes: how many times a layer was run, an average over the windows.
    """

    scores: dict[Missing, WindowScores]
    proxies: Proxies | None
    passes: float


@dataclass(frozen=True)
class _Round:
    """What one round has found: of the windows from the first on, so many."""

    first: int
    count: int
    scores: dict[Missing, WindowScores]
    cosines: tuple[list[list[float]], list[list[float]]] | None

    def content(self, block: int | None) -> dict:
        """As a journal's entry."""
        found = [[list(missing), scores.content()] for missing, scores in self.scores.items()]
        return {"first": self.first, "count": self.count, "scores": found, "block": block, "cosines": self.cosines}


class Measurement:
    """Candidates of one model, measured on one set of windows. A context manager, which holds the journal.

    Attributes:
        passage: the windows, and how they are run.
        record: of the dense model's run, with norm and head: everything that the numbers depend on.
        num_layers: of the dense model.
    """

    def __init__(self, passage: Passage, journal: Path, *, race: int | None = None) -> None:
        """Take up what a killed run has left.

        Args:
            passage: of the dense model.
            journal: the file of finished rounds; `forget` removes it.
            race: after each so many windows, candidates that are surely worse than the best are dropped; rounded up to
                whole batches. None measures all on all windows.

        Raises:
            CheckpointError: weights are missing, do not fit, or are not what their record says was written.
            DataError: an id that the model has no embedding for; windows of examples.
            PipelineError: another process holds the journal, or it cannot be written.
        """
        passage.windows.check_running_text("choosing layers")
        self.passage, self._origin = passage, passage.origin(None)
        self.num_layers = passage.config.num_hidden_layers
        self._sources = [LayerSource(layer, passage.model) for layer in range(self.num_layers)]
        self.record = self._origin.record.after(self._sources, passage.compute).with_head(passage.model)
        size = passage.compute.batch_size
        self._race = None if race is None else -(-race // size) * size
        with ExitStack() as held:
            self._journal = held.enter_context(Journal(journal, {"run": self.record.content(), "race": self._race}))
            self._held = held.pop_all()

    def __enter__(self) -> Measurement:
        return self

    def __exit__(self, *_) -> None:
        self._held.close()

    def forget(self) -> None:
        """Remove the journal: the result is kept elsewhere."""
        self._journal.remove()

    @property
    def predicted(self) -> int:
        """Tokens that are predicted in a window."""
        return self.passage.windows.seqlen - 1

    def measure(
        self, candidates: Sequence[Missing], *, words: str, block: int | None = None, race: bool = True
    ) -> Measured:
        """Measure candidates, and the dense model beside them.

        Args:
            candidates: by the layers that they run without.
            words: what is measured, for the progress bar.
            block: also take the proxies of blocks of so many layers.
            race: whether candidates may be dropped on the way, if there is a race at all.

        Raises:
            NumberError: hidden states or scores hold NaN or infinity; says which tensor, layers or candidate.
            PipelineError: memory does not suffice for one batch.
        """
        windows, alive = len(self.passage.windows), list(candidates)
        found: dict[Missing, list[WindowScores]] = {missing: [] for missing in (DENSE, *alive)}
        proxies, first, passes = None if block is None else Proxies(block), 0, 0
        with self._bar(words, self._tree(alive)) as bar:
            while first < windows:
                tree = self._tree(alive)
                bar.total = bar.n + self._work(tree) * (windows - first)
                at_once = self._windows_at_once(tree)
                done = self._known(first, alive, block)
                if done is None:
                    count = min(at_once, windows - first, self._to_next_look(first))
                    done = self._round(first, count, alive, tree, block, bar)
                    self._journal.append(done.content(block))
                else:
                    bar.update(self._work(tree) * done.count)
                for missing in (DENSE, *alive):
                    found[missing].append(done.scores[missing])
                if proxies and done.cosines:
                    proxies.add(*done.cosines)
                first, passes = first + done.count, passes + tree.passes * done.count
                if race and self._race and first % self._race == 0 and first < windows:
                    kept = {missing: WindowScores.concatenate(found[missing]) for missing in alive}
                    alive = survivors(kept, self.predicted)
        scores = {missing: WindowScores.concatenate(parts) for missing, parts in found.items()}
        return Measured(scores, proxies, passes / windows)

    def _tree(self, candidates: Sequence[Missing]) -> Tree:
        return Tree.of([running(self.num_layers, missing) for missing in (DENSE, *candidates)])

    def _bar(self, words: str, tree: Tree) -> tqdm:
        return progress(
            total=self._work(tree) * len(self.passage.windows), description=words, unit="tok", unit_scale=True
        )

    def _work(self, tree: Tree) -> int:
        """What a window costs, for the progress bar: tokens through layers, a score by what its head weighs."""
        return (tree.passes + len(tree.ends) * self._head_in_layers) * self.passage.windows.seqlen

    @cached_property
    def _head_in_layers(self) -> int:
        """Parameters of the output projection, in those of a layer."""
        model = self.passage.model
        return max(1, round(parameters([model.entries[head_name(model)]]) / parameters(model.layer(0).values())))

    def _to_next_look(self, first: int) -> int:
        """Windows until the race is looked at next."""
        return len(self.passage.windows) if self._race is None else self._race - first % self._race

    def _windows_at_once(self, tree: Tree) -> int:
        """How many windows' hidden states fit into memory for all live branches: whole batches.

        Raises:
            PipelineError: not even one batch's do.
        """
        passage = self.passage
        compute, config, seqlen = passage.compute, passage.config, passage.windows.seqlen
        batch = compute.batch_size * seqlen * config.hidden_size * compute.dtype.itemsize
        on_gpu = compute.device.type == "cuda"
        beside = self._origin.nbytes + head_bytes(passage.model, compute.dtype) + len(tree.ends) * batch
        # A layer at a time; the error that says what would be needed counts one batch of all branches.
        resident_groups(self._sources, compute, config, seqlen, beside + (0 if on_gpu else tree.most_alive * batch))
        if on_gpu:
            free = psutil.virtual_memory().available // _SHARE_OF_HOST
        else:
            layer = max(source.nbytes(compute.dtype) for source in self._sources)
            free = compute.memory - beside - layer - working_bytes(compute, config, seqlen)
        return max(1, free // (tree.most_alive * batch)) * compute.batch_size

    def _round(
        self, first: int, count: int, alive: Sequence[Missing], tree: Tree, block: int | None, bar: tqdm
    ) -> _Round:
        size = self.passage.compute.batch_size
        batches = range(first // size, -(-(first + count) // size))
        taps = {batch: BatchProxies(block) for batch in batches} if block else {}
        tap = (lambda batch, *states: taps[batch].take(*states)) if block else None
        ends = Walk(self.passage, self._origin, self._backbone, tree, tap).ends(batches, bar)
        found: dict[Missing, list[WindowScores]] = {missing: [] for missing in (DENSE, *alive)}
        for batch in batches:
            states = ends.pop(batch)
            moved = (hidden.to(self.passage.compute.device) for hidden in states)
            teacher = (self._head, states[0])
            scored = score_models(self._head, moved, self.passage.ids_of(batch), teacher)
            for missing, scores in zip(found, scored, strict=True):
                self._check(missing, scores, self.passage.windows_of(batch).start)
                found[missing].append(scores)
            bar.update(len(tree.ends) * self._head_in_layers * self.passage.ids_of(batch).numel())
        whole = {missing: WindowScores.concatenate(parts) for missing, parts in found.items()}
        told = [taps[batch].cosines() for batch in batches] if block else []
        cosines = ([row for last, _ in told for row in last], [row for _, every in told for row in every])
        return _Round(first, count, whole, cosines if block else None)

    def _known(self, first: int, alive: Sequence[Missing], block: int | None) -> _Round | None:
        """What the journal has of the windows from one on, for all candidates that are left."""
        for entry in self._journal.entries:
            if entry.get("first") == first and (block is None or entry.get("block") == block):
                done = _parsed(entry, [DENSE, *alive])
                if done:
                    return done
        return None

    def _check(self, missing: Missing, scores: WindowScores, first: int) -> None:
        """Raise a NumberError if scores are none, worded by what brought it."""
        fault = scores.first_not_finite()
        if fault is None:
            return
        words = f"without layers {spans(missing)}" if missing else "the dense model"
        run = [self._sources[layer] for layer in running(self.num_layers, missing)]
        with layers_blamed(self._origin, run, self.passage, words):
            raise NumberError(
                f"{words}: the score of window {first + fault} is NaN or infinity",
                where=self.passage.model.path,
                mend=mend_for(self.passage.compute.dtype),
                window=first + fault,
            )

    @cached_property
    def _backbone(self) -> Backbone:
        return Backbone(self.passage.config, self.passage.compute)

    @cached_property
    def _head(self) -> Head:
        compute = self.passage.compute
        return Head(self.passage.model, compute.dtype, compute.device)


def _parsed(entry: Mapping, wanted: Sequence[Missing]) -> _Round | None:
    """A round in a journal's entry; None if it has not all that is wanted."""
    try:
        first, count, told = entry["first"], entry["count"], entry["cosines"]
        read = {tuple(missing): WindowScores.parse(scores, count, taught=True) for missing, scores in entry["scores"]}
        scores = {missing: found for missing in wanted if (found := read.get(missing))}
        cosines = None if told is None else (told[0], told[1])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    return _Round(first, count, scores, cosines) if len(scores) == len(wanted) else None
