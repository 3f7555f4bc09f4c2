"""Where the time of work on several threads goes."""

from __future__ import annotations

import time
from collections.abc import Callable


class Stopwatch:
    """Wall-clock seconds by kind of work.

    Attributes:
        seconds: by the name of the work, summed. Threads run beside each other, so the sum may exceed the time that
            passed; and a thread that waits for a core while it works is booked as working.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def of_thread(self) -> Callable[[str | None], None]:
        """A function for one thread: books the time since its last call on a kind of work, or on none (None).

        A kind of work belongs to one thread at a time: the sums are not locked.
        """
        last = time.perf_counter()

        def lap(work: str | None) -> None:
            nonlocal last
            now = time.perf_counter()
            if work is not None:
                self.seconds[work] = self.seconds.get(work, 0.0) + now - last
            last = now

        return lap
