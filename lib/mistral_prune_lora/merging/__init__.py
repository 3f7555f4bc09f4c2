"""Adapters merged into a model or a bundle, with PEFT's bits."""
