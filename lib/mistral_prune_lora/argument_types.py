"""Kinds of numbers on a command line, for argparse's `type`."""

from __future__ import annotations

import argparse

from mistral_prune_lora.sizes import parse_size


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(text, 1)


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(text, 0)


def size_in_bytes(text: str) -> int:
    """Bytes of a size such as 8GB."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _at_least(text: str, least: int) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return number
