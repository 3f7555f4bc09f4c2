"""A stage as a checkpoint of its own, for software that knows nothing of parts."""
