"""Which files make up a model or a bundle directory, and which layer layer_021.safetensors is. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mistral_prune_lora.errors import LayoutError
from mistral_prune_lora.layout.partition import MOST_LAYERS
from mistral_prune_lora.storage.json_file import read_json, read_json_if_there
from mistral_prune_lora.storage.plain_file import lies_there

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
BUNDLE_META, LAYERS_MAP = "bundle_meta.json", "layers_map.json"
_LAYER_FILE = re.compile(r"layer_(\d+)\.safetensors")


def is_model_dir(path: str | Path) -> bool:
    """Whether a directory holds a full model: it has a config.json."""
    return lies_there(Path(path) / "config.json")


def is_bundle_dir(path: str | Path) -> bool:
    """Whether a directory holds a bundle: layer files or a bundle_meta.json, and no config.json.

    A bundle that was given no layers has the bundle_meta.json alone.
    """
    folder = Path(path)
    return not is_model_dir(folder) and (lies_there(folder / BUNDLE_META) or any(_numbered(folder)))


def layer_files(path: str | Path) -> dict[int, Path]:
    """The layer files that lie in a bundle directory, by layer index, ascending.

    The index may be padded with zeros or not: layer_021.safetensors and layer_21.safetensors are both layer 21's.

    Raises:
        LayoutError: two files of one layer.
    """
    files: dict[int, Path] = {}
    for index, file in sorted(_numbered(Path(path))):
        if index in files:
            raise LayoutError(
                f"{files[index].name} and {file.name} are both layer {index}'s",
                where=path,
                mend="keep the one that belongs to this bundle",
            )
        files[index] = file
    return files


def _numbered(folder: Path) -> Iterable[tuple[int, Path]]:
    return ((int(match[1]), p) for p in folder.glob("layer_*.safetensors") if (match := _LAYER_FILE.fullmatch(p.name)))


def layer_file_name(layer: int) -> str:
    """The name that a layer's file is given in a bundle directory: layer_021.safetensors."""
    return f"layer_{layer:03d}.safetensors"


def bundle_layers(path: str | Path) -> tuple[int, ...]:
    """The layers of a bundle directory: what its bundle_meta.json says and what lies there, which must agree.

    `indices` and `layer_indices` are two names of one list; a directory without bundle_meta.json is told by its files.

    Raises:
        LayoutError: bundle_meta.json cannot be read or contradicts itself or the files.
    """
    folder, files = Path(path), layer_files(path)
    meta_path = folder / BUNDLE_META
    meta = read_json_if_there(meta_path, LayoutError)
    if meta is None:
        return tuple(files)
    told = {key: meta[key] for key in ("indices", "layer_indices") if key in meta}
    if not told or not all(map(is_layer_list, told.values())):
        raise LayoutError("neither layer_indices nor indices is a list of layer numbers, each once", where=meta_path)
    lists = {key: tuple(sorted(layers)) for key, layers in told.items()}
    named = next(iter(lists.values()))
    if len(set(lists.values())) > 1:
        raise LayoutError(
            " and ".join(f"{key} {list(layers)}" for key, layers in lists.items()) + " contradict each other",
            where=meta_path,
            mend="prune or merge this bundle again",
        )
    missing = [layer_file_name(i) for i in named if i not in files]
    if missing:
        raise LayoutError(
            f"{', '.join(missing)} missing from the bundle", where=folder, mend="prune or merge this bundle again"
        )
    strays = [file.name for index, file in files.items() if index not in named]
    if strays:
        raise LayoutError(
            f"{', '.join(strays)} lies there, but {BUNDLE_META} names layers {list(named)}",
            where=folder,
            mend="take the file away, or name its layer in bundle_meta.json, whichever is right",
        )
    return named


def is_layer_list(value: object) -> bool:
    """Whether a value out of a JSON file is a list of at most MOST_LAYERS layer numbers, none of them twice."""
    if (
        not isinstance(value, list)
        or len(value) > MOST_LAYERS
        or not all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    ):
        return False
    return len(set(value)) == len(value)


def weight_files(path: str | Path) -> tuple[str, ...]:
    """The names of the files that hold a model directory's weights: the single file, or else what the index names.

    The single file goes first where both lie there, as in transformers. Never a glob: Mistral's repositories carry a
    second copy of all weights as consolidated.safetensors.

    Raises:
        LayoutError: there is neither, or the index is malformed or names something that is not a file beside it.
    """
    folder = Path(path)
    if lies_there(folder / SINGLE_FILE):
        return (SINGLE_FILE,)
    index = folder / INDEX_FILE
    if not lies_there(index):
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        raise LayoutError(
            f"there is no {SINGLE_FILE} and no {INDEX_FILE}"
            + (f", only pickled weights ({pickled[0]})" if pickled else ""),
            where=folder,
            mend="convert the model with save_pretrained of a current transformers, which writes safetensors",
        )
    weight_map = read_json(index, LayoutError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LayoutError("there is no weight_map", where=index, mend="fetch the model again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise LayoutError(f"the index names {shard!r}, which is not a file beside it", where=index)
    return tuple(sorted(set(weight_map.values())))
