"""Prune a Mistral-style LLM, heal it with distilled LoRA adapters, measure every stage. Imports nothing heavy."""
