"""Models in memory, made by their own transformers class."""
