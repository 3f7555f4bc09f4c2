"""What an adapter in closed form is told; each value checked where it is set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_prune_lora.errors import PipelineError

if TYPE_CHECKING:
    from mistral_prune_lora.text.windows import Windows

TOKEN_WEIGHTS = ("inverse_norm", "equal")


@dataclass(frozen=True)
class ClosedFormSettings:
    """All that decides the adapter beside model and texts.

    Attributes:
        rank: of the adapter; None keeps the solution whole, of the rank that the hidden size allows.
        ridge: as a multiple of the mean square of a feature; None chooses it on held-out windows.
        layers_behind: how many layers behind each cut are corrected too.
        token_weights: "inverse_norm" divides a token's squared error by the length of the state that is wanted there.
            Models give a few tokens, as a rule the first one, states hundreds of times longer than all others, which
            "equal" weights would be about; the next norm makes all of them equally long.

    Raises:
        PipelineError: a value that cannot be; names the field.
    """

    rank: int | None = None
    ridge: float | None = None
    layers_behind: int = 0
    token_weights: str = TOKEN_WEIGHTS[0]

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("layers_behind", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise PipelineError(f"{name} is {value!r}", mend=f"Give a whole number of at least {least}")
        if self.token_weights not in TOKEN_WEIGHTS:
            raise PipelineError(
                f"token_weights is {self.token_weights!r}", mend=f"Give one of {', '.join(TOKEN_WEIGHTS)}"
            )
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge > 0):
            raise PipelineError(f"ridge is {self.ridge!r}", mend="Give a number above 0, or leave it out")


@dataclass(frozen=True)
class CalibrationText:
    """Windows of one text.

    Attributes:
        windows: of running text; the last `held_out` of them choose the ridge, the others are solved for.
        held_out: how many.
        weight: what the text counts beside the others, however long it is.

    Raises:
        DataError: these are windows of examples.
        PipelineError: no window is left to solve for; a weight that is none.
    """

    windows: Windows
    held_out: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        self.windows.check_running_text("a calibration")
        if not 0 <= self.held_out < len(self.windows):
            raise PipelineError(
                f"{self.held_out} of {len(self.windows)} windows are held out, and none is left to solve for",
                where=self.windows.identity.source,
                mend="take more windows, or hold out fewer",
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise PipelineError(f"a text's weight is {self.weight!r}", mend="Give a number above 0")

    @property
    def solved(self) -> int:
        """How many windows, from the first on, are solved for."""
        return len(self.windows) - self.held_out
