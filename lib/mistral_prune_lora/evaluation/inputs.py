"""Sorting what a user names on the command line: models, bundles and which part each bundle is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_prune_lora.checkpoints.directories import bundle_layers, is_bundle_dir
from mistral_prune_lora.checkpoints.manifest import read_layout
from mistral_prune_lora.checkpoints.model_place import model_directory
from mistral_prune_lora.errors import CheckpointError, LayoutError
from mistral_prune_lora.layout.partition import Layout


@dataclass(frozen=True)
class Inputs:
    """Models to evaluate, and the bundles to restore into them.

    Attributes:
        models: (as the user wrote it, local directory), in the order given.
        bundles: directories by part, "B" and "C".
    """

    models: list[tuple[str, Path]]
    bundles: dict[str, Path]


def sort_inputs(
    paths: Sequence[str],
    *,
    b_bundle: str | None = None,
    c_bundle: str | None = None,
    bundles_dir: str | None = None,
) -> Inputs:
    """Tell models from bundles, and B from C.

    A directory with a config.json is a model; one with layer files or a bundle_meta.json only is a bundle; anything
    that is no local path is a Hub id. A bundle is B if it holds exactly the layers that the first pruned model's
    manifest gives to B, C likewise; else its path decides: one that contains b_merged is B, c_merged is C.

    Args:
        paths: of models and bundles, in any order.
        b_bundle, c_bundle: bundles named outright.
        bundles_dir: a directory with subdirectories B and C.

    Raises:
        CheckpointError: a path that is neither; no model at all.
        LayoutError: a bundle that could be either, or two for one part.
        SourceError: a Hub id that cannot be fetched.
    """
    models = [(path, model_directory(path)) for path in paths if not is_bundle_dir(path)]
    if not models:
        raise CheckpointError("there are only bundles", where="--model_path", mend="Name the A model as well")
    layouts = [read_layout(folder) for _, folder in models]
    layout = next((layout for layout in layouts if layout), None)
    named: dict[str, list[Path]] = {"B": [], "C": []}
    for path in paths:
        if is_bundle_dir(path):
            named[bundle_part(path, layout)].append(Path(path))
    for part, bundle in (("B", b_bundle), ("C", c_bundle)):
        if bundle is not None:
            named[part].append(_bundle(Path(bundle), f"--{part.lower()}_bundle"))
    if bundles_dir is not None:
        there = [part for part in "BC" if (Path(bundles_dir) / part).is_dir()]
        if not there:
            raise CheckpointError("holds neither B nor C", where=bundles_dir, mend="Give the directory that holds both")
        for part in there:
            named[part].append(_bundle(Path(bundles_dir) / part, "--bundles_dir"))
    for part, found in named.items():
        if len(found) > 1:
            raise LayoutError(
                f"there are {len(found)} bundles for {part}: {', '.join(map(str, found))}",
                mend="Name one for each part",
            )
    return Inputs(models, {part: found[0] for part, found in named.items() if found})


def bundle_part(path: str | Path, layout: Layout | None) -> str:
    """Whether a bundle directory is "B" or "C": by the layers it holds, else by its name.

    Args:
        path: the bundle.
        layout: the parts of the model that it is for; None where no manifest says.

    Raises:
        LayoutError: neither tells.
    """
    held = bundle_layers(path)
    known = layout if layout and not layout.unassigned else None
    fitting = [part for part in "BC" if known and held == known.layers_of(part)]
    if len(fitting) == 1:
        return fitting[0]
    name = os.path.basename(os.path.abspath(path)).lower()
    fitting = [part for part in "BC" if f"{part.lower()}_merged" in name]
    if len(fitting) == 1:
        return fitting[0]
    expected = f"; the manifest gives {list(known.b)} to B and {list(known.c)} to C" if known else ""
    raise LayoutError(
        f"it is not clear whether this bundle of layers {list(held)} is B or C{expected}",
        where=path,
        mend="Name it with --b_bundle or --c_bundle",
    )


def _bundle(path: Path, flag: str) -> Path:
    if not is_bundle_dir(path):
        raise CheckpointError(
            "is not a bundle: it has neither layer_XXX.safetensors nor bundle_meta.json, or it has a config.json",
            where=f"{flag} {path}",
        )
    return path
