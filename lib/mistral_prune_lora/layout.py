"""Which layer belongs to A, B or C; which layers a stage runs; the files that say so.

Imports neither torch nor Snakemake, so the Snakefile can ask it for every target while the DAG is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_prune_lora.errors import LayoutError

STAGES = ("A", "AB", "FULL")
PARTS_OF_STAGE = {"A": ("A",), "AB": ("A", "B"), "FULL": ("A", "B", "C")}
MANIFEST_VERSION = "1.0"
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
LAYER_FILE = re.compile(r"layer_(\d+)\.safetensors")


@dataclass(frozen=True)
class Layout:
    """The partition of a dense model's layers into kept layers (A) and the bundles B and C.

    Attributes:
        num_layers: layers of the dense model.
        b, c: the original indices in each bundle, ascending. Everything else is kept by A.

    Raises:
        LayoutError: an index out of range, twice, or in both bundles; nothing kept.
    """

    num_layers: int
    b: tuple[int, ...] = ()
    c: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "b", tuple(sorted(self.b)))
        object.__setattr__(self, "c", tuple(sorted(self.c)))
        dropped = self.b + self.c
        outside = [i for i in dropped if not 0 <= i < self.num_layers]
        if outside:
            raise LayoutError(
                f"layers {outside} do not exist in a model of {self.num_layers} layers",
                mend=f"choose indices from 0 to {self.num_layers - 1}",
            )
        twice = sorted({i for i in dropped if dropped.count(i) > 1})
        if twice:
            raise LayoutError(f"layers {twice} stand more than once in B and C", mend="name each dropped layer once")
        if not self.kept:
            raise LayoutError("every layer is dropped", mend="keep at least one layer in A")

    @property
    def dropped(self) -> tuple[int, ...]:
        """The layers A runs without: B's and C's."""
        return tuple(sorted(self.b + self.c))

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers whose weights A holds."""
        gone = set(self.b) | set(self.c)
        return tuple(i for i in range(self.num_layers) if i not in gone)

    def layers_of(self, part: str) -> tuple[int, ...]:
        """The layers that part "A", "B" or "C" holds the weights of."""
        return {"A": self.kept, "B": self.b, "C": self.c}[part]

    def part_of(self, layer: int) -> str:
        """The part ("A", "B" or "C") that holds a layer's weights."""
        return "B" if layer in self.b else "C" if layer in self.c else "A"

    def active(self, stage: str) -> tuple[int, ...]:
        """The layers that stage "A", "AB" or "FULL" goes through, ascending."""
        return tuple(sorted(i for part in PARTS_OF_STAGE[stage] for i in self.layers_of(part)))


@dataclass(frozen=True)
class Segment:
    """A run of layers that the same stages go through and that lies in one part.

    The last condition is what makes a segment a unit of work: a new C adapter touches C's segments and what hangs on
    them, and no other.

    Attributes:
        name: unique within one tree, the same whichever stages are asked for: "A000-020_A", "A029-031_FULL".
        part: "A", "B" or "C", whose weights it needs.
        layers: original indices, ascending.
        parent: name of the segment whose boundary activations it starts from; None starts from the embedding.
        through: the stages that pass it.
        ends: the stages whose last layer it holds.
    """

    name: str
    part: str
    layers: tuple[int, ...]
    parent: str | None
    through: tuple[str, ...]
    ends: tuple[str, ...]


def segment_tree(layout: Layout, stages: Sequence[str] = STAGES) -> list[Segment]:
    """The tree of segments that serves `stages` with every shared run of layers computed once; parents come first.

    The stages' layer sequences are put into a prefix tree, whose unbranched runs within one part are the segments.
    For Mistral-7B with B 21-24 and C 25-28: 21 + 3, 4 + 3 and 4 + 3 layers, 38 in all, where 84 run one by one.
    """
    paths = {stage: layout.active(stage) for stage in stages}
    segments: list[Segment] = []

    def grow(start: int, through: tuple[str, ...], parent: str | None) -> None:
        """Add the segments of the stages `through`, which agree on their first `start` layers."""
        path, end = paths[through[0]], start
        while _goes_on(layout, [paths[s] for s in through], start, end):
            end += 1
        node = parent
        if end > start:
            node = _segment_name(layout, path[:end], start)
            ends = tuple(s for s in through if len(paths[s]) == end)
            segments.append(Segment(node, layout.part_of(path[start]), path[start:end], parent, through, ends))
        for layer in sorted({paths[s][end] for s in through if len(paths[s]) > end}):
            grow(end, tuple(s for s in through if len(paths[s]) > end and paths[s][end] == layer), node)

    grow(0, tuple(stages), None)
    return segments


