"""Run a Python script as if nothing else were installed than some packages and what they require.

`python only_packages.py NAME,NAME SCRIPT [ARGUMENT ...]`, or `-m MODULE` for SCRIPT. Sockets cannot be connected.
"""

from __future__ import annotations

import importlib.metadata as metadata
import runpy
import socket
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(names: list[str]) -> set[str]:
    """The distributions and all that they require here, without extras."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or []:
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(wanted.name))
    return found


def hide_all_but(names: list[str]) -> None:
    """Let modules of other distributions be not found, but for those that lie in the tree that is tested."""
    there = closure(names)
    owners = metadata.packages_distributions()
    hidden = {top for top, dists in owners.items() if not there & {canonicalize_name(dist) for dist in dists}}

    class Finder(PathFinder):
        """The usual one, but for those."""

        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            found = PathFinder.find_spec(fullname, path, target)
            places = [found.origin or "", *(found.submodule_search_locations or ())] if found else []
            installed = any("site-packages" in Path(place).parts for place in places)
            return None if installed and fullname.partition(".")[0] in hidden else found

        @classmethod
        def find_distributions(cls, *context, **named):
            return (each for each in find_distributions(*context, **named) if canonicalize_name(each.name) in there)

    find_distributions = PathFinder.find_distributions
    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
    for name in [name for name in sys.modules if name.partition(".")[0] in hidden]:
        del sys.modules[name]


def refuse(*_) -> None:
    """In place of a connection."""
    raise OSError("there is no network")


if __name__ == "__main__":
    hide_all_but(sys.argv[1].split(","))
    socket.socket.connect = refuse  # type: ignore[method-assign]
    sys.argv = sys.argv[2:]
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = sys.argv[0].rpartition("/")[0]
        runpy.run_path(sys.argv[0], run_name="__main__")
