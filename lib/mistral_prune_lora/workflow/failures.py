"""What a failed run ends with: for each job that failed for good, the path of its log and the last lines of that."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from mistral_prune_lora.errors import printable

_LINES = 15
_ERROR = re.compile(r"^Error in (?:rule|group) (\S+?):$")
_JOB = re.compile(r"^\s+jobid: (\d+)$")
_LOGS = re.compile(r"^\s+log: (.*?)(?: \(check log file\(s\) for error details\))?$")
_FINISHED = re.compile(r"^Finished jobid: (\d+) ")


def failed_logs(snakemake_logs: Iterable[str | Path]) -> dict[str, tuple[str, list[str]]]:
    """The jobs that failed and were not finished by a later attempt: rule and logs of the last attempt, by job.

    Args:
        snakemake_logs: the logs of the run, in Snakemake's own words.
    """
    failed: dict[str, tuple[str, list[str]]] = {}
    rule = job = ""
    for log in snakemake_logs:
        for line in Path(log).read_text(encoding="utf-8", errors="replace").splitlines():
            if found := _ERROR.match(line):
                rule, job = found[1], ""
            elif rule and (found := _JOB.match(line)):
                job = found[1]
            elif rule and job and (found := _LOGS.match(line)):
                failed[job] = (rule, found[1].split(", "))
                rule = ""
            elif found := _FINISHED.match(line):
                failed.pop(found[1], None)
    return failed


def failures(snakemake_logs: Iterable[str | Path], lines: int = _LINES) -> Iterator[str]:
    """What is said of each failed job: its rule, and of the first of its logs that holds anything the last lines."""
    for rule, logs in failed_logs(snakemake_logs).values():
        written = next((log for log in logs if _last_lines(log, 1)), None)
        if written is None:
            yield f"{rule} failed and wrote nothing to {' or '.join(logs)}"
            continue
        yield f"{rule} failed; its log {written} ends with:"
        yield from (f"    {printable(line)}" for line in _last_lines(written, lines))


def _last_lines(log: str, count: int) -> list[str]:
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            return list(deque((text for line in file if (text := line.rstrip())), count))
    except OSError:
        return []
