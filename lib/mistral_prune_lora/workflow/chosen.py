"""Layers that an earlier run has chosen: its choice.json as the configuration takes it. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.storage.json_file import read_json, read_json_if_there
from mistral_prune_lora.workflow.artefacts import Source
from mistral_prune_lora.workflow.content import Content

RECORD = "choice.json"
_AGAIN = "choose the layers again, with the workflow or with `python -m mistral_prune_lora.pruning.choose_layers`"


@dataclass(frozen=True)
class Chosen:
    """What a choice.json says.

    Attributes:
        path: the file.
        layout: the layers of A, B and C.
        model_files: the sha256 of the dense model's config.json and weight files, by name.
        made: what the workflow that made it calls it and its dense model; empty where a command made it.
    """

    path: str
    layout: Layout
    model_files: Mapping[str, str]
    made: Mapping[str, str]

    @classmethod
    def read(cls, path: str) -> Chosen:
        """Read the file.

        Raises:
            LayoutError: it is not there, is no choice, or its layers contradict each other.
        """
        told = read_json(path, LayoutError, mend=_AGAIN)
        count, parts = told.get("num_layers"), (told.get("B"), told.get("C"))
        model, made = told.get("model"), told.get("made") or {}
        files = model.get("files") if isinstance(model, dict) else None
        sound = told.get("command") == "choose_layers" and type(count) is int and isinstance(made, dict)
        sound = sound and all(isinstance(p, list) and all(type(i) is int for i in p) for p in parts)
        if not sound or not isinstance(files, dict) or not files:
            raise LayoutError("is not what choosing layers wrote", where=path, mend=_AGAIN)
        return cls(path, Layout(count, *map(tuple, parts)), files, made)  # type: ignore[arg-type]  # looked at above

    def check_model(self, model: Source, content: Content) -> None:
        """Raise a LayoutError unless the layers were chosen for this dense model.

        Told by the workflow's own name of it, or by what its files hold. Of a fetched model, its record says so; of
        one that is still to be fetched, nothing is asked that is not known.
        """
        if self.made.get("model") == model.identity:
            return
        if model.given:
            files = {name: Path(model.folder, name) for name in self.model_files}
            there = {name: content.sha256(file) if file.is_file() else None for name, file in files.items()}
        else:
            there = (read_json_if_there(Path(model.folder, "source.json"), LayoutError) or {}).get("files", {})
            if not there and not self.made.get("model"):
                return
        other = next((name for name, sha256 in self.model_files.items() if there.get(name) != sha256), None)
        if other:
            raise LayoutError(
                f"was chosen for another model, whose {other} differs from that of {model.folder}",
                where=self.path,
                mend=_AGAIN,
            )


def choice_file(experiment: Mapping) -> str | None:
    """The choice.json that an experiment takes its layers from; None if it takes them from elsewhere."""
    return experiment.get("layers", {}).get("choice")


def waiting(config: Mapping, names: Mapping[str, str]) -> dict[str, str]:
    """The experiments whose layers are still to be chosen, each with what is to be done.

    A choice is still to be made where its file is not there, or where this configuration makes it with other settings
    than it was made with.

    Args:
        config: as `configuration.check_config` leaves it.
        names: of the choice that each experiment with a section `choose` makes.
    """
    found = {}
    for name, experiment in config["experiments"].items():
        file = choice_file(experiment)
        if file is None:
            continue
        maker = next((n for n in names if os.path.abspath(file) == os.path.abspath(f"results/{n}/{RECORD}")), None)
        how = f"run `snakemake results/{maker}/{RECORD} --cores N` first" if maker else _AGAIN
        if not os.path.exists(file):
            found[name] = f"experiments.{name}.layers.choice: there is no {file}; {how}"
        elif maker and Chosen.read(file).made.get("name") != names[maker]:
            told = f"{file} was chosen with other settings than experiments.{maker}.choose has"
            found[name] = f"experiments.{name}.layers.choice: {told}; {how}"
    return found
