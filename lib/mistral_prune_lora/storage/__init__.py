"""Bytes on disk: whole files, directories that appear at once, tensors by position, journals."""
