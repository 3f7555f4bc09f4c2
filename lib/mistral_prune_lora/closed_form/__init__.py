"""Adapters without training: what a cut takes away, regressed on a layer that is still there."""
