"""The dense models of a configuration as far as they are at hand: local ones, and those fetched already."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.families import read_config
from mistral_prune_lora.errors import PipelineError
from mistral_prune_lora.workflow.configuration import dense_dir


class DenseModels:
    """Opens each model once, by its headers."""

    def __init__(self, config: Mapping) -> None:
        """Open nothing yet.

        Args:
            config: checked, with its defaults.
        """
        self._config = config
        self._opened: dict[str, Checkpoint | None] = {}

    def is_local(self, model: str) -> bool:
        """Whether a model is a directory of the user's own, which no job will replace."""
        return "path" in self._config["models"][model]

    def at_hand(self, model: str) -> Checkpoint | None:
        """A model that lies on disk and can be read; None otherwise.

        One that was fetched may be of other settings than the present ones: it tells sizes, and refuses nothing.
        """
        if not os.path.isdir(dense_dir(self._config, model)):
            return None
        if model not in self._opened:
            try:
                opened = open_checkpoint(dense_dir(self._config, model))
                self._opened[model] = opened if opened.kind == "model" else None
            except PipelineError:
                self._opened[model] = None
        return self._opened[model]

    def local(self, model: str) -> Checkpoint | None:
        """A local model that can be read; None otherwise."""
        return self.at_hand(model) if self.is_local(model) else None

    def positions(self, model: str) -> int | None:
        """The positions that a model was made for; None if its config.json is not at hand or does not say."""
        if not os.path.isdir(dense_dir(self._config, model)):
            return None
        try:
            limit = read_config(dense_dir(self._config, model)).get("max_position_embeddings")
        except PipelineError:
            return None
        return limit if isinstance(limit, int) else None
