"""What the evaluation command prints and writes: boxes while it runs, a table and files at the end."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path

from mistral_prune_lora.errors import printable
from mistral_prune_lora.evaluation.result import StageResult
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.results.statistics import compare_stages
from mistral_prune_lora.storage.json_file import write_json
from mistral_prune_lora.storage.outputs import Output, read_record
from mistral_prune_lora.storage.transaction import atomic_file
from mistral_prune_lora.text.windows import WindowsIdentity

_WIDE, _NARROW, _BOX, _LABEL = "=" * 70, "─" * 60, 41, 41
_AUTHOR, _LONGEST_HEADER = "an evaluation", 10_000
_CSV_COLUMNS = (
    "label", "stage", "active_layers", "parameters", "ppl", "ppl_se", "mean_nll", "mean_nll_se", "bits_per_byte",
    "tokens", "windows", "seqlen", "dtype", "device", "batch_size", "top1_accuracy", "kl_dense", "kl_dense_se",
    "top1_agreement", "ids_sha256", "weights_sha256", "warnings",
)  # fmt: skip


def opening(lines: Mapping[str, object]) -> str:
    """The head of the output: what is evaluated, on what, how."""
    told = "\n".join(f"{name + ':':<12} {printable(str(value))}" for name, value in lines.items())
    return f"{_WIDE}\nMerged Model PPL Evaluation\n{_WIDE}\n{told}\n{_WIDE}"


def model_heading(number: int, count: int, name: str) -> str:
    """The line that a model's results stand under."""
    return f"\n{_NARROW}\n[{number}/{count}] {printable(name)}\n{_NARROW}\n"


def model_lines(model_type: str, layout: Layout, active: int, parameters: int, device: object) -> str:
    """What was loaded: PassLayers, layers, parameters."""
    passed = layout.num_layers - active
    lines = []
    if layout.dropped:
        lines.append(f"  ✓ PassLayer installed: {list(layout.dropped)} ({len(layout.dropped)} layers)")
    lines.append(
        f"  ✓ {model_type} | {layout.num_layers} layers ({active} active + {passed} PassLayer)"
        f" | {parameters / 1e6:.1f}M params | {device}"
    )
    return "\n".join(lines)


def windows_line(identity: WindowsIdentity, limits: Sequence[tuple[int, str]], seed: int) -> str:
    """How many of the text's windows are measured, and what keeps the others out.

    Args:
        identity: of the windows.
        limits: what the number was limited to and by what, in words; of several that cut as deep, the first is told.
        seed: as for `make_windows`.
    """
    line = f"  ✓ {identity.windows} of {identity.text_windows} windows"
    if identity.windows == identity.text_windows:
        return line
    drawn = f", drawn with --seed {seed}" if seed else ""
    return f"{line} ({min(limits, key=itemgetter(0))[1]}{drawn})"


def box(result: Mapping) -> str:
    """One stage's numbers in a frame."""
    label = printable(result["label"])
    width = max(_BOX, len(label) + 2)
    lines = [
        f"PPL      = {result['ppl']:.4f}",
        f"Mean NLL = {result['mean_nll']:.6f}",
        f"Tokens   = {result['tokens']}",
    ]
    rows = "\n".join(f"  │ {line:<{width - 1}}│" for line in lines)
    title = f"  │ {label:<{width - 1}}│"
    return f"  ┌{'─' * width}┐\n{title}\n  ├{'─' * width}┤\n{rows}\n  └{'─' * width}┘\n"


def summary(results: Sequence[Mapping]) -> str:
    """All results in one table, and what is doubtful in them: warnings, different token ids."""
    labels = [printable(r["label"]) for r in results]
    width = max([_LABEL, *map(len, labels)])
    rows = [f"{'Label':<{width}} {'PPL':>12} {'Mean NLL':>12} {'Tokens':>10}"]
    rows.append(f"{'─' * width} {'─' * 12} {'─' * 12} {'─' * 10}")
    rows += [
        f"{label:<{width}} {r['ppl']:>12.4f} {r['mean_nll']:>12.6f} {r['tokens']:>10}"
        for label, r in zip(labels, results, strict=True)
    ]
    table = "\n".join(rows)
    doubts: dict[str, list[str]] = {}
    for label, result in zip(labels, results, strict=True):
        for doubt in result["warnings"]:
            doubts.setdefault(printable(doubt), []).append(label)
    said = "".join(f"\nWarning: {doubt}: {', '.join(of)}" for doubt, of in doubts.items())
    if len({r["ids_sha256"] for r in results}) > 1:
        bits = ", ".join(f"{label} {_bits(r)}" for label, r in zip(labels, results, strict=True))
        said += f"\nDifferent token ids: these PPL do not compare. Bits per byte do: {bits}"
    return f"{_WIDE}\nSummary\n{_WIDE}\n{table}\n{_WIDE}{said}"


