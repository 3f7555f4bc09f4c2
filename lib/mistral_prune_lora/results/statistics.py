"""What a perplexity is worth: its standard error, and whether two of them differ. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mistral_prune_lora.errors import DataError, NumberError
from mistral_prune_lora.storage.transaction import atomic_file

if TYPE_CHECKING:
    import pandas as pd  # at run time where tables are made: a run of layers that ends in no score needs none


@dataclass(frozen=True)
class WindowScores:
    """What is known of each scored window; float64 arrays of shape (windows,), in the order of the windows.

    Attributes:
        nll: sum of the negative log-likelihoods of its predicted tokens, in nats.
        correct: predicted tokens whose most likely token is the true one.
        kl: sum over its predicted tokens of KL(dense || this model), in nats; None without the dense model.
        agree: predicted tokens whose most likely token is also the dense model's; None without it.
    """

    nll: np.ndarray
    correct: np.ndarray
    kl: np.ndarray | None = None
    agree: np.ndarray | None = None

    @classmethod
    def concatenate(cls, parts: Iterable[WindowScores]) -> WindowScores:
        """The scores of consecutive windows as one."""
        parts = list(parts)
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        whole: dict[str, Any]
        whole = {name: None if values[0] is None else np.concatenate(values) for name, values in columns.items()}
        return cls(**whole)

    def first_not_finite(self) -> int | None:
        """The first window of which a score is NaN or infinity; None if all are numbers."""
        known = [column for column in vars(self).values() if column is not None]
        bad = np.flatnonzero(~np.isfinite(known).all(axis=0))
        return int(bad[0]) if len(bad) else None

    def content(self) -> dict:
        """All of it as JSON takes it."""
        return {name: None if column is None else column.tolist() for name, column in vars(self).items()}

    @classmethod
    def parse(cls, content: Mapping, windows: int, *, taught: bool) -> WindowScores | None:
        """The scores in what `content` gave; None if they are not those of so many windows, all of them numbers.

        Args:
            content: may hold anything.
            windows: how many there must be.
            taught: whether they were compared with the dense model.
        """
        columns: dict[str, Any] = {}
        for name, there in (("nll", True), ("correct", True), ("kl", taught), ("agree", taught)):
            values = content.get(name)
            if not there:
                columns[name] = None
            elif isinstance(values, list) and len(values) == windows and all(type(v) is float for v in values):
                columns[name] = np.array(values, dtype=np.float64)
            else:
                return None
        scores = cls(**columns)
        return scores if scores.first_not_finite() is None else None

    def save(self, path: str | Path, predicted_per_window: int) -> None:
        """Write them as parquet: window, tokens (predicted ones), and the columns that are known."""
        import pandas as pd

        known = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        count = len(self.nll)
        table = pd.DataFrame({"window": np.arange(count), "tokens": np.full(count, predicted_per_window), **known})
        with atomic_file(path) as fresh:
            table.to_parquet(fresh, index=False)


def summarise(scores: WindowScores, *, predicted_per_window: int, tokens_per_byte: float | None) -> dict:
    """The numbers of one evaluation.

    Mean NLL is the total over all predicted tokens divided by their count. Windows are equally long, so it is the mean
    of the windows' means, and its standard error is that of a mean over windows: tokens of one window depend on each
    other, windows much less. The perplexity's follows by the delta method, d exp(x) = exp(x) dx.

    Args:
        scores: of all windows.
        predicted_per_window: seqlen - 1.
        tokens_per_byte: token ids of the windows for each UTF-8 byte of text that they cover. Bits per byte are mean
            NLL / ln 2 times this: the first token of a window, which nothing predicts, is taken to cost the mean. None
            if they cover no text.

    Returns:
        ppl, ppl_se, mean_nll, mean_nll_se (standard errors are None for a single window), bits_per_byte (None without
        text), tokens, windows, top1_accuracy; with a dense model also kl_dense (nats a token), kl_dense_se,
        top1_agreement.

    Raises:
        NumberError: one of them is NaN or infinity: a window's score is none, or the perplexity is beyond a float64.
    """
    fault = scores.first_not_finite()
    if fault is not None:
        raise NumberError(f"a score of window {fault} is NaN or infinity", window=fault)
    windows = len(scores.nll)
    tokens = windows * predicted_per_window
    mean = math.fsum(scores.nll) / tokens
    ppl = perplexity_of(mean)
    error = standard_error(scores.nll / predicted_per_window)
    result = {
        "ppl": ppl,
        "ppl_se": None if error is None else ppl * error,
        "mean_nll": mean,
        "mean_nll_se": error,
        "bits_per_byte": None if tokens_per_byte is None else mean / math.log(2) * tokens_per_byte,
        "tokens": tokens,
        "windows": windows,
        "top1_accuracy": math.fsum(scores.correct) / tokens,
    }
    if scores.kl is not None and scores.agree is not None:
        result |= {
            "kl_dense": math.fsum(scores.kl) / tokens,
            "kl_dense_se": standard_error(scores.kl / predicted_per_window),
            "top1_agreement": math.fsum(scores.agree) / tokens,
        }
    wrong = [name for name, value in result.items() if value is not None and not math.isfinite(value)]
    if wrong:
        raise NumberError(f"{wrong[0]} is NaN or infinity, at a mean NLL of {mean:g} nats a token")
    return result


def perplexity_of(mean_nll: float) -> float:
    """exp(mean NLL), or the ratio of two perplexities from the difference of their mean NLL.

    Raises:
        NumberError: it is beyond the largest float64.
    """
    try:
        return math.exp(mean_nll)
    except OverflowError:
        raise NumberError(
            f"exp({mean_nll:g}), the perplexity, is beyond the largest number",
            mend="Look at the weights: a blind guess among 32000 tokens costs 10.4 nats",
        ) from None


def paired_difference(first: np.ndarray, second: np.ndarray, *, level: float = 0.95) -> dict:
    """How much the mean NLL of `second` exceeds that of `first`, window by window, with a confidence interval.

    The same windows are hard for both, so their differences vary far less than either. Student's t interval.

    Args:
        first, second: mean NLL a token of the same windows in the same order, nats.
        level: of the interval.

    Returns:
        difference, low, high (nats a token; low and high are None for a single window), ppl_ratio = exp(difference).

    Raises:
        DataError: they are not scores of the same number of windows.
        NumberError: the ratio is beyond the largest number.
    """
    from scipy.special import stdtrit

    if first.shape != second.shape:
        raise DataError(f"{len(first)} and {len(second)} windows cannot be compared in pairs")
    difference = second - first
    mean, error = float(difference.mean()), standard_error(difference)
    half = None if error is None else float(stdtrit(len(difference) - 1, (1 + level) / 2)) * error
    return {
        "difference": mean,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
        "ppl_ratio": perplexity_of(mean),
    }


def compare_stages(nll: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Each pair of stages as a row: first, second, and what `paired_difference` says of them.

    Args:
        nll: for each stage or label, mean NLL a token of the same windows in the same order.
    """
    import pandas as pd

    names = list(nll)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    rows = [{"first": a, "second": b, **paired_difference(nll[a], nll[b])} for a, b in pairs]
    return pd.DataFrame(rows, columns=["first", "second", "difference", "low", "high", "ppl_ratio"])


def standard_error(values: np.ndarray) -> float | None:
    """The standard error of the mean of independent values; None for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
