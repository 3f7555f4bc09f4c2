"""Adapters trained by distillation from the dense model."""
