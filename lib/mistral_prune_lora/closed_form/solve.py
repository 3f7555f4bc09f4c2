"""An adapter in closed form: every corrected layer of a part, front to back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.closed_form.calibration import Calibration
from mistral_prune_lora.closed_form.correction import Correction
from mistral_prune_lora.closed_form.places import Place, correction_places
from mistral_prune_lora.closed_form.regression import factors, mixed, solve
from mistral_prune_lora.closed_form.settings import CalibrationText, ClosedFormSettings
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.streaming.compute import Compute, LayerSource
from mistral_prune_lora.streaming.passage import Passage


@dataclass(frozen=True)
class ClosedForm:
    """The corrections of one part.

    For a layer before a cut, with features X (what enters its `down_proj`), its output S and the dense model's stream D
    that enters the next layer still there, the weight is changed by argmin |D - S - X W|^2 + ridge |W|^2, where a
    token's squared error is divided by the length of its D unless all tokens count alike. This contains what ReplaceMe
    regresses on (https://arxiv.org/abs/2505.02819): the outputs of that projection are linear in X.
    Corrections behind it see the stream as it then is.

    Attributes:
        part: "A", "B" or "C".
        student: the pruned A for A; for B and C what their adapters are trained on.
        dense_dir: the dense model.
        texts: what to calibrate on.
        settings: rank, ridge, places.
        compute: device, dtype, batch size, memory.
        given: of each text, files of boundary activations that others have made of its windows; what they hold of the
            student's or the dense model's way is not run again.

    Raises:
        LayoutError, CheckpointError: the student or a bundle is not what the part needs; nothing is cut away.
        PipelineError: no ridge is given, and no windows are held out to choose it on.
    """

    part: str
    student: Student
    dense_dir: str | Path
    texts: Sequence[CalibrationText]
    settings: ClosedFormSettings
    compute: Compute
    given: Sequence[Sequence[str | Path]] = ()

    def __post_init__(self) -> None:
        _ = self.places  # from headers alone
        if self.settings.ridge is None and not all(text.held_out for text in self.texts):
            raise PipelineError(
                "the ridge is chosen on held-out windows, and of a text none are held out",
                where="held_out",
                mend="hold some out, or give a ridge",
            )

    @cached_property
    def places(self) -> list[Place]:
        """The layers that are corrected, front to back."""
        own, active = self.student.layers(self.part), [source.index for source in self._sources]
        return correction_places(active, own, self._dense.config["num_hidden_layers"], self.settings.layers_behind)

    @cached_property
    def _model(self) -> Checkpoint:
        return self.student.checkpoint()

    @cached_property
    def _dense(self) -> Checkpoint:
        return open_checkpoint(self.dense_dir)

    @cached_property
    def _sources(self) -> list[LayerSource]:
        return self.student.sources()

    def corrections(self, folder: Path) -> list[Correction]:
        """Solve for them.

        Args:
            folder: where boundary activations go; what an interrupted run left there is gone on with.

        Raises:
            CheckpointError: weights are missing, do not fit, or are not what their record says was written.
            DataError: a token id without an embedding.
            NumberError: hidden states become NaN or infinity.
            PipelineError: memory or disk space does not suffice.
        """
        found: list[Correction] = []
        for place in self.places:
            found.append(self._corrected(place, found, folder))
        return found

    def _corrected(self, place: Place, before: Sequence[Correction], folder: Path) -> Correction:
        by_layer = {correction.layer: (correction,) for correction in before}
        sources = [replace(s, adapters=by_layer.get(s.index, ())) for s in self._sources]
        below = [source for source in sources if source.index < place.layer]
        own = next(source for source in sources if source.index == place.layer)
        dense = [LayerSource(index, self._dense) for index in range(place.before)]
        solved, held_out = [], []
        for text, given in zip(self.texts, self.given or [()] * len(self.texts), strict=True):
            student, teacher = (Passage(model, text.windows, self.compute) for model in (self._model, self._dense))
            calibration = Calibration(text, student, teacher, folder, given)
            origin = calibration.entering(below)
            wanted = calibration.wanted(dense)
            first, second = calibration.moments(origin, own, wanted, self.settings.token_weights)
            solved.append(first)
            held_out += [second] if second else []
        return self._solved(place, solved, held_out)

    def _solved(self, place: Place, solved: list, held_out: list) -> Correction:
        weights = [text.weight for text in self.texts]
        chosen = mixed(held_out, weights) if len(held_out) == len(solved) else None
        wanted = self.settings
        found = solve(mixed(solved, weights), chosen, wanted.ridge, wanted.rank)
        inner, hidden = found.weights.shape
        rank = min(wanted.rank or hidden, hidden, inner)
        a, b = factors(found.weights.cpu(), rank)
        about: dict[str, float | None] = {
            "layer": place.layer,
            "before": place.before,
            "rank": rank,
            "ridge": found.ridge,
        }
        about |= {"ridge": found.ridge, "residual": found.residual, "held_out_residual": found.held_out}
        share = "" if found.held_out is None else f", {found.held_out:.3f} on held-out tokens"
        print(
            f"layer {place.layer}: of what enters layer {place.before} and its output lacks, {found.residual:.3f} is"
            f" left{share}; ridge {found.ridge:.1e}, rank {rank}",
            flush=True,
        )
        return Correction(place.layer, a, b, about)
