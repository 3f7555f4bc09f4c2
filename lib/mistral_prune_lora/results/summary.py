"""One table of every number, and one of what they differ by. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mistral_prune_lora.errors import DataError
from mistral_prune_lora.layout.partition import PARTS_OF_STAGE, STAGES
from mistral_prune_lora.results.statistics import compare_stages
from mistral_prune_lora.results.summary_file import AGAIN, VARIANTS
from mistral_prune_lora.storage.json_file import read_json
from mistral_prune_lora.storage.plain_file import check_plain
from mistral_prune_lora.storage.transaction import atomic_file

COLUMNS = (
    "experiment", "dataset", "variant", "stage", "label", "active_layers", "parameters", "ppl", "mean_nll", "tokens",
    "windows", "seqlen", "dtype", "ppl_se", "mean_nll_se", "bits_per_byte", "top1_accuracy", "kl_dense", "kl_dense_se",
    "top1_agreement", "device", "batch_size", "ids_sha256", "weights_sha256", "adapter_tensors_out_of_scope",
    "warnings",
)  # fmt: skip


@dataclass(frozen=True)
class Named:
    """A result, and what it is called here: one file serves every experiment that asks for the same.

    Attributes:
        experiment, dataset: as the user names them.
        variant: one of VARIANTS.
        stage: "A", "AB" or "FULL".
        path: the result JSON.
    """

    experiment: str
    dataset: str
    variant: str
    stage: str
    path: str | Path


def write_summary(
    results: Sequence[Named],
    summary_csv: str | Path,
    comparisons_csv: str | Path,
    merges: Mapping[tuple[str, str], str | Path] | None = None,
) -> None:
    """Gather perplexity results into summary.csv, and the pairs that can be compared into comparisons.csv.

    Args:
        results: result JSON files by name; the NLL of their windows lies beside each as parquet.
        summary_csv: a row a result, COLUMNS; experiments and datasets as they come, then dense, pruned, merged.
        comparisons_csv: within an experiment and dataset each pair of results: experiment, dataset, first, second
            (as variant.stage), and what `statistics.paired_difference` says of them.
        merges: for each experiment and merged part, its merge.json. A merged stage's row counts the adapter tensors
            that its parts' merges left out, since they are for layers that the part does not hold.

    Raises:
        DataError: a result or a merge's record cannot be read, a result contradicts its windows or is no number; or
            results of one experiment and dataset are of different token ids.
    """
    read: dict[str | Path, dict] = {}
    records = []
    for named in results:
        if named.path not in read:
            read[named.path] = _read(Path(named.path))
        record = dict(read[named.path])
        if record["stage"] != named.stage:
            raise DataError(f"is of stage {record['stage']}, not {named.stage}", where=named.path, mend=AGAIN)
        record |= {"experiment": named.experiment, "dataset": named.dataset, "variant": named.variant}
        if named.variant == "merged":
            record["adapter_tensors_out_of_scope"] = _out_of_scope(merges or {}, record)
        records.append(record)
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        groups.setdefault((record["experiment"], record["dataset"]), []).append(record)
    rows, comparisons = [], []
    for (experiment, dataset), members in groups.items():
        members.sort(key=lambda r: (VARIANTS.index(r["variant"]), STAGES.index(r["stage"])))
        check_same_ids({_name(r): r for r in members})
        rows += members
        pairs = compare_stages({_name(r): r["nll_per_token"] for r in members})
        pairs.insert(0, "experiment", experiment)
        pairs.insert(1, "dataset", dataset)
        comparisons.append(pairs)
    with atomic_file(summary_csv) as fresh:
        pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(fresh, index=False)
    with atomic_file(comparisons_csv) as fresh:
        pd.concat(comparisons).to_csv(fresh, index=False)


def _out_of_scope(merges: Mapping[tuple[str, str], str | Path], record: Mapping) -> int:
    """Adapter tensors that the merges of a stage's parts left out."""
    count = 0
    for part in PARTS_OF_STAGE[record["stage"]]:
        path = merges.get((record["experiment"], part))
        if path is not None:
            merge = read_json(path, DataError, mend="merge again")
            try:
                count += sum(len(adapter["out_of_scope"]) for adapter in merge["adapters"])
            except (KeyError, TypeError):
                raise DataError("is no record of a merge", where=path, mend="merge again") from None
    return count


def check_same_ids(results: Mapping[str, Mapping]) -> None:
    """Raise a DataError if results that are to be compared were measured on different token ids.

    Args:
        results: result records, by a name for each.
    """
    digests = {name: result["ids_sha256"] for name, result in results.items()}
    if len(set(digests.values())) > 1:
        listed = ", ".join(f"{name}: {digest[:12]}" for name, digest in digests.items())
        raise DataError(
            f"results on different token ids cannot be compared: {listed}",
            mend="evaluate them again with one tokenizer, seqlen and text",
        )


def _name(record: Mapping) -> str:
    return f"{record['variant']}.{record['stage']}"


def _read(path: Path) -> dict:
    """A result with its warnings as one text, and `nll_per_token`, the mean NLL of each of its windows."""
    record = read_json(path, DataError, mend=AGAIN)
    check_plain(path.with_suffix(".parquet"), DataError, mend=AGAIN)
    try:
        table = pd.read_parquet(path.with_suffix(".parquet"))
        fault = _fault(record, table)
        read = {
            **record,
            "warnings": "; ".join(record.get("warnings", [])),
            "nll_per_token": (table.nll / table.tokens).to_numpy(),
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise DataError(f"cannot be read as a result: {error}", where=path, mend=AGAIN) from None
    if fault:
        raise DataError(fault, where=path, mend=AGAIN)
    return read


def _fault(record: Mapping, table: pd.DataFrame) -> str | None:
    """What in a result's record is no number, or is not what its windows say; None if nothing."""
    if record["stage"] not in STAGES:
        return f"is of stage {record['stage']!r}"
    numbers = {name: value for name in COLUMNS if isinstance(value := record.get(name), (int, float))}
    wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
    if wrong or not np.isfinite(table.nll.to_numpy()).all():
        return f"{wrong[0] if wrong else 'the NLL of a window'} is NaN or infinity"
    if len(table) != record["windows"] or (table.tokens != record["seqlen"] - 1).any():
        return f"speaks of {record['windows']} windows of {record['seqlen']} tokens, and those beside it are others"
    # A sum of the same float64: anything more than its rounding is another number.
    mean = math.fsum(table.nll) / int(table.tokens.sum())
    if not math.isclose(record["mean_nll"], mean, rel_tol=1e-12):
        return f"has the mean NLL {record['mean_nll']}, and its windows have {mean}"
    if not math.isclose(record["ppl"], math.exp(mean), rel_tol=1e-12):
        return f"has the PPL {record['ppl']}, and its windows have {math.exp(mean)}"
    return None
