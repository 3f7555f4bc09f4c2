"""Perplexity of stages, every shared run of layers computed once."""