def details(results: Sequence[Mapping]) -> str:
    """What else was measured: standard error, bits per byte, top-1 accuracy, and how far the dense model is."""
    width = max([_LABEL, *(len(printable(r["label"])) for r in results)])
    compared = any("kl_dense" in r for r in results)
    head = f"{'':<{width}} {'PPL ± SE':>12} {'bits/byte':>12} {'top-1':>10}"
    lines = [head + (f" {'KL(dense||.)':>14} {'agreement':>10}" if compared else "")]
    for r in results:
        error = "" if r["ppl_se"] is None else f"± {r['ppl_se']:.4f}"
        line = f"{printable(r['label']):<{width}} {error:>12} {_bits(r):>12} {r['top1_accuracy']:>10.2%}"
        lines.append(line + (f" {r['kl_dense']:>14.6f} {r['top1_agreement']:>10.2%}" if "kl_dense" in r else ""))
    return "\n".join(lines)


def _bits(result: Mapping) -> str:
    """Bits per byte, where the windows cover text."""
    return "" if result["bits_per_byte"] is None else f"{result['bits_per_byte']:.4f}"


def differences(results: Sequence[StageResult]) -> list[dict]:
    """Every pair of results on the same token ids, compared window by window; see `statistics.paired_difference`."""
    groups: dict[str, dict] = {}
    for result in results:
        per_token = result.scores.nll / (result.record["seqlen"] - 1)
        groups.setdefault(result.record["ids_sha256"], {})[result.record["label"]] = per_token
    return [row for group in groups.values() for row in compare_stages(group).to_dict("records")]


def differences_table(rows: Sequence[Mapping]) -> str:
    """The pairs as text: difference of mean NLL with its 95 % interval."""
    width = max(len(_pair(row)) for row in rows)
    lines = ["Paired differences of mean NLL over the same windows (95 % interval)"]
    for row in rows:
        interval = "" if row["low"] is None else f"  [{row['low']:+.6f}, {row['high']:+.6f}]"
        pair = _pair(row)
        lines.append(f"{pair:<{width}} {row['difference']:+.6f}{interval}  PPL x {row['ppl_ratio']:.4f}")
    return "\n".join(lines)


def _pair(row: Mapping) -> str:
    return printable(f"{row['second']} - {row['first']}")


def json_output(path: str | Path) -> Output:
    """The file of all results as an output of a command."""
    return Output.file(path, "--json", _is_results, _AUTHOR)


def csv_output(path: str | Path) -> Output:
    """The table of all results as an output of a command."""
    return Output.file(path, "--csv", _is_table, _AUTHOR)


def _is_results(path: Path) -> bool:
    content = read_record(path)
    results = content.get("results")
    if content.keys() != {"results", "differences"} or not isinstance(results, list) or not results:
        return False
    return all(isinstance(r, dict) and {"label", "ppl", "ids_sha256"} <= r.keys() for r in results)


def _is_table(path: Path) -> bool:
    """Whether a table has this command's columns, and none that somebody has added."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header = next(csv.reader([file.readline(_LONGEST_HEADER)]), [])
    except (OSError, ValueError, csv.Error):
        return False
    return {"label", "stage", "ppl", "ids_sha256"} <= set(header) <= set(_CSV_COLUMNS)


def write_results(path: str | Path, results: Sequence[StageResult], check: Callable[[], None]) -> None:
    """All results with what identifies them, and their paired differences, as one JSON object.

    Args:
        path, check: as for `transaction.atomic_file`.
        results: in the order printed.
    """
    content = {"results": [result.record for result in results], "differences": differences(results)}
    with atomic_file(path, check=check) as fresh:
        write_json(fresh, content)


def write_table(path: str | Path, results: Sequence[StageResult], check: Callable[[], None]) -> None:
    """A row a result; arguments as for `write_results`."""
    with atomic_file(path, check=check) as fresh, open(fresh, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _CSV_COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows({**r.record, "warnings": "; ".join(r.record["warnings"])} for r in results)