def stage_run(tree: Sequence[Segment], stage: str) -> tuple[str | None, Segment | None]:
    """What is left to run for one stage once every segment that others build on has been run.

    Returns:
        The segment whose boundary activations the stage starts from (None: from the embedding), and the tail that it
        runs by itself (None: the stage ends where that segment ends).
    """
    end = next(s for s in tree if stage in s.ends)
    return (end.name, None) if end in shared_segments(tree) else (end.parent, end)


def shared_segments(tree: Sequence[Segment]) -> list[Segment]:
    """The segments that others start from, whose boundary activations are worth keeping; parents come first."""
    parents = {s.parent for s in tree}
    return [s for s in tree if s.name in parents]


def _goes_on(layout: Layout, paths: list[tuple[int, ...]], start: int, end: int) -> bool:
    """Whether a segment from position `start` can take in position `end`: no path ends, forks or changes part."""
    if any(len(path) == end for path in paths) or len({path[end] for path in paths}) != 1:
        return False
    return end == start or layout.part_of(paths[0][end]) == layout.part_of(paths[0][start])


def _segment_name(layout: Layout, prefix: tuple[int, ...], start: int) -> str:
    """The segment's own layers and the smallest of all stages that reaches it by the same way, asked for or not."""
    stage = next(s for s in STAGES if layout.active(s)[: len(prefix)] == prefix)
    return f"{layout.part_of(prefix[start])}{prefix[start]:03d}-{prefix[-1]:03d}_{stage}"


def is_model_dir(path: str | Path) -> bool:
    """Whether a directory holds a full model: it has a config.json."""
    return (Path(path) / "config.json").is_file()


def is_bundle_dir(path: str | Path) -> bool:
    """Whether a directory holds a bundle: layer files and no config.json."""
    return not is_model_dir(path) and bool(layer_files(path))


def layer_files(path: str | Path) -> dict[int, Path]:
    """The files layer_XXX.safetensors that lie in a bundle directory, by layer index, ascending."""
    found = ((LAYER_FILE.fullmatch(p.name), p) for p in Path(path).glob("layer_*.safetensors"))
    return dict(sorted((int(match[1]), file) for match, file in found if match))


def layer_file_name(layer: int) -> str:
    """The name of a layer's file in a bundle directory: layer_021.safetensors."""
    return f"layer_{layer:03d}.safetensors"


def bundle_layers(path: str | Path) -> tuple[int, ...]:
    """The layers that a bundle directory is meant to hold: its bundle_meta.json's word, or else its files'.

    Raises:
        LayoutError: bundle_meta.json cannot be read, or a file that it names is missing.
    """
    folder, files = Path(path), layer_files(path)
    meta_path = folder / "bundle_meta.json"
    if not meta_path.is_file():
        return tuple(files)
    meta = _read_json(meta_path)
    named = meta.get("layer_indices", meta.get("indices"))
    if not isinstance(named, list) or not all(isinstance(i, int) for i in named):
        raise LayoutError("neither layer_indices nor indices is a list of layer numbers", where=meta_path)
    missing = [layer_file_name(i) for i in named if i not in files]
    if missing:
        raise LayoutError(
            f"{', '.join(missing)} missing from the bundle", where=folder, mend="prune or merge this bundle again"
        )
    return tuple(sorted(named))


