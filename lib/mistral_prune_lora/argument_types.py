"""Kinds of numbers on a command line, for argparse's `type`. Nothing that is not a finite number passes."""

from __future__ import annotations

import argparse
import math

from mistral_prune_lora.sizes import parse_size


class LeftOut(int):
    """A default, told from the same number where somebody gave it."""


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def seed(text: str) -> int:
    """What a random generator can be started with: a whole number from 0 to 2^63 - 1."""
    return _whole(text, 0, 2**63 - 1)


def positive_number(text: str) -> float:
    """A number above 0."""
    number = _finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _between(_finite(text), text, 0, 1)


def dropout(text: str) -> float:
    """A share that leaves something: from 0 to less than 1."""
    number = share(text)
    if number == 1:
        raise argparse.ArgumentTypeError(f"{text} would drop everything")
    return number


def learning_rate(text: str) -> float:
    """A number above 0 and at most 1."""
    return _between(positive_number(text), text, 0, 1)


def temperature(text: str) -> float:
    """A number from 0.01 to 100: beyond, logits divided by it are all alike or overflow."""
    return _between(_finite(text), text, 0.01, 100)


def size_in_bytes(text: str) -> int:
    """Bytes of a size such as 8GB."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def shard_size(text: str) -> int:
    """Bytes of a size such as 5GB, at least one."""
    nbytes = size_in_bytes(text)
    if not nbytes:
        raise argparse.ArgumentTypeError(f"{text} leaves no room for anything")
    return nbytes


def _whole(text: str, least: int, most: int | None = None) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    return _between(number, text, least, most)


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def _between(number, text: str, least: float, most: float | None):
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    if most is not None and number > most:
        raise argparse.ArgumentTypeError(f"{text} is more than {most}")
    return number


def layer_list(text: str) -> tuple[int, ...]:
    """Layers such as 20-23,29, in order."""
    layers: set[int] = set()
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        ends = [_whole(first, 0), _whole(last, 0) if dash else _whole(first, 0)]
        if ends[0] > ends[1]:
            raise argparse.ArgumentTypeError(f"{piece.strip()} counts down")
        layers.update(range(ends[0], ends[1] + 1))
    return tuple(sorted(layers))


def stage_shares(text: str) -> dict[str, float]:
    """Stages with what each counts, such as A=2,AB=1,FULL=1; a stage without a number counts 1."""
    shares: dict[str, float] = {}
    for told in text.split(","):
        stage, _, share = told.strip().partition("=")
        if stage in shares:
            raise argparse.ArgumentTypeError(f"names {stage} twice")
        shares[stage] = positive_number(share) if share else 1.0
    return shares


def hidden_loss(text: str) -> tuple[int, int, float]:
    """A student's layer, a teacher's, and a weight above 0: 20:23 or 20:23:0.5."""
    pieces = text.split(":")
    if len(pieces) not in (2, 3):
        raise argparse.ArgumentTypeError(f"{text} is not STUDENT_LAYER:TEACHER_LAYER or with :WEIGHT behind")
    return _whole(pieces[0], 0), _whole(pieces[1], 0), positive_number(pieces[2]) if len(pieces) == 3 else 1.0
