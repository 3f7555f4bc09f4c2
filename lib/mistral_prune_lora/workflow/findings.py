"""What checks have found: mistakes and doubts by the path of their key, each told once for all that share it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mistral_prune_lora.errors import PipelineError

_EXPERIMENTS = "experiments."


@dataclass
class Findings:
    """Mistakes and doubts in the order in which they were found."""

    _faults: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    _warnings: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def tell(self, path: str, text: str, *, fault: bool = True) -> None:
        """Add one.

        Args:
            path: the key's path.
            text: what is wrong there.
            fault: whether it is a mistake, and not only a doubt.
        """
        _, name, tail = path.split(".", 2) if path.startswith(_EXPERIMENTS) else ("", path, "")
        found = (self._faults if fault else self._warnings).setdefault((tail, text), [])
        # What stands outside of the experiments has one path of its own.
        found.append(name if tail else path)

    @contextmanager
    def asking(self, path: str, *, fault: bool = True) -> Iterator[None]:
        """Tell a PipelineError of the block; arguments as for `tell`."""
        try:
            yield
        except PipelineError as error:
            self.tell(path, str(error), fault=fault)

    @property
    def faults(self) -> list[str]:
        """The mistakes, a line each."""
        return [_line(*key, places) for key, places in self._faults.items()]

    @property
    def warnings(self) -> list[str]:
        """The doubts, a line each."""
        return [_line(*key, places) for key, places in self._warnings.items()]


def _line(tail: str, text: str, places: list[str]) -> str:
    first, *others = dict.fromkeys(places)
    more = f" (and {len(others)} more)" if others else ""
    return f"{_EXPERIMENTS}{first}.{tail}{more}: {text}" if tail else f"{first}{more}: {text}"
