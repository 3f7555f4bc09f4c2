"""A stage, measured: its numbers with everything that they need in order to be compared with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_prune_lora.errors import NumberError
from mistral_prune_lora.provenance import record_sha256
from mistral_prune_lora.results.statistics import WindowScores, summarise
from mistral_prune_lora.storage.json_file import write_json
from mistral_prune_lora.storage.transaction import atomic_file
from mistral_prune_lora.streaming.passage import Passage
from mistral_prune_lora.streaming.record import RunRecord
from mistral_prune_lora.text.windows import PROTOCOL


@dataclass(frozen=True)
class StageResult:
    """One stage, measured.

    Attributes:
        record: the result with everything that identifies it, ready for JSON.
        scores: of every window.
    """

    record: dict
    scores: WindowScores

    def save(self, result_json: str | Path, window_parquet: str | Path | None = None) -> None:
        """Write the record as JSON and the windows' scores as parquet; each whole or not at all."""
        if window_parquet is not None:
            self.scores.save(window_parquet, self.record["seqlen"] - 1)
        with atomic_file(result_json) as fresh:
            write_json(fresh, self.record)


def stage_result(
    about: Mapping[str, str | None], run: RunRecord, scores: WindowScores, passage: Passage, doubts: Sequence[str]
) -> StageResult:
    """The result of a stage.

    Args:
        about: what it is called, "label" among it.
        run: what was run.
        scores: of all windows.
        passage: the windows, and how they were run.
        doubts: warnings that stay with the numbers.

    Raises:
        NumberError: the perplexity is no number.
    """
    windows, told = passage.windows, passage.windows.identity
    try:
        numbers = summarise(
            scores,
            predicted_per_window=windows.seqlen - 1,
            tokens_per_byte=windows.ids.numel() / told.utf8_bytes if told.utf8_bytes else None,
        )
    except NumberError as error:
        raise NumberError(error.what, where=about["label"], mend=error.mend) from None
    record = {
        **about,
        "active_layers": len(run.layers),
        "parameters": run.parameters,
        **numbers,
        "seqlen": windows.seqlen,
        "dtype": run.dtype,
        "device": passage.compute.device.type,  # which of several equal GPUs it was is chance
        "batch_size": passage.compute.batch_size,
        "protocol": PROTOCOL,
        "text": {
            "dataset": told.dataset,
            "split": told.split,
            "source": told.source,
            "sha256": told.text_sha256,
            "utf8_bytes_covered": told.utf8_bytes,
            "windows_available": told.text_windows,
        },
        "ids_sha256": told.ids_sha256,
        "tokenizer": {"name": told.tokenizer, "sha256": told.tokenizer_sha256},
        "steps": run.steps,
        "weights_sha256": record_sha256(run.weights),
        "weights": run.weights,
        **({"dense_sha256": run.dense} if run.dense else {}),
        "warnings": list(doubts),
    }
    return StageResult(record, scores)
