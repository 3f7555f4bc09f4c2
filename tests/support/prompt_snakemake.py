"""Snakemake, of which Slurm's executor looks once a second at its jobs: `python prompt_snakemake.py ARGUMENTS`.

By itself it waits 10 s longer after every look that found nothing ended, whatever its settings say, so that each job of
a few seconds would take that much more.
"""

from __future__ import annotations

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

if __name__ == "__main__":
    RemoteExecutor.next_seconds_between_status_checks = property(lambda executor: 1, lambda executor, seconds: None)
    main()
