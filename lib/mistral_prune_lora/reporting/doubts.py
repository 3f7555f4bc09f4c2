"""What a reader must know before believing the numbers: every doubt that the results themselves carry or show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from mistral_prune_lora.reporting.gathered import Gathered

FEW = 30  # windows below which an interval hangs much on which windows they are


def doubts_of(gathered: Gathered) -> list[str]:
    """Sentences, the gravest first.

    Whether restored FULL is the dense model, tensors that were left out of a merge, what results say of their windows
    (ids of another tokenizer, windows beyond the positions), few windows, datasets of one name that are of other ids in
    other experiments, and whether healed FULL is the dense model.
    """
    table = gathered.summary
    return [
        *_not_dense(table),
        *_left_out(table),
        *_own(gathered.results),
        *_few(table),
        *_other_ids(table),
        *_healed(table),
    ]


def _not_dense(table: pd.DataFrame) -> Iterator[str]:
    for (experiment, dataset), rows in table.groupby(["experiment", "dataset"], sort=False):
        digests = {
            v: set(rows[(rows.variant == v) & (rows.stage == "FULL")].weights_sha256) for v in ("dense", "pruned")
        }
        if all(digests.values()) and digests["dense"] != digests["pruned"]:
            yield (
                f"{experiment} on {dataset}: FULL without adapters is not the dense model, its weights are others. The"
                " parts are of another model than the one that they are compared with."
            )


def _left_out(table: pd.DataFrame) -> Iterator[str]:
    for experiment, rows in table[table.adapter_tensors_out_of_scope > 0].groupby("experiment", sort=False):
        most = max(rows.adapter_tensors_out_of_scope)
        yield (
            f"{experiment}: {most:.0f} tensors of its adapters are for layers that their parts do not hold, and were"
            " left out of the merge; merge.json names them."
        )


def _own(results: Mapping[tuple[str, str, str, str], Mapping]) -> Iterator[str]:
    said: dict[str, list[str]] = {}
    for (experiment, dataset, _, _), record in results.items():
        for warning in record.get("warnings", []):
            said.setdefault(warning, []).append(f"{experiment} on {dataset}")
    for warning, places in said.items():
        yield f"{_listed(places)}: {warning}."


def _few(table: pd.DataFrame) -> Iterator[str]:
    for count in sorted(set(table.windows[table.windows < FEW])):
        rows = table[table.windows == count]
        places = _listed(f"{row.experiment} on {row.dataset}" for row in rows.itertuples())
        if count == 1:
            yield f"{places}: a single window, so that nothing is known of the error."
        else:
            yield f"{places}: only {count:.0f} windows. The intervals are rough, and of those windows' text alone."


def _other_ids(table: pd.DataFrame) -> Iterator[str]:
    for dataset, rows in table.groupby("dataset", sort=False):
        if rows.ids_sha256.nunique() > 1:
            yield (
                f"{dataset} is of other token ids in some experiments than in others (tokenizer, seqlen or windows"
                " differ). Perplexities of different ids are not to be compared."
            )


def _healed(table: pd.DataFrame) -> Iterator[str]:
    full = table[table.stage == "FULL"]
    places, told, asked = [], 0, 0
    for (experiment, dataset), rows in full.groupby(["experiment", "dataset"], sort=False):
        healed = rows[~rows.variant.isin(["dense", "pruned"])]
        different = [str(row.variant) for row in healed.itertuples() if _is_another(row, rows)]
        if different:
            some = f" ({', '.join(different)})" if len(different) < len(healed) else ""
            places.append(f"{experiment} on {dataset}{some}")
        told, asked = told + len(different), asked + len(healed)
    if places:
        where = f"{_listed(places)}: " if told < asked else ""  # of all, names would say nothing
        yield (
            f"{where}FULL after healing is not the dense model, since adapters stay merged into its parts, though no"
            " layer is missing any more."
        )


def _is_another(healed: Any, rows: pd.DataFrame) -> bool:
    """Whether a healed FULL has other weights than the dense one, or than pruned FULL where that was not measured.

    Where neither was, its predictions tell; without those either, there is nothing that it could be taken for.
    """
    for variant in ("dense", "pruned"):
        if len(reference := rows[rows.variant == variant]):
            return bool(healed.weights_sha256 not in set(reference.weights_sha256))
    return bool(healed.kl_dense > 0)


def _listed(names: Iterable[str], most: int = 4) -> str:
    different = list(dict.fromkeys(names))
    rest = f" and {len(different) - most} more" if len(different) > most else ""
    return ", ".join(different[:most]) + rest
