"""Cut a dense model into A and the bundles B and C. A file transformation: tensors are copied, no model is loaded."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from mistral_prune_lora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_prune_lora.checkpoints.descriptions import (
    bundle_meta,
    dense_facts,
    layers_map,
    make_manifest,
    make_prune_log,
    parameter_counts,
)
from mistral_prune_lora.checkpoints.directories import (
    BUNDLE_META,
    LAYERS_MAP,
    SINGLE_FILE,
    layer_file_name,
)
from mistral_prune_lora.checkpoints.family_tensors import check_model_tensors
from mistral_prune_lora.checkpoints.manifest import MANIFEST, PRUNE_LOG
from mistral_prune_lora.checkpoints.pruning_identity import KEY, pruning_identity
from mistral_prune_lora.checkpoints.tensor_names import LAYER_PREFIX, layer_prefix
from mistral_prune_lora.checkpoints.tokenizer import (
    TOKENIZER_FILES,
    copy_settings,
    find_tokenizer,
    local_tokenizer_files,
)
from mistral_prune_lora.checkpoints.written import WEIGHTS, weights_entry
from mistral_prune_lora.console import progress
from mistral_prune_lora.errors import CheckpointError, LayoutError
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.provenance import PACKAGE, other_files_sha256, versions
from mistral_prune_lora.storage.json_file import read_json_if_there, write_json
from mistral_prune_lora.storage.outputs import Output, Record, claim, listed_files, read_record
from mistral_prune_lora.storage.safetensors_file import FileDigests, TensorSpec, tensor_bytes, write_file
from mistral_prune_lora.storage.space import require_space
from mistral_prune_lora.storage.transaction import atomic_directories

RECORD_FILE = "prune.json"
# What else lies in A's directory; prune_log.json may have a second name that is none of these.
FILES_OF_A = frozenset(
    {
        "config.json",
        "generation_config.json",
        "original_config",
        MANIFEST,
        LAYERS_MAP,
        SINGLE_FILE,
        RECORD_FILE,
        *TOKENIZER_FILES,
    }
)
_SMALL_FILES = 64 << 20  # room for configuration and tokenizer beside the weights
FIXED_LAYERS: dict = {"method": "fixed"}


def split_block(start: int, size: int, *, policy: str = "half", ratio: float = 0.5) -> tuple[tuple[int, ...], ...]:
    """The layers of B (the lower ones) and C of a consecutive block of dropped layers.

    Args:
        start, size: the block.
        policy: "half" gives B the smaller half of an odd block, which of a block of one layer is nothing; "ratio" gives
            B `ratio` of it, rounded (half to even), which may be nothing or all.
        ratio: B's share with "ratio".

    Raises:
        LayoutError: an unknown policy, or a ratio outside of 0 to 1.
    """
    if policy == "half":
        count = size // 2
    elif policy == "ratio":
        if not 0 <= ratio <= 1:
            raise LayoutError(f"{ratio} is no share of the block", where="--split_ratio", mend="use one from 0 to 1")
        count = round(size * ratio)
    else:
        raise LayoutError(f"unknown split policy {policy!r}", where="--split_policy", mend="use half or ratio")
    block = tuple(range(start, start + size))
    return block[:count], block[count:]


def prune_model(
    model_dir: str | Path,
    layout: Layout,
    *,
    save_dir: str | Path,
    save_removed_dir: str | Path,
    selection: Mapping = FIXED_LAYERS,
    log: Mapping | None = None,
    log_name: str = PRUNE_LOG,
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write A to `save_dir` and the bundles to `save_removed_dir`/B and /C, all three whole or none at all.

    Of a former pruning in the same place, all parts are replaced one right after the other when the last is written. If
    a run is killed between two of them, the next one puts the rest in place before it begins.

    Weights keep their bytes, dtype and original layer indices, so A with both bundles restored is the dense model.

    Args:
        model_dir: the dense model, with its tokenizer.
        layout: which layers go where; its num_layers must be the model's.
        save_dir, save_removed_dir: where A and the bundles go.
        selection: how the layers were chosen, for the manifest.
        log: what the search was and measured, for prune_log.json (see `descriptions.make_prune_log`); versions are
            added to it.
        log_name: a second name for prune_log.json, in `save_dir` as well.
        base_model: what the descriptions call the dense model, such as its Hub id; None means its path.
        overwrite: replace what no pruning has written, too; never the dense model.

    Raises:
        PipelineError: a directory may not or cannot be written, see `outputs.claim` and `transaction`; no space.
        LayoutError: the layout is for a model of another number of layers.
        CheckpointError: the model is incomplete, pruned already, has no tokenizer, or is not what its record says was
            written.
    """
    model_dir = Path(os.path.abspath(model_dir))
    dense = _open_dense(model_dir, layout)
    save_dir, removed = Path(save_dir), Path(save_removed_dir)
    base_model = base_model or os.fspath(model_dir)
    places = prune_outputs(save_dir, removed)
    check = claim(places, [model_dir, find_tokenizer(model_dir)], overwrite=overwrite)
    require_space({output.path: _part_bytes(dense, layout, part) for part, output in zip("ABC", places, strict=True)})
    lies = {"A": save_dir, "B": removed / "B", "C": removed / "C", "original_config": save_dir / "original_config"}
    total = sum(entry.nbytes for entry in dense.entries.values())
    with (
        progress(total=total, description="prune", unit="B") as bar,
        # A last: its manifest speaks of bundles that are there.
        atomic_directories([removed / "B", removed / "C", save_dir], check=check) as (fresh_b, fresh_c, fresh),
    ):
        bundles = (("B", layout.b, fresh_b), ("C", layout.c, fresh_c))
        written: dict[Path, FileDigests] = {}
        digests: dict[str, str] = {}
        for _, layers, bundle in bundles:
            for layer in layers:
                file = bundle / layer_file_name(layer)
                written[file], passed = _copy_tensors(dense, {layer_prefix(layer): ""}, file, bar)
                digests |= passed
        kept = {layer_prefix(layer): layer_prefix(layer) for layer in layout.kept}
        written[fresh / SINGLE_FILE], passed = _copy_tensors(dense, kept, fresh / SINGLE_FILE, bar, others=True)
        digests |= passed
        # Known once every tensor has passed; so what the parts say about themselves comes after all weights.
        identity = _identity(dense, layout, digests)
        manifest = make_manifest(
            layout,
            base_model=base_model,
            model_type=dense.config["model_type"],
            selection=selection,
            artifacts={name: {"dir": os.path.abspath(folder)} for name, folder in lies.items()},
            identity=identity,
        )
        facts = dense_facts(dense.config, layout, manifest)
        for part, layers, bundle in bundles:
            write_json(bundle / BUNDLE_META, bundle_meta(part, layers, facts, identity))
            _write_record(part, bundle, identity, written)
        write_json(fresh / MANIFEST, manifest)
        write_json(fresh / LAYERS_MAP, layers_map(layout.num_layers, {name: name for name in passed}))
        for name in {PRUNE_LOG, log_name}:
            write_json(fresh / name, _prune_log(dense, base_model, layout, selection, log))
        _copy_settings(model_dir, fresh)
        _write_record("A", fresh, identity, written)


