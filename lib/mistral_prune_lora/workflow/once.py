"""A question that is asked often, and answered once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps


def once(method: Callable) -> Callable:
    """A method that answers the same question once: names are digests over digests, and rules ask for them often.

    The answers are kept in the object's `_answers`, by the method's name and its arguments.
    """

    @wraps(method)
    def answer(self, *question):
        known = self._answers
        if (method.__name__, question) not in known:
            known[method.__name__, question] = method(self, *question)
        return known[method.__name__, question]

    return answer
