"""Weights held against the record of the command that wrote them: a flipped bit changes a perplexity, and shows nowhere
else.

Only weights are held against it, and only files that the record names: people do edit a manifest or a configuration,
and what they put beside the files is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_prune_lora.errors import CheckpointError
from mistral_prune_lora.provenance import PACKAGE
from mistral_prune_lora.storage.digests import file_digest, header_digest, tensor_checksum
from mistral_prune_lora.storage.json_file import read_json_if_there
from mistral_prune_lora.storage.safetensors_file import FileDigests, TensorEntry

WEIGHTS = "weights"  # the key of all four records under which the digests of headers and checksums of tensors stand
# Each record, the key under which it has the digests of whole files, and what writes it.
_RECORDS = (
    ("merge.json", "outputs", "merge"),
    ("export.json", "outputs", "export"),
    ("prune.json", "outputs", "prune"),
    ("source.json", "files", "fetch"),
)


@dataclass(frozen=True)
class Written:
    """What a directory's record says was written there.

    Attributes:
        record: the file, such as merge.json.
        verb: what wrote it: "merge".
        files: the sha256 of whole files by name.
        weights: of weight files by name, "header" and "tensors", see `weights_entry`; not in records of older versions.
    """

    record: Path
    verb: str
    files: Mapping[str, Any]
    weights: Mapping[str, Any]

    def check_header(self, file: Path) -> None:
        """Raise a CheckpointError if the header of a weight file is not the one that was written."""
        told = self._told(file)
        if told is not None and told.get("header") != header_digest(file):
            raise self._other("its header", file)

    def check_tensors(
        self, entries: Iterable[TensorEntry], checksum: Callable[[TensorEntry], str] = tensor_checksum
    ) -> None:
        """Raise a CheckpointError if tensors are not those that were written.

        Where a record has no checksums of tensors, whole files are read for it, each once.

        Args:
            entries: the tensors.
            checksum: gives a tensor's, see `digests.tensor_checksum`.
        """
        whole: dict[Path, None] = {}
        for entry in entries:
            told = self._told(entry.file)
            if told is None:
                whole[entry.file] = None
            elif told["tensors"].get(entry.stored_name) != checksum(entry):
                raise self._other(f"tensor {entry.stored_name}", entry.file)
        self.check_files(whole)

    def check_files(self, files: Iterable[Path], digest: Callable[[Path], str] = file_digest) -> None:
        """Raise a CheckpointError if files are not those that were written; `digest` gives a file's sha256."""
        for file in files:
            if file.name in self.files and self.files[file.name] != digest(file):
                raise self._other("the file", file)

    def _told(self, file: Path) -> Mapping | None:
        told = self.weights.get(file.name)
        return told if isinstance(told, dict) and isinstance(told.get("tensors"), dict) else None

    def _other(self, what: str, file: Path) -> CheckpointError:
        return CheckpointError(
            f"{what} is not what {self.record.name} says was written",
            where=file,
            mend=f"{self.verb} it again, or restore the file",
        )


def read_written(folder: Path) -> Written | None:
    """What the record in a directory says was written there; None if it has none, or one without digests.

    Raises:
        CheckpointError: a record cannot be read.
    """
    for name, key, verb in _RECORDS:
        content = read_json_if_there(folder / name, CheckpointError) or {}
        files, told = content.get(key), content.get("versions")
        # A dense model from elsewhere may have a source.json of its own.
        if isinstance(files, dict) and isinstance(told, dict) and PACKAGE in told:
            weights = content.get(WEIGHTS)
            return Written(folder / name, verb, files, weights if isinstance(weights, dict) else {})
    return None


def weights_entry(written: Mapping[str, FileDigests]) -> dict[str, dict]:
    """What a record says of weight files under WEIGHTS, besides the sha256 of each."""
    return {name: {"header": digests.header, "tensors": digests.tensors} for name, digests in written.items()}