def weight_files(path: str | Path) -> tuple[str, ...]:
    """The names of the files that hold a model directory's weights: the single file, or what the index names.

    Never a glob: Mistral's repositories carry a second copy of all weights as consolidated.safetensors.

    Raises:
        LayoutError: there is neither, or the index is malformed or names something that is not a file beside it.
    """
    folder = Path(path)
    if (folder / SINGLE_FILE).is_file():
        return (SINGLE_FILE,)
    index = folder / INDEX_FILE
    if not index.is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        raise LayoutError(
            f"there is no {SINGLE_FILE} and no {INDEX_FILE}"
            + (f", only pickled weights ({pickled[0]})" if pickled else ""),
            where=folder,
            mend="convert the model with save_pretrained of a current transformers, which writes safetensors",
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LayoutError("there is no weight_map", where=index, mend="fetch the model again")
    shards = tuple(dict.fromkeys(weight_map.values()))
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise LayoutError(f"the index names {shard!r}, which is not a file beside it", where=index)
    return tuple(sorted(shards))


def read_manifest(path: str | Path) -> dict | None:
    """The manifest.json of a model directory as a dict, or None if it has none.

    Raises:
        LayoutError: the file is not JSON, or has no stages.A.dropped_layers.
    """
    manifest_path = Path(path) / "manifest.json"
    if not manifest_path.is_file():
        return None
    manifest = _read_json(manifest_path)
    try:
        _ints(manifest["stages"]["A"]["dropped_layers"])
    except (KeyError, TypeError, ValueError):
        raise LayoutError(
            "stages.A.dropped_layers is not a list of layer numbers",
            where=manifest_path,
            mend="prune the model again, or copy the manifest.json that pruning wrote",
        ) from None
    return manifest


def layout_from_manifest(manifest: Mapping, num_layers: int | None = None) -> Layout:
    """The layout that a manifest describes.

    Args:
        manifest: a parsed manifest.json.
        num_layers: the dense model's layer count, where the manifest's counts.L_full is missing.

    Raises:
        LayoutError: no layer count; B and C together are not the layers that A dropped.
    """
    stages = manifest["stages"]
    total = manifest.get("counts", {}).get("L_full", num_layers)
    if total is None:
        kept, gone = stages["A"].get("kept_layers", []), stages["A"]["dropped_layers"]
        total = len(kept) + len(gone)
    layout = Layout(total, *(_ints(stages.get(p, {}).get("removed_layers", [])) for p in "BC"))
    dropped = _ints(stages["A"]["dropped_layers"])
    if tuple(sorted(dropped)) != layout.dropped:
        raise LayoutError(
            f"A drops layers {sorted(dropped)}, but B and C together hold {list(layout.dropped)}",
            where="manifest.json",
            mend="prune again, so that every dropped layer is in exactly one bundle",
        )
    return layout


def make_manifest(layout: Layout, *, base_model: str, model_type: str, selection: Mapping, artifacts: Mapping) -> dict:
    """The manifest.json (version 1.0) of a pruned model.

    Args:
        layout: the layers of each part.
        base_model: path or repository id of the dense model.
        model_type: its config's model_type.
        selection: how the block was chosen: method, block {start, n}, angular_distance, keep_last_layer.
        artifacts: where A, B, C and original_config lie: {"A": {"dir": ...}, ...}.
    """
    return {
        "version": MANIFEST_VERSION,
        "base_model": base_model,
        "model_type": model_type,
        "counts": {
            "L_full": layout.num_layers,
            "A_kept": len(layout.kept),
            "removed_total": len(layout.dropped),
            "B": len(layout.b),
            "C": len(layout.c),
        },
        "selection": dict(selection),
        "stages": {
            "A": {"kept_layers": list(layout.kept), "dropped_layers": list(layout.dropped)},
            "B": {"removed_layers": list(layout.b)},
            "C": {"removed_layers": list(layout.c)},
        },
        "artifacts": dict(artifacts),
    }


def _ints(values: Iterable) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in numbers):
        raise ValueError("not layer numbers")
    return numbers


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LayoutError(f"cannot be read as JSON: {error}", where=path) from None
    if not isinstance(content, dict):
        raise LayoutError("is not a JSON object", where=path)
    return content
