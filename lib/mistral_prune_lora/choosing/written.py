"""A choice as it is written: a directory with the table of all candidates, the record, and a figure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mistral_prune_lora.checkpoints.dense import open_dense
from mistral_prune_lora.choosing.choose import Choice, choose
from mistral_prune_lora.choosing.measure import Measurement
from mistral_prune_lora.choosing.settings import ChoiceSettings
from mistral_prune_lora.distillation.teacher_record import weight_digests
from mistral_prune_lora.provenance import PACKAGE, file_sha256, record_sha256, versions
from mistral_prune_lora.storage.json_file import write_json
from mistral_prune_lora.storage.outputs import Output, Record, claim
from mistral_prune_lora.storage.transaction import atomic_directory
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.text.doubts import warn_of
from mistral_prune_lora.text.windows import Windows

COMMAND = "choose_layers"
TABLE, FIGURE = "choice.csv", "choice.svg"


def _recorded(content: dict) -> set[str] | None:
    ours = content.get("command") == COMMAND and isinstance(content.get("files"), list)
    return {str(name) for name in content["files"]} if ours else None


RECORD = Record("choice.json", "a choice of layers", _recorded)


@dataclass(frozen=True)
class ChoiceJob:
    """One choice to make.

    Attributes:
        model_dir: the dense model.
        windows: to measure on.
        settings: what is chosen from.
        compute: device, dtype, batch size, memory.
        output_dir: written whole or not at all. Until then a journal of finished rounds lies hidden beside it.
        made: what the workflow calls the choice and its dense model: "name" and "model"; None outside of it.
    """

    model_dir: str | Path
    windows: Windows
    settings: ChoiceSettings
    compute: Compute
    output_dir: Path
    made: Mapping[str, str] | None = None

    def run(self, *, overwrite: bool = False) -> Choice:
        """Measure, choose and write.

        Args:
            overwrite: replace what is no such choice, too; never an input.

        Raises:
            PipelineError: the output may not or cannot be written, see `outputs.claim`. Others as for `choose`.
        """
        model = open_dense(self.model_dir)
        self.settings.check(model.config["num_hidden_layers"])
        output = Output.directory(self.output_dir, "--output_dir", RECORD)
        check, doubts = claim([output], [self.model_dir], overwrite=overwrite), warn_of(model, self.windows)
        passage = Passage(model, self.windows, self.compute)
        journal = self.output_dir.with_name(f".{self.output_dir.name}.scores")
        with Measurement(passage, journal, race=self.settings.race) as measurement:
            with atomic_directory(self.output_dir, check=check) as fresh:
                choice = choose(measurement, self.settings)
                _write(fresh, choice, self._content(choice, measurement, doubts))
            measurement.forget()
        return choice

    def _content(self, choice: Choice, measurement: Measurement, doubts: list[str]) -> dict:
        run, told = measurement.record, self.windows.identity
        config = file_sha256(Path(self.model_dir, "config.json"))
        return {
            "command": COMMAND,
            "num_layers": measurement.num_layers,
            "dropped": list(choice.dropped),
            "B": list(choice.b),
            "C": list(choice.c),
            "settings": asdict(self.settings),
            "dense": choice.dense,
            "proxies": choice.proxies,
            "layer_passes": choice.passes,
            "candidates": json.loads(choice.table.to_json(orient="records", double_precision=15)),
            "model": {
                "dir": os.fspath(self.model_dir),
                "files": {"config.json": config, **weight_digests(self.model_dir)},
            },
            "windows": told.content(),
            "dtype": run.dtype,
            "batch_size": self.compute.batch_size,
            "steps": run.steps,
            "weights_sha256": record_sha256(run.weights),
            "warnings": doubts,
            "made": None if self.made is None else dict(self.made),
            "versions": versions(PACKAGE, "torch", "transformers"),
            "files": [TABLE, FIGURE, RECORD.name],
        }


def _write(folder: Path, choice: Choice, content: Mapping) -> None:
    from mistral_prune_lora.results.choice_plot import plot_choice  # matplotlib, which the walk has no use for

    choice.table.to_csv(folder / TABLE, index=False)
    plot_choice(choice.table, folder / FIGURE)
    write_json(folder / RECORD.name, content)
