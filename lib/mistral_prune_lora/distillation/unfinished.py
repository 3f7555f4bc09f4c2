"""What lies beside an adapter while it is trained: its curve as it goes, and the state from which a killed run goes on.

`NAME.unfinished` holds `training.csv`, `held_out.csv`, `state.safetensors` and, where the frozen prefix is kept, its
states. One process at a time trains there. It is removed when the adapter is in its place.

A state is believed if its checksum holds and its record is that of the training to be run: the same weights, windows,
settings and versions. What only moves roundings, the number of threads or the device, may be another; it is noted.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mistral_prune_lora.errors import PipelineError, printable
from mistral_prune_lora.provenance import record_text
from mistral_prune_lora.storage.journal import open_held
from mistral_prune_lora.storage.json_file import parsed
from mistral_prune_lora.storage.safetensors_file import tensor_bytes
from mistral_prune_lora.storage.transaction import atomic_file

STATE, CURVE, HELD_OUT, PREFIX = "state.safetensors", "training.csv", "held_out.csv", "prefix.safetensors"
HELD_OUT_PREFIX, HELD_OUT_TEACHER = "held_out_prefix.safetensors", "held_out_teacher.safetensors"
_LOCK = "lock"
_OURS = (STATE, CURVE, HELD_OUT, PREFIX, HELD_OUT_PREFIX, HELD_OUT_TEACHER, _LOCK)


@dataclass
class State:
    """A training between two updates.

    Attributes:
        step: updates that are done.
        tensors: the adapter's weights, the optimiser's moments, the curves, the best adapter so far; by name.
        facts: what else there is, as JSON takes it.
    """

    step: int
    tensors: dict[str, torch.Tensor] = field(repr=False)
    facts: dict


class Unfinished:
    """The folder beside an adapter that is being trained.

    Attributes:
        path: the folder.
    """

    def __init__(self, output_dir: str | Path, record: Mapping) -> None:
        """Name it; nothing is made yet.

        Args:
            output_dir: the adapter's directory.
            record: everything that what comes out depends on, as JSON takes it.
        """
        path = Path(os.path.realpath(output_dir))
        self.path = path.with_name(f"{path.name}.unfinished")
        self._record = json.loads(record_text(record))

    def file(self, name: str) -> Path:
        """A file in it."""
        return self.path / name

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold it, for the one process that writes there; made if it is not there.

        Raises:
            PipelineError: another process trains this adapter; the folder cannot be written, or holds files that no
                training has put there.
        """
        there = os.listdir(self.path) if self.path.is_dir() else []
        # What a kill left of a file on its way begins with a dot, as do the journals of unfinished states.
        if strangers := sorted(name for name in there if name not in _OURS and not name.startswith(".")):
            told = f"holds files that are of no training: {', '.join(strangers[:5])}"
            raise PipelineError(told, where=self.path, mend="move them away")
        told = "another process trains this adapter right now"
        lock = open_held(self.file(_LOCK), told, where=self.path)
        try:
            yield
        finally:
            self._remove_if_idle()
            os.close(lock)

    def save(self, state: State) -> None:
        """Put a state in place of the former one: whole or not at all, whatever happens meanwhile.

        Raises:
            PipelineError: the disk is full or fails; the former state stays.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        told = record_text({"record": self._record, "step": state.step, "facts": state.facts})
        try:
            with atomic_file(self.file(STATE)) as fresh:
                save_file(tensors, fresh, {"state": told, "crc32": _checksum(told, tensors)})
        except (OSError, SafetensorError) as error:
            raise PipelineError(f"cannot be written: {error}", where=self.file(STATE), mend="make room there") from None

    def load(self, *, quiet: bool = False) -> State | None:
        """The saved state of the same training; None if there is none, and of any other this says so on stderr.

        Args:
            quiet: say nothing, since another process of the same training does.
        """
        path = self.file(STATE)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                told, checksum = (file.metadata() or {})["state"], (file.metadata() or {})["crc32"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            if checksum != _checksum(told, tensors):
                raise ValueError("its checksum does not hold")
            content = parsed(told)
            record, step, facts = content["record"], content["step"], content["facts"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            _say(f"{path} cannot be believed ({error}); the training begins anew", quiet)
            return None
        if others := sorted(_differences(record, self._record)):
            _say(f"{path} is of a training with another {', '.join(others)}; this one begins anew", quiet)
            return None
        return State(step, tensors, facts)

    def _remove_if_idle(self) -> None:
        """Delete it if nothing was done there: what was wrong came before the first update.

        A curve with rows stays though no state was saved: it tells how a training came to its end.
        """
        if self.path.is_dir() and {*os.listdir(self.path)} <= {_LOCK, CURVE, HELD_OUT}:
            curves = [self.file(name) for name in (CURVE, HELD_OUT) if self.file(name).exists()]
            if not any(len(curve.read_bytes().splitlines()) > 1 for curve in curves):
                self.remove()

    def remove(self) -> None:
        """Delete it: the adapter is in its place."""
        shutil.rmtree(self.path, ignore_errors=True)


def _checksum(told: str, tensors: Mapping[str, torch.Tensor]) -> str:
    found = zlib.crc32(told.encode())
    for name in sorted(tensors):
        found = zlib.crc32(tensor_bytes(tensors[name]), zlib.crc32(name.encode(), found))
    return f"{found:08x}"


def _differences(one: object, other: object, name: str = "") -> Iterator[str]:
    """The dotted names of what differs between two records."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {*one, *other}:
            yield from _differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name or "record"


def _say(told: str, quiet: bool) -> None:
    if not quiet:
        print(f"warning: {printable(told)}", file=sys.stderr)