def prune_outputs(save_dir: str | Path, save_removed_dir: str | Path) -> list[Output]:
    """The directories of A, B and C as outputs of a command."""
    removed = Path(save_removed_dir)
    return [
        Output.directory(save_dir, "--save_dir", _record_of("A")),
        Output.directory(removed / "B", "--save_removed_dir", _record_of("B")),
        Output.directory(removed / "C", "--save_removed_dir", _record_of("C")),
    ]


def prune_log_output(path: str | Path) -> Output:
    """A further copy of prune_log.json as an output of a command."""
    return Output.file(path, "--prune_log", _is_prune_log, "pruning")


def _record_of(part: str) -> Record:
    """How pruning knows a part that it has written; another part is no such output."""

    def names(content: dict) -> set[str] | None:
        ours = content.get("command") == "prune" and content.get("part") == part
        return {str(name) for name in content["files"]} if ours and isinstance(content.get("files"), list) else None

    return Record(RECORD_FILE, f"pruning {part}", names)


def _write_record(part: str, fresh: Path, identity: str, written: Mapping[Path, FileDigests]) -> None:
    weights = {file.name: digests for file, digests in written.items() if file.parent == fresh}
    record = {
        "command": "prune",
        "part": part,
        KEY: identity,
        "files": [*listed_files(fresh), RECORD_FILE],
        "outputs": {name: own.sha256 for name, own in weights.items()} | other_files_sha256(fresh, weights),
        WEIGHTS: weights_entry(weights),
        "versions": versions(PACKAGE),
    }
    write_json(fresh / RECORD_FILE, record)


