"""A choice of layers as the workflow makes it, named as all artefacts are; it needs no layers of its experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from mistral_prune_lora.choosing.settings import ChoiceSettings
from mistral_prune_lora.workflow.artefacts import SHARED, Source, Windows
from mistral_prune_lora.workflow.content import Content, short_key
from mistral_prune_lora.workflow.given import dense_model, text_files, text_identity


@dataclass(frozen=True)
class Choice:
    """A choice of layers.

    Attributes:
        model: the dense model.
        num_layers: of it.
        windows: to measure on.
        settings: what is chosen from.
        batch_size, dtype: how.
    """

    model: Source
    num_layers: int
    windows: Windows
    settings: ChoiceSettings
    batch_size: int
    dtype: str

    @classmethod
    def of(cls, config: Mapping, experiment: str, content: Content) -> Choice | None:
        """The choice of an experiment of a checked configuration; None if its section `choose` names no dataset.

        Raises:
            PipelineError: given files cannot be read.
        """
        told = config["experiments"][experiment]
        wanted, name = told["choose"], told["model"]
        if wanted["dataset"] is None:
            return None
        text = config["datasets"][wanted["dataset"]]
        model = dense_model(name, config["models"][name], content)
        files, identity = text_files(text), text_identity(text, content)
        windows = Windows(model, text, files, identity, wanted["seqlen"], wanted["windows"])
        how = (ChoiceSettings.of(wanted), wanted["batch_size"], wanted["dtype"])
        return cls(model, config["models"][name]["num_layers"], windows, *how)

    @cached_property
    def name(self) -> str:
        """Its name under results/shared/choice."""
        recipe = {
            "model": self.model.identity,
            "windows": self.windows.name,
            **asdict(self.settings),
            "batch_size": self.batch_size,
            "dtype": self.dtype,
        }
        return f"{self.settings.drop}of{self.num_layers}-{short_key(recipe)}"

    @property
    def folder(self) -> str:
        """Where it lies."""
        return f"{SHARED}/choice/{self.name}"

    @property
    def journal(self) -> str:
        """What a killed run has finished."""
        return f"{SHARED}/choice/.{self.name}.scores"


def choices(config: Mapping, content: Content) -> dict[str, Choice]:
    """The choices of all experiments that ask for one, by the experiment."""
    made = {name: Choice.of(config, name, content) for name in config["experiments"]}
    return {name: choice for name, choice in made.items() if choice}
