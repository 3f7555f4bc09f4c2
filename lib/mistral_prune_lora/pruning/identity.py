"""The layer that stands in for a dropped one, under the path that the guide names; it is defined among the models."""

from __future__ import annotations

from mistral_prune_lora.models.pass_layer import PassLayer

__all__ = ["PassLayer"]