def _is_prune_log(path: Path) -> bool:
    content = read_record(path)
    told = content.get("versions")
    return "selected_block" in content and isinstance(told, dict) and PACKAGE in told


def _part_bytes(dense: Checkpoint, layout: Layout, part: str) -> int:
    """The bytes of a part's directory, at most."""
    layers = set(layout.layers_of(part))
    inside = (
        entry.nbytes
        for name, entry in dense.entries.items()
        if (int(match[1]) in layers if (match := LAYER_PREFIX.match(name)) else part == "A")
    )
    return sum(inside) + _SMALL_FILES


def _open_dense(model_dir: Path, layout: Layout) -> Checkpoint:
    dense = open_checkpoint(model_dir)
    if dense.kind != "model":
        raise CheckpointError("is a bundle, not a dense model", where=model_dir, mend="give the dense model")
    count = dense.config["num_hidden_layers"]
    if count != layout.num_layers:
        raise LayoutError(
            f"the model has {count} layers, the layout is for {layout.num_layers}",
            where=model_dir,
            mend=f"set num_layers to {count} and check the layers of B and C",
        )
    missing = sorted(set(range(count)) - set(dense.layers))
    if missing:
        raise CheckpointError(f"has no weights of layers {missing}", where=model_dir, mend="prune the dense model")
    check_model_tensors(dense.config, dense.shapes, range(count), model_dir)
    return dense


def _identity(dense: Checkpoint, layout: Layout, digests: Mapping[str, str]) -> str:
    """The identity of this pruning, of the sha256 of all tensors by canonical name."""
    entries = dense.entries.items()
    return pruning_identity(layout, {name: (entry.dtype, entry.shape, digests[name]) for name, entry in entries})


def _copy_tensors(
    dense: Checkpoint, prefixes: Mapping[str, str], file: Path, bar, others: bool = False
) -> tuple[FileDigests, dict[str, str]]:
    """Write the tensors under some prefixes, renamed, and with `others` all that belong to no layer, to one file.

    Returns the file's digests, and the sha256 of its tensors' bytes by the names that they have in the dense model.

    Raises:
        CheckpointError: tensors are not what the dense model's record says was written.
    """
    sources, names, digests = {}, {}, {}
    for name, entry in dense.entries.items():
        match = LAYER_PREFIX.match(name)
        if match and match[0] in prefixes:
            written = prefixes[match[0]] + name[match.end() :]
        elif others and not match:
            written = name
        else:
            continue
        sources[written], names[written] = entry, name

    def produce(written):
        bar.update(sources[written].nbytes)
        tensor = sources[written].read()
        digests[names[written]] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        return tensor

    whole = write_file(file, [TensorSpec(name, e.dtype, e.shape) for name, e in sources.items()], produce)
    checksums = {entry: whole.tensors[written] for written, entry in sources.items()}
    dense.check_tensors(checksums, checksums.__getitem__)
    return whole, {name: digests[name] for name in names.values()}


def _prune_log(dense: Checkpoint, model: str, layout: Layout, selection: Mapping, log: Mapping | None) -> dict:
    params = parameter_counts(layout, dense.shapes, tied=bool(dense.config.get("tie_word_embeddings")))
    log = {**(log or {}), "versions": versions(PACKAGE, "torch", "transformers")}
    return make_prune_log(layout, model=model, params=params, selection=selection, log=log)


def _copy_settings(model_dir: Path, fresh: Path) -> None:
    """Copy configuration and tokenizer beside the weights and, as they were, into original_config/."""
    original = fresh / "original_config"
    original.mkdir()
    named = [model_dir / name for name in ("config.json", "generation_config.json")]
    # A copy of what nobody can read would be found later.
    files = [file for file in named if read_json_if_there(file, CheckpointError) is not None]
    files += local_tokenizer_files(model_dir)
    for folder in (fresh, original):
        copy_settings(files, folder)
    source = model_dir / "source.json"
    if read_json_if_there(source, CheckpointError) is not None:
        shutil.copyfile(source, original / "source.json")
    else:
        write_json(original / "source.json", {"path": os.fspath(model_dir)})
