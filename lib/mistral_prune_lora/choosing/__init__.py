"""Which layers to drop, and which of them to restore first: told by measured damage rather than by a proxy."""
