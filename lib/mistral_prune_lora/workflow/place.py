r"""What was made once, in the folder of each experiment that it belongs to: as symbolic links.

  python -m mistral_prune_lora.workflow.place --made results/shared/ppl/A-0123456789ab.json \
    --at results/smollm2/ppl/pydoc/merged.A.json

Relative ones, so that `results` can be moved as a whole; who takes an experiment's folder elsewhere has links followed
(`cp -rL`, `rsync -L`, `tar -h`). Never hard links: Snakemake gives each output of a job a new time, which would be that
of the job's input too, and input that is newer than output is an error to it. What is linked to is one file: to change
a weight in place would change it for all; replace the file instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mistral_prune_lora.errors import PipelineError, reports_errors
from mistral_prune_lora.storage.json_file import read_json_if_there, write_json

NOTE = "made_from.json"


def place(source: Path, target: Path) -> None:
    """Let a directory or file hold what another one holds.

    Files that were placed in a directory before and have no counterpart any more go; others that lie there stay.

    Args:
        source: what was made.
        target: where it is to be found; a directory gets NOTE, which names the source and what was placed.

    Raises:
        OSError: a file cannot be linked.
    """
    if source.is_file():
        _link(source, target)
        return
    fresh = sorted(_inside(source))
    note = target / NOTE
    for name in set(_placed(note)) - set(fresh):
        with suppress(FileNotFoundError):
            (target / name).unlink()
    for name in fresh:
        _link(source / name, target / name)
    write_json(note, {"made": os.fspath(source), "files": fresh})


def _inside(folder: Path) -> Iterator[str]:
    """The files below a folder, by their path in it."""
    return (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _placed(note: Path) -> list[str]:
    """What was placed before; nothing if no note tells. A name that leads out of the directory is none of ours."""
    content: dict = {}
    with suppress(PipelineError):
        content = read_json_if_there(note) or {}
    names = content.get("files")
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return [name for name in listed if not os.path.isabs(name) and ".." not in Path(name).parts]


def _link(source: Path, target: Path) -> None:
    """Let a name lead to a file; whatever had it before is replaced in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.placing")
    beside.unlink(missing_ok=True)
    beside.symlink_to(os.path.relpath(source, target.parent))
    beside.replace(target)


@reports_errors
def main(argv: list[str] | None = None) -> None:
    """Run the command; see --help."""
    p = argparse.ArgumentParser(
        prog="python -m mistral_prune_lora.workflow.place", description="Link what was made into a folder."
    )
    told = "a file, or all files of a directory, which is then linked with everything in it"
    p.add_argument("--made", nargs="+", required=True, metavar="FILE", help=f"what was made: {told}")
    p.add_argument("--at", nargs="+", required=True, metavar="FILE", help="the same under the names that it gets")
    given = p.parse_args(argv)
    source, target = (Path(os.path.commonpath(files)) for files in (given.made, given.at))
    try:
        place(source, target)
    except OSError as error:
        raise PipelineError(
            f"cannot be linked to {target}: {error.strerror}",
            where=source,
            mend="free the place, and run again",
        ) from None


if __name__ == "__main__":
    sys.exit(main())
